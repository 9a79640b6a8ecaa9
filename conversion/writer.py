"""Writes a model in each layout, and checks what was written."""

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from modeling_sslam import (
    DATASET_PRESETS,
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForPreTraining,
    SSLAMModel,
    SSLAMPreTrainedModel,
)
from modeling_sslam.modeling_sslam import sincos_position_table

from . import ConversionError
from .layouts import (
    FAIRSEQ_CLASSIFICATION,
    FAIRSEQ_ENCODER_CONSTANTS,
    FAIRSEQ_POOLINGS,
    FAIRSEQ_PRETRAINING,
    FAIRSEQ_PRETRAINING_CONSTANTS,
    FAIRSEQ_PRETRAINING_EXTRAS,
    FAIRSEQ_SETTINGS,
    HUB_CONSTANTS,
    HUB_EAT,
    HUB_EXTRAS,
    HUB_SETTINGS,
    POSITIONS,
    Layout,
    to_theirs,
)
from .reader import read_checkpoint

Tensors = dict[str, torch.Tensor]
# Bytes that torch aligns the tensors to that it allocates.
ALIGNMENT = 64


# Checks what a writer put at a path: says what was found, or raises ConversionError. It holds none of the weights, so
# that they need not be in memory twice.
Check = Callable[[Path], str]


def write_transformers(model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, folder: Path) -> Check:
    """A folder for `from_pretrained`: weights, configurations, and the source files that they need."""
    model.save_pretrained(folder)
    extractor.save_pretrained(folder)
    return partial(
        check_transformers, model_class=type(model), digests=_digests(model.state_dict()), outputs=_probe(model)
    )


def write_hub(model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, folder: Path) -> Check:
    """A folder in the layout of the published EATModel. The class itself is not among the files."""
    config = model.config
    if config.classifier_pooling != "cls":
        raise ConversionError(f"EATModel pools by the CLS token; it cannot pool by {config.classifier_pooling!r}.")
    settings = HUB_EXTRAS | HUB_CONSTANTS | {theirs: getattr(config, ours) for ours, theirs in HUB_SETTINGS}
    settings |= {
        "stride": config.patch_size,
        "mlp_ratio": config.intermediate_size / config.hidden_size,
        "num_classes": config.num_labels,
        "img_size": [extractor.max_length, config.num_mel_bins],
        "model_variant": "finetune" if isinstance(model, SSLAMForAudioClassification) else "pretrain",
        "torch_dtype": str(model.dtype).removeprefix("torch."),
    }
    tensors = _published_tensors(model, HUB_EAT)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
    safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return partial(check_tensors, digests=_digests(tensors))


def write_fairseq(model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, file: Path) -> Check:
    """A `.pt` file as fairseq keeps it, without the state of an optimiser: for fine-tuning, inference and evaluation
    by the published code. Its settings are a plain dict, of which fairseq makes its own kind."""
    fine_tuned = isinstance(model, SSLAMForAudioClassification)
    settings = _fairseq_pretraining_settings(model.config, extractor)
    if fine_tuned:
        settings = _fairseq_classification_settings(model.config, extractor, settings)
    tensors = _published_tensors(model, FAIRSEQ_CLASSIFICATION if fine_tuned else FAIRSEQ_PRETRAINING)
    state: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if not name.startswith("_ema.")}
    if len(state) < len(tensors):
        state["_ema"] = {name.removeprefix("_ema."): tensor for name, tensor in tensors.items() if name not in state}
    progress = {"criterion_name": "", "optimizer_name": "", "lr_scheduler_state": {}, "num_updates": 0}
    checkpoint = {
        "args": None,
        "cfg": settings,
        "model": state,
        "criterion": None,
        "optimizer_history": [progress],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0, "shuffle": True, "version": 2}},
        "last_optimizer_state": None,
    }
    torch.save(checkpoint, file)
    return partial(check_tensors, digests=_digests(tensors))


def _published_tensors(model: SSLAMPreTrainedModel, layout: Layout) -> dict[str, torch.Tensor]:
    prefix = "sslam." if isinstance(model, SSLAMModel) else ""
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    positions = sincos_position_table(model.config).to(model.dtype)[None]
    for part in ("sslam", "teacher"):
        if f"{part}.encoder.cls_token" in tensors:
            tensors[f"{part}.{POSITIONS}"] = positions.clone()
    return {to_theirs(name, layout): tensor for name, tensor in tensors.items()}


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for path, value in settings.items():
        *groups, name = path.split(".")
        group = nested
        for key in groups:
            group = group.setdefault(key, {})
        group[name] = value
    return nested


def _fairseq_pretraining_settings(config: SSLAMConfig, extractor: SSLAMFeatureExtractor) -> dict[str, Any]:
    settings = FAIRSEQ_PRETRAINING_EXTRAS | FAIRSEQ_ENCODER_CONSTANTS | FAIRSEQ_PRETRAINING_CONSTANTS
    settings |= {theirs: getattr(config, ours) for ours, theirs in FAIRSEQ_SETTINGS}
    settings |= {
        "model.mlp_ratio": config.intermediate_size / config.hidden_size,
        "model.average_top_k_layers": config.num_target_layers or config.num_hidden_layers,
        "task.target_length": extractor.max_length,
    }
    return _nested(settings)


def _fairseq_classification_settings(
    config: SSLAMConfig, extractor: SSLAMFeatureExtractor, pretraining: dict[str, Any]
) -> dict[str, Any]:
    mode = next(mode for mode, pooling in FAIRSEQ_POOLINGS.items() if pooling == config.classifier_pooling)
    statistics = {name: (preset["mean"], preset["std"]) for name, preset in DATASET_PRESETS.items()}
    dataset = next((name for name, pair in statistics.items() if pair == (extractor.mean, extractor.std)), None)
    settings = {
        "task._name": "mae_image_classification",
        "task.data": "",
        "task.target_length": extractor.max_length,
        "model._name": "mae_image_classification",
        "model.model_path": "",
        "model.num_classes": config.num_labels,
        "model.audio_mae": config.problem_type == "multi_label_classification"
        or dataset in ("esc50", "speech_commands"),
        "model.esc50_eval": dataset == "esc50",
        "model.spcv2_eval": dataset == "speech_commands",
        "model.target_length": extractor.max_length,
        "model.prediction_mode": mode,
        "model.use_fc_norm": True,
        "model.linear_classifier": False,
        "model.pretrained_model_args": pretraining,
        "criterion": None,
    }
    return _nested(settings)


def check_tensors(path: Path, digests: dict[str, str]) -> str:
    """Reads back what a writer put at `path` and compares the tensors' digests.

    Raises:
        ConversionError: If anything is missing or differs.
    """
    found = _digests(read_checkpoint(path).tensors)
    if differing := found.items() ^ digests.items():
        names = sorted({name for name, _ in differing})
        raise ConversionError(f"{path.name}, read back, differs from what was written: {', '.join(names)}.")
    return "read back and found equal"


def check_transformers(
    path: Path, model_class: type[SSLAMPreTrainedModel], digests: dict[str, str], outputs: tuple[torch.Tensor, ...]
) -> str:
    """The same, and that the folder's model computes the same numbers and has the source files that it refers to."""
    account = check_tensors(path, digests)
    SSLAMFeatureExtractor.from_pretrained(path)
    if not all(map(torch.equal, _probe(model_class.from_pretrained(path, dtype="auto")), outputs)):
        raise ConversionError(f"The model read back from {path.name} computes something else than the one written.")
    for name in ("config.json", "preprocessor_config.json"):
        for reference in json.loads((path / name).read_text())["auto_map"].values():
            if not (path / f"{reference.partition('.')[0]}.py").is_file():
                raise ConversionError(f"{name} refers to {reference}, whose source file was not written.")
    return account


def _digests(tensors: Tensors) -> dict[str, str]:
    """Of dtype, shape and values."""

    def digest(tensor: torch.Tensor) -> str:
        values = tensor.contiguous().view(torch.uint8).numpy()
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(values).hexdigest()}"

    return {name: digest(tensor) for name, tensor in tensors.items()}


@torch.inference_mode()
def _probe(model: SSLAMPreTrainedModel) -> tuple[torch.Tensor, ...]:
    """What the model, and in pre-training its teacher, makes of a fixed input: the same bits for the same weights."""
    config = model.config
    for parameter in model.parameters():
        # Some processors' matrix products round by where the weights lie, and in a mapped file they lie anywhere.
        if parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4 * config.patch_size, config.num_mel_bins, generator=generator)
    probed = (model.sslam, model.teacher) if isinstance(model, SSLAMForPreTraining) else (model,)
    return tuple(module.eval()(inputs)[0] for module in probed)

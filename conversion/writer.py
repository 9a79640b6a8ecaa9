"""Writing of a model in each layout, and the check of the written result."""

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
from modeling_sslam.common.files import write_errors
from modeling_sslam.layouts import (
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
from modeling_sslam.modeling_sslam import sincos_position_table

from . import ConversionError
from .reader import read_checkpoint

Tensors = dict[str, torch.Tensor]
# Alignment in bytes of the tensors that torch allocates.
ALIGNMENT = 64

# Check of a written result at a path: returns its finding as text or raises ConversionError. The check holds no
# weights, so that they are not in memory twice.
Check = Callable[[Path], str]


def write_transformers(model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, folder: Path) -> Check:
    """Write a folder for `from_pretrained`: weights, configurations and the model's source files."""
    with write_errors(folder):
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
    return partial(
        check_transformers, model_class=type(model), digests=_digests(model.state_dict()), outputs=_probe(model)
    )


def write_hub(model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, folder: Path) -> Check:
    """Write a folder in the layout of the published EATModel, without EATModel's source files.

    Raises:
        ConversionError: If EATModel cannot pool as the classifier does.
    """
    config = model.config
    if config.classifier_pooling != "cls":
        raise ConversionError(
            f"EATModel pools by the CLS token, not by {config.classifier_pooling!r}; use --to fairseq."
        )
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
    with write_errors(folder):
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return partial(check_tensors, digests=_digests(tensors))


def write_fairseq(model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, file: Path) -> Check:
    """Write a `.pt` file for fine-tuning, inference and evaluation by the published fairseq code.

    It holds no optimizer state. Its settings are a plain dict, which fairseq converts to its own type.
    """
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
    # Write through a stream. Given a path, torch would store the name of the hidden file in the archive.
    with write_errors(file), file.open("wb") as stream:
        torch.save(checkpoint, stream)
    return partial(check_tensors, digests=_digests(tensors))


def _published_tensors(model: SSLAMPreTrainedModel, layout: Layout) -> Tensors:
    """Return the weights by the layout's names, with the position table of each encoder."""
    prefix = "sslam." if isinstance(model, SSLAMModel) else ""
    tensors = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    positions = sincos_position_table(model.config).to(model.dtype)[None]
    for part in ("sslam", "teacher"):
        if f"{part}.encoder.cls_token" in tensors:
            tensors[f"{part}.{POSITIONS}"] = positions.clone()
    return {to_theirs(name, layout): tensor for name, tensor in tensors.items()}


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    """Turn settings by dotted path into nested dicts."""
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
    """Read a written result back and compare the tensors' digests.

    Args:
        path: The file or folder.
        digests: The digest of each written tensor by its name.

    Raises:
        ConversionError: If a tensor is missing or differs.
    """
    found = _digests(read_checkpoint(path).tensors)
    if differing := found.items() ^ digests.items():
        names = sorted({name for name, _ in differing})
        raise ConversionError(f"{path.name}, read back, differs from what was written: {', '.join(names)}.")
    return "read back and found equal"


def check_transformers(
    path: Path, model_class: type[SSLAMPreTrainedModel], digests: dict[str, str], outputs: tuple[torch.Tensor, ...]
) -> str:
    """Check the tensors, that the loaded model computes the same numbers, and that its source files are there.

    Args:
        path: The folder.
        model_class: The class of the written model.
        digests: The digest of each written tensor by its name.
        outputs: The written model's result for the probe.

    Raises:
        ConversionError: If anything is missing or differs.
    """
    finding = check_tensors(path, digests)
    SSLAMFeatureExtractor.from_pretrained(path)
    if not all(map(torch.equal, _probe(model_class.from_pretrained(path, dtype="auto")), outputs)):
        raise ConversionError(f"The model read back from {path.name} computes other numbers than the written one.")
    for name in ("config.json", "preprocessor_config.json"):
        for reference in json.loads((path / name).read_text())["auto_map"].values():
            if not (path / f"{reference.partition('.')[0]}.py").is_file():
                raise ConversionError(f"{name} refers to {reference}, but its source file was not written.")
    return finding


def _digests(tensors: Tensors) -> dict[str, str]:
    """Return a digest of dtype, shape and values of each tensor."""

    def digest(tensor: torch.Tensor) -> str:
        values = tensor.contiguous().view(torch.uint8).numpy().data
        return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(values).hexdigest()}"

    return {name: digest(tensor) for name, tensor in tensors.items()}


@torch.inference_mode()
def _probe(model: SSLAMPreTrainedModel) -> tuple[torch.Tensor, ...]:
    """Return the states or logits for a fixed input; for a pre-training model, the states of student and teacher.

    Equal weights give equal bits.
    """
    config = model.config
    for parameter in model.parameters():
        # On some processors the rounding of matrix products depends on the weights' alignment, and a mapped file
        # guarantees none.
        if parameter.data_ptr() % ALIGNMENT:
            parameter.data = parameter.data.clone()
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4 * config.patch_size, config.num_mel_bins, generator=generator)
    modules = (model.sslam, model.teacher) if isinstance(model, SSLAMForPreTraining) else (model,)
    return tuple(module.eval()(inputs)[0] for module in modules)

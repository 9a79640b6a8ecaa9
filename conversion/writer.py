"""Writes a model in each layout: beside its place, read back and compared, then renamed into it."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from modeling_sslam import (
    DATASET_PRESETS,
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
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

Writer = Callable[[SSLAMPreTrainedModel, SSLAMFeatureExtractor, str, Path, bool], None]


def write_transformers(
    model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, card: str, out: Path, overwrite: bool
) -> None:
    """A folder for `from_pretrained`: weights, configurations, the source files that they need, and the model card."""
    with _replacing(out, overwrite) as folder:
        model.save_pretrained(folder)
        extractor.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        _check_transformers(folder, model, extractor)


def write_hub(
    model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, card: str, out: Path, overwrite: bool
) -> None:
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
    with _replacing(out, overwrite) as folder:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        safetensors.torch.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        _check_tensors(folder, tensors)


def write_fairseq(
    model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, card: str, out: Path, overwrite: bool
) -> None:
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
    with _replacing(out, overwrite) as file:
        torch.save(checkpoint, file)
        _check_tensors(file, tensors)


WRITERS: dict[str, Writer] = {"transformers": write_transformers, "fairseq": write_fairseq, "hub-eat": write_hub}


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
    mode = next((mode for mode, pooling in FAIRSEQ_POOLINGS.items() if pooling == config.classifier_pooling), None)
    if mode is None:
        raise ConversionError(f"The published code has no pooling like {config.classifier_pooling!r}.")
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


def _check_transformers(folder: Path, model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor) -> None:
    reloaded = type(model).from_pretrained(folder, dtype=model.dtype)
    _require_equal(reloaded.state_dict(), model.state_dict(), folder)
    config = model.config
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, 4 * config.patch_size, config.num_mel_bins, generator=generator).to(model.dtype)
    encoders = [(reloaded, model)]
    if not isinstance(model, (SSLAMModel, SSLAMForAudioClassification)):
        encoders = [(reloaded.sslam, model.sslam), (reloaded.teacher, model.teacher)]
    with torch.inference_mode():
        for theirs, ours in encoders:
            if not torch.equal(theirs.eval()(inputs)[0], ours.eval()(inputs)[0]):
                raise ConversionError(
                    f"The model read back from {folder.name} computes something else than it should."
                )
    if SSLAMFeatureExtractor.from_pretrained(folder).to_dict() != extractor.to_dict():
        raise ConversionError(f"The feature extractor read back from {folder.name} is not the one written.")
    for reference in reloaded.config.auto_map.values():
        source = folder / f"{reference.partition('.')[0]}.py"
        if not source.is_file():
            raise ConversionError(f"{source.name}, which the model's code needs, was not written.")


def _check_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    _require_equal(read_checkpoint(path).tensors, tensors, path)


def _require_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], path: Path) -> None:
    differing = found.keys() ^ expected.keys()
    differing |= {name for name in found.keys() & expected.keys() if not torch.equal(found[name], expected[name])}
    if differing:
        raise ConversionError(
            f"{path.name}, read back, differs from what was written: {', '.join(sorted(differing))}."
        )


@contextmanager
def _replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """A path beside `out` to write a file or folder at, which takes the place of `out` when all went well."""
    out = out.absolute()
    if overwrite and out.is_dir() and any(out.iterdir()) and not (out / "config.json").is_file():
        raise ConversionError(f"{out} is a folder, but not of a model; it is not overwritten. Name another place.")
    out.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield workplace / out.name
        for path in (workplace / out.name, *(workplace / out.name).rglob("*"), workplace):
            _sync(path)
        previous = workplace / "previous"
        if out.exists():
            out.rename(previous)
        try:
            (workplace / out.name).rename(out)
        except OSError:
            if previous.exists():
                previous.rename(out)
            raise
        _sync(out.parent)
    finally:
        shutil.rmtree(workplace)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""Conversion of one checkpoint from start to end."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path

import torch

from modeling_sslam import (
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForPreTraining,
    SSLAMModel,
    SSLAMPreTrainedModel,
)
from modeling_sslam.common.files import replacing
from modeling_sslam.common.model_folder import expected_shapes
from modeling_sslam.layouts import CLASSIFIER_NORM_EPS, POSITIONS, Layout, recognise, to_theirs
from modeling_sslam.modeling_sslam import sincos_position_table

from . import ConversionError
from .avex import LABEL_MAP, PRESET, is_avex, read_label_map
from .card import model_card
from .configuration import Choices, describe
from .onnx_export import write_onnx
from .reader import read_checkpoint
from .writer import Check, write_fairseq, write_hub, write_transformers

# Parts of each model: the first components of our parameter names.
HEAD_PARTS = {
    "encoder": ("sslam",),
    "classification": ("sslam", "classifier"),
    "pretraining": ("sslam", "decoder", "teacher"),
}
MODEL_CLASSES = {
    "encoder": SSLAMModel,
    "classification": SSLAMForAudioClassification,
    "pretraining": SSLAMForPreTraining,
}
# Models that each layout can hold.
HEADS = {
    "transformers": tuple(HEAD_PARTS),
    "fairseq": ("classification", "pretraining"),
    "hub-eat": ("encoder", "classification"),
    "onnx": ("encoder", "classification"),
    "onnx-masked": ("encoder", "classification"),
}
Writer = Callable[[SSLAMPreTrainedModel, SSLAMFeatureExtractor, Path], Check]
WRITERS: dict[str, Writer] = {
    "transformers": write_transformers,
    "fairseq": write_fairseq,
    "hub-eat": write_hub,
    "onnx": partial(write_onnx, masked=False),
    "onnx-masked": partial(write_onnx, masked=True),
}
# The last bit of a sine differs between machines.
POSITION_TOLERANCE = 1e-6
AS_THE_CHECKPOINT_SAYS = Choices()

Tensors = dict[str, torch.Tensor]


def convert(
    source: Path,
    out: Path,
    *,
    head: str = "auto",
    weights: str = "student",
    to: str = "transformers",
    choices: Choices = AS_THE_CHECKPOINT_SAYS,
    overwrite: bool = False,
    title: str | None = None,
    report: Callable[[str], None] = print,
) -> None:
    """Convert a checkpoint, check the result, and put it at `out`. After an error `out` is as it was.

    Args:
        source: A file or folder; see [`read_checkpoint`].
        out: The folder to write, or with `to="fairseq"` the file.
        head: The part to keep: "encoder", "classification" or "pretraining". "auto" keeps the classifier of a
            fine-tuned checkpoint and otherwise the encoder. For fairseq it also keeps decoder and teacher.
        weights: The encoder to keep from a pre-training checkpoint: "student", or "teacher", its moving average.
        to: The layout to write, a key of [`WRITERS`].
        choices: Settings that take precedence over the checkpoint's.
        overwrite: Whether `out` may be replaced.
        title: The source's name in messages and in the model card. Defaults to its file name.
        report: Takes each line of the report: the layout found, the parts kept, assumptions, and the check.

    Raises:
        ConversionError: If the source is damaged or no SSLAM or EAT checkpoint, if it lacks the parts asked for, if
            the layout cannot hold them, if the result differs when read back, or if `out` may not be overwritten.
        OSError: If the folder of `out` is not writable, or writing fails.
    """
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as place, _errors_naming(out, place):
        check_place(out, overwrite)
        # Write in a function of its own, so that the source's weights leave memory before the check reads the result.
        check, summary = _convert(source, place, head, weights, to, choices, title or source.name, report)
        finding = check(place)
    report(f"{out}: {summary}; {finding}")


def check_place(out: Path, overwrite: bool) -> None:
    """Check that a result may be written to `out`.

    Raises:
        ConversionError: If `out` exists and may not be overwritten, or is a folder that holds no model.
    """
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if occupied and not overwrite:
        raise ConversionError(f"{out} exists already; choose another path, or replace it with --overwrite.")
    if occupied and out.is_dir() and not (out / "config.json").is_file():
        raise ConversionError(f"{out} is a folder without a model, which is not overwritten; choose another path.")


@contextmanager
def _errors_naming(out: Path, place: Path) -> Iterator[None]:
    """Let errors name the result's path in place of the hidden path at which the result is prepared."""
    try:
        yield
    except ConversionError as error:
        raise ConversionError(str(error).replace(place.name, out.name)) from error
    except OSError as error:
        # A full disk's error names no file.
        text = str(error) if error.filename or error.errno is None else f"{out} could not be written: {error}"
        raise OSError(text.replace(place.name, out.name)) from error


def _convert(
    source: Path,
    place: Path,
    head: str,
    weights: str,
    to: str,
    choices: Choices,
    title: str,
    report: Callable[[str], None],
) -> tuple[Check, str]:
    """Write the result at `place`, and return its check and a summary of the model."""
    checkpoint = read_checkpoint(source)
    layout, tensors = _under_our_names(checkpoint.tensors, title)
    found = Counter(_part(name) for name in tensors)
    report(f"{title}: {layout.title}; {_enumerate(found)}")

    head = _resolve_head(head, weights, to, found)
    if weights == "teacher":
        tensors = {name.replace("teacher", "sslam", 1): tensors[name] for name in tensors if _part(name) == "teacher"}
    tensors = {name: tensor for name, tensor in tensors.items() if _part(name) in HEAD_PARTS[head]}
    choices, notes = _avex_choices(choices, layout, (title, *(str(file) for file in checkpoint.files)), source, head)
    config, extractor, assumptions = describe(tensors, checkpoint, layout, choices, head == "pretraining")
    notes += assumptions
    notes += _check_positions(tensors, config, layout)

    def theirs(name: str) -> str:
        """Return the source's name of one of the model's parameters."""
        name = f"sslam.{name}" if head == "encoder" else name
        return to_theirs(name.replace("sslam", "teacher", 1) if weights == "teacher" else name, layout)

    weights_alone = {name: tensors[name] for name in tensors if not name.endswith(POSITIONS)}
    model = _build(weights_alone, config, MODEL_CLASSES[head], theirs)
    if head == "classification" and config.classifier_norm_eps is None and to in CLASSIFIER_NORM_EPS:
        raise ConversionError(f"This classifier has no norm, and the code that reads --to {to} needs one.")
    eps = CLASSIFIER_NORM_EPS.get(to, config.classifier_norm_eps)
    if head == "classification" and eps != config.classifier_norm_eps:
        notes.append(
            f"The classifier's norm has an epsilon of {config.classifier_norm_eps} here, but {eps} in the code that "
            "reads this layout, so that code's logits differ slightly."
        )
    kept = ", ".join([weights, *HEAD_PARTS[head][1:]] if "teacher" in found else map(_title, HEAD_PARTS[head]))
    report(f"kept: {kept}")
    for note in notes:
        report(f"note: {note}")

    check = WRITERS[to](model, extractor, place)
    if to == "transformers":
        origin = {"Converted from": title, "Its layout": f"{layout.title}: {_enumerate(found)}", "Kept of it": kept}
        card = model_card(model, extractor, checkpoint, origin, notes)
        (place / "README.md").write_text(card, encoding="utf-8")
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    return check, f"{type(model).__name__}, {num_parameters / 1e6:.2f} M parameters"


def _under_our_names(tensors: Tensors, title: str) -> tuple[Layout, Tensors]:
    """Return the layout of a checkpoint's weights, and the weights by our names."""
    layout, names = recognise(tensors)
    unknown = [key for key, name in names.items() if name is None]
    renamed = {name: tensors[key] for key, name in names.items() if name is not None}
    stem = ("sslam.patch_embeddings.projection.weight", "sslam.encoder.cls_token")
    missing = [to_theirs(name, layout) for name in stem if name not in renamed]
    if unknown or missing:
        lacks = f" It lacks {', '.join(missing)}." if missing else ""
        raise ConversionError(
            f"{title} is not a checkpoint of SSLAM or EAT: {len(unknown)} of its {len(names)} tensors have unknown "
            f"names{': ' if unknown else ''}{_list(unknown)}.{lacks}"
        )
    if len(renamed) < len(names):
        count = Counter(names.values())
        raise ConversionError(f"{title} holds tensors twice: {_list(key for key in names if count[names[key]] > 1)}.")
    return layout, renamed


def _resolve_head(head: str, weights: str, to: str, found: Iterable[str]) -> str:
    """Return the head to keep, after checking that the checkpoint has it and the layout can hold it."""
    if head == "auto":
        head = "classification" if "classifier" in found else "pretraining" if to == "fairseq" else "encoder"
    if weights == "teacher" and "teacher" not in found:
        raise ConversionError(
            "The checkpoint holds no teacher; only pre-training checkpoints do. Use --weights student."
        )
    if weights == "teacher" and head != "encoder":
        raise ConversionError(f"--weights teacher needs --head encoder, not {head}: the teacher is only an encoder.")
    lacking = [part for part in HEAD_PARTS[head] if part not in found]
    if lacking:
        remedy = "Use --head encoder"
        if "encoder" not in HEADS[to]:
            remedy = f"--to {to} holds no encoder alone; use another layout"
        elif head == "classification":
            remedy += ", and transformers to add a new classifier to it"
        raise ConversionError(f"The checkpoint has no {' and no '.join(lacking)}, which {head} needs. {remedy}.")
    if head not in HEADS[to]:
        raise ConversionError(f"--to {to} cannot hold --head {head}; use {' or '.join(HEADS[to])}.")
    return head


def _check_positions(tensors: Tensors, config: SSLAMConfig, layout: Layout) -> list[str]:
    """Compare the checkpoint's position tables with the fixed sines and cosines; return notes."""
    tables = {name: tensor for name, tensor in tensors.items() if name.endswith(POSITIONS)}
    if not tables and layout.family != "transformers":
        return ["The checkpoint stores no position table; SSLAM's fixed sines and cosines are assumed."]
    expected = sincos_position_table(config)
    for name, table in tables.items():
        if table.squeeze(0).shape != expected.shape:
            raise ConversionError(
                f"{name} has shape {tuple(table.shape)}; expected (1, {', '.join(map(str, expected.shape))})."
            )
        error = (table.squeeze(0).float() - expected.to(table.dtype).float()).abs().max().item()
        if not error <= POSITION_TOLERANCE:
            raise ConversionError(
                f"The position table {name} differs from the fixed sines and cosines of SSLAM by up to {error:.3g}; "
                "the converted model would compute other numbers."
            )
    return []


def _build(
    tensors: Tensors, config: SSLAMConfig, model_class: type[SSLAMPreTrainedModel], theirs: Callable[[str], str]
) -> SSLAMPreTrainedModel:
    """Build a model from weights, without copying them.

    Args:
        tensors: The weights by our names.
        config: The model's configuration.
        model_class: The model's class.
        theirs: Returns the source's name of a parameter, for messages.

    Raises:
        ConversionError: If a weight is missing, unexpected, of another shape, not floating-point or not finite.
    """
    if model_class is SSLAMModel:
        tensors = {name.removeprefix("sslam."): tensor for name, tensor in tensors.items()}
    expected = expected_shapes(model_class, config)
    if missing := expected.keys() - tensors.keys():
        raise ConversionError(f"The checkpoint lacks {_list(sorted(map(theirs, missing)))}.")
    if extra := tensors.keys() - expected.keys():
        raise ConversionError(
            f"The checkpoint holds weights that its model lacks: {_list(sorted(map(theirs, extra)))}."
        )
    for name, tensor in tensors.items():
        if tensor.shape != expected[name]:
            raise ConversionError(
                f"{theirs(name)} has shape {tuple(tensor.shape)}, but the other weights imply {tuple(expected[name])}."
            )
        if not tensor.is_floating_point():
            raise ConversionError(f"{theirs(name)} holds {tensor.dtype} values; weights are floating-point.")
        if not tensor.isfinite().all():
            raise ConversionError(f"{theirs(name)} holds NaN or infinite values: the training run had diverged.")
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors.values()))
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    return model_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)


def _avex_choices(
    choices: Choices, layout: Layout, names: Iterable[str], source: Path, head: str
) -> tuple[Choices, list[str]]:
    """Complete the choices for a checkpoint of the Earth Species Project, and return notes."""
    if not is_avex(layout, names):
        return choices, []
    notes = []
    if choices.dataset is None:
        choices = replace(choices, dataset=PRESET)
        notes.append(f"Inputs are normalised as avex does for the Earth Species Project's EATs ({PRESET}).")
    label_map = (source if source.is_dir() else source.parent) / LABEL_MAP
    if head == "classification" and choices.labels is None and label_map.is_file():
        choices = replace(choices, labels=read_label_map(label_map))
        notes.append(f"The classes are named by {LABEL_MAP}.")
    return choices, notes


def _part(name: str) -> str:
    """Return the part of the model that one of our names belongs to."""
    return name.partition(".")[0]


def _title(part: str) -> str:
    return "encoder" if part == "sslam" else part


def _enumerate(counts: Counter) -> str:
    return ", ".join(f"{_title(part)} ({count} tensors)" for part, count in counts.items())


def _list(names: Iterable[str], at_most: int = 8) -> str:
    """Join names with commas, and count those beyond `at_most`."""
    names = list(names)
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest} more" if rest > 0 else "")

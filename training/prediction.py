"""What a classifier says of every clip of a split, and how good that is.

    predictions = predict(model, make_loader(..., repeat=False), LabelSet.of_model(model.config), accelerator)
    compute_metrics(predictions, "multi_label_classification", labels.names)["map"]

Every process passes over its own clips, however many those are, and results are exchanged once, after the pass: no
process waits for another in between, and no clip is repeated to make batches even. Clips are told apart by their ids,
so a clip that came twice is an error and not a weight of two. In the last bits of a logit shows which clips shared a
batch; nothing else depends on the number of processes.
"""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import evaluate
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn
from tqdm.auto import tqdm

from training.data import AudioLoader, DataError
from training.labels import LabelSet

ProblemType = Literal["multi_label_classification", "single_label_classification"]

METRICS_FOLDER = Path(__file__).parent / "evaluation"
# No process holds the whole model, so none can go ahead of the others.
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
NUM_NAMED = 5
# More would be names of clips, and a picture that cannot be drawn.
MAX_GROUPS = 100


class Predictions(NamedTuple):
    """Every clip of a split once, sorted by id; the same in every process.

    Attributes:
        ids: N names.
        logits: float32 `(N, K)`.
        targets: float32 `(N, K)`, 0 or 1.
        groups: N values of `DataConfig.group_column`, or `None` without one.
    """

    ids: list[str]
    logits: np.ndarray
    targets: np.ndarray
    groups: list[Any] | None


def predict(
    model: nn.Module, loader: AudioLoader, labels: LabelSet, accelerator: Accelerator, description: str = "Predicting"
) -> Predictions:
    """The model's logits for all clips of all processes' loaders; to be called in every process.

    Args:
        model: A classifier, prepared by `accelerator` or not. It runs in eval mode and is left in the modes it had.
        loader: One pass (`repeat=False`) over this process's clips, of which there may be none.

    Raises:
        DataError: If there are no clips or no labels, a label is unknown, two clips share an id, or a logit is not
            finite.
        ValueError: If `accelerator` shards the model over processes.
    """
    if accelerator.distributed_type in SHARDED:
        raise ValueError(f"Prediction needs the whole model in every process, not {accelerator.distributed_type}.")
    model = accelerator.unwrap_model(model)
    ids, logits, targets, groups = [], [], [], []
    bar = tqdm(
        desc=description,
        unit="clip",
        mininterval=0.5,
        leave=False,
        dynamic_ncols=True,
        disable=not accelerator.is_main_process,
    )
    with bar, _eval_mode(model), torch.inference_mode():
        for batch in loader:
            if "labels" not in batch:
                raise DataError("The clips come without labels; name their column by data.label_column.")
            with accelerator.autocast():
                output = model(loader.input_values(batch, accelerator.device)).logits
            ids += batch["ids"]
            logits.append(output.float().cpu().numpy())
            targets.append(labels.encode(batch["labels"]).bool().cpu().numpy())
            groups += batch.get("groups") or []
            bar.update(len(batch["ids"]))
    num_classes = len(labels.names)
    part = (
        ids,
        np.concatenate([np.empty((0, num_classes), np.float32), *logits]),
        np.concatenate([np.empty((0, num_classes), bool), *targets]),
        groups,
    )
    return _merge(gather_object([part]))


def skipped_clips(loader: AudioLoader) -> dict[str, int]:
    """How many clips all processes' loaders skipped, by reason; to be called in every process."""
    counts = sum(map(Counter, gather_object([dict(loader.skipped)])), Counter())
    return dict(sorted(counts.items()))


def problem_type_of(problem_type: str | None, predictions: Predictions) -> ProblemType:
    """The kind of task: what the model's configuration says, or if it says nothing, single-label if every clip has
    just one label."""
    if problem_type is not None:
        return problem_type
    is_single = bool((predictions.targets.sum(axis=1) == 1).all())
    return "single_label_classification" if is_single else "multi_label_classification"


def compute_metrics(predictions: Predictions, problem_type: ProblemType, names: list[str]) -> dict[str, Any]:
    """How good predictions are, by the modules in `training/evaluation`.

    Returns:
        Plain values that JSON takes: where a metric is not defined or infinite (d-prime for an AUC of 1), `None`.

        - several labels: `map`, `chance_map` (of random scores), `mean_auc`, `d_prime`, `num_classes_left_out` (of
          `map`), `num_classes_left_out_of_auc`, and `per_class`, for each class `label`, `num_positives`,
          `average_precision`, `auc`;
        - one label: `accuracy`, `balanced_accuracy`, `num_classes_left_out` (of the latter), `per_class` with `label`,
          `num_clips`, `recall`, `precision`, and `confusion_matrix`, true by predicted class.

    Raises:
        DataError: If no clip has a label, or with one label a clip has another number of them.
    """
    if not predictions.targets.any():
        raise DataError(f"None of the {len(predictions.ids)} clips has a label: there is nothing to measure.")
    return _metrics(predictions, problem_type, names)


def metrics_by_group(
    predictions: Predictions, problem_type: ProblemType, names: list[str]
) -> dict[Any, dict[str, Any]]:
    """The metrics of [`compute_metrics`] over the clips of each group, in the groups' order, with `num_clips`; empty
    without groups. A group's means are over the classes that occur in it.

    Raises:
        DataError: If the values are no groups: lists, or almost as many as clips.
    """
    members: dict[Any, list[int]] = {}
    for i, group in enumerate(predictions.groups or []):
        if isinstance(group, (list, dict)):
            raise DataError(
                f"data.group_column holds lists ({group!r}); it must hold a number or a word for each clip."
            )
        # What is missing is one group, also as a NaN, which no other NaN equals.
        members.setdefault(None if group != group else group, []).append(i)
    if len(members) > MAX_GROUPS:
        raise DataError(f"data.group_column has {len(members)} values; a report by group takes {MAX_GROUPS} at most.")
    return {
        group: {"num_clips": len(members[group])} | _metrics(_take(predictions, members[group]), problem_type, names)
        for group in sorted(members, key=_group_order)
    }


def load_metric(name: str) -> evaluate.Metric:
    """The module `training/evaluation/<name>`, without a look at the network.

    `evaluate` copies it into HF_MODULES_CACHE under a lock and the digest of its content, so that processes do not
    disturb one another and an edited module is not taken for its former self. Values go through memory alone. Loaded
    anew for each use, it has nothing left of a use that failed.
    """
    return evaluate.load(str(METRICS_FOLDER / name), keep_in_memory=True)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Module by module: a frozen encoder, say, is in eval mode while its head trains."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _merge(parts: list[tuple[list[str], np.ndarray, np.ndarray, list[Any]]]) -> Predictions:
    ids = [id_ for part in parts for id_ in part[0]]
    if not ids:
        raise DataError("There is no usable clip to predict.")
    repeated = [id_ for id_, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} ids name more than one clip, such as {_some(repeated)}: each clip counts once, so ids "
            "must differ. Remove duplicated rows, or name another column by data.id_column."
        )
    order = sorted(range(len(ids)), key=ids.__getitem__)
    logits = np.concatenate([part[1] for part in parts])[order]
    groups = [group for part in parts for group in part[3]]
    predictions = Predictions(
        [ids[i] for i in order],
        logits,
        np.concatenate([part[2] for part in parts])[order].astype(np.float32),
        [groups[i] for i in order] if groups else None,
    )
    if not np.isfinite(logits).all():
        broken = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        raise DataError(
            f"The logits of {len(broken)} of {len(ids)} clips are not finite, such as of "
            f"{_some([predictions.ids[i] for i in broken])}: the model has diverged, or mixed_precision is too coarse."
        )
    return predictions


def _group_order(group: Any) -> tuple[bool, float, str]:
    """Numbers in their order, also as texts out of a table, then other texts in theirs."""
    try:
        return False, float(group), ""
    except (TypeError, ValueError):
        return True, 0.0, str(group)


def _take(predictions: Predictions, rows: list[int]) -> Predictions:
    return Predictions([predictions.ids[i] for i in rows], predictions.logits[rows], predictions.targets[rows], None)


def _metrics(predictions: Predictions, problem_type: ProblemType, names: list[str]) -> dict[str, Any]:
    if problem_type == "single_label_classification":
        odd = np.flatnonzero(predictions.targets.sum(axis=1) != 1)
        if len(odd):
            raise DataError(
                f"{len(odd)} clips do not have one label each, such as {_some([predictions.ids[i] for i in odd])}, "
                "but the model's problem_type is single_label_classification."
            )
        result = load_metric("clip_accuracy").compute(
            predictions=predictions.logits.argmax(axis=1),
            references=predictions.targets.argmax(axis=1),
            num_classes=len(names),
        )
        columns = ("num_clips", "recall", "precision")
    elif problem_type == "multi_label_classification":
        result = load_metric("audio_tagging").compute(
            predictions=predictions.logits, references=predictions.targets.astype(np.int8)
        )
        columns = ("num_positives", "average_precision", "auc")
    else:
        raise DataError(f"problem_type={problem_type!r} has no metric here; it must be multi- or single-label.")
    by_column = [result.pop(column) for column in columns]
    result["per_class"] = [
        {"label": name} | {column: _finite(value) for column, value in zip(columns, values, strict=True)}
        for name, *values in zip(names, *by_column, strict=True)
    ]
    return {name: _finite(value) for name, value in result.items()}


def _finite(value: Any) -> Any:
    """JSON has no word for infinite or undefined numbers."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:NUM_NAMED])

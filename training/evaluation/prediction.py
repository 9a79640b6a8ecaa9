"""Logits of a classifier for every clip of a split, over all processes.

    predictions = predict(model, make_loader(..., repeat=False), LabelSet.of_model(model.config), accelerator)
    compute_metrics(predictions, "multi_label_classification", labels.names)["map"]

Each process predicts its own clips, and the results are gathered once at the end. Processes do not wait for each other
in between, and no clip is repeated to even out batches. Clips are identified by their ids, so a repeated id is an
error rather than a clip that counts twice. The composition of a batch can change a logit in its last bits. Nothing
else depends on the number of processes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object
from torch import nn
from tqdm.auto import tqdm

from training.data.config import DataError
from training.data.labels import LabelSet
from training.data.loader import AudioLoader

# In these modes no process holds the whole model, so processes cannot predict on their own.
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
NUM_EXAMPLES = 5


class Predictions(NamedTuple):
    """Predictions for every clip of a split, sorted by id; the same in every process.

    Attributes:
        ids: N clip ids.
        logits: float32 of shape `(N, K)`.
        targets: float32 of shape `(N, K)`, 0 or 1.
        groups: N values of `DataConfig.group_column`, or `None` without that column.
    """

    ids: list[str]
    logits: np.ndarray
    targets: np.ndarray
    groups: list[Any] | None

    def take(self, rows: Sequence[int]) -> "Predictions":
        """Return the predictions for some of the clips."""
        groups = None if self.groups is None else [self.groups[i] for i in rows]
        return Predictions([self.ids[i] for i in rows], self.logits[rows], self.targets[rows], groups)


def predict(
    model: nn.Module, loader: AudioLoader, labels: LabelSet, accelerator: Accelerator, description: str = "Predicting"
) -> Predictions:
    """Compute the logits of all clips of all processes' loaders. Every process must call this.

    Args:
        model: Classifier, prepared by `accelerator` or not. It runs in eval mode; the mode of each module is restored.
        loader: One pass (`repeat=False`) over this process's clips, of which there may be none.
        labels: Classes, in the order of the logits.
        accelerator: Provides device, precision and processes.
        description: Label of the progress bar.

    Raises:
        DataError: If there are no clips or no labels, a label is unknown, two clips have the same id, or a logit is
            not finite.
        ValueError: If `accelerator` shards the model over processes.
    """
    if accelerator.distributed_type in SHARDED:
        raise ValueError(f"Prediction needs the whole model in every process, not {accelerator.distributed_type}.")
    model = accelerator.unwrap_model(model)
    ids: list[str] = []
    logits: list[np.ndarray] = []
    targets: list[np.ndarray] = []
    groups: list[Any] = []
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
                raise DataError("The clips come without labels; name their column with data.label_column.")
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
    """Count the clips that all processes' loaders skipped, by reason. Every process must call this."""
    counts: Counter[str] = Counter()
    for skipped in gather_object([dict(loader.skipped)]):
        counts.update(skipped)
    return dict(sorted(counts.items()))


def examples(ids: Sequence[str]) -> str:
    """Return the first few ids as text for an error message."""
    return ", ".join(ids[:NUM_EXAMPLES])


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode and restore the mode of each module afterwards.

    Modes can differ: a frozen encoder stays in eval mode while its head trains.
    """
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def _merge(parts: list[tuple[list[str], np.ndarray, np.ndarray, list[Any]]]) -> Predictions:
    """Join the processes' ids, logits, targets and groups, sorted by id."""
    ids = [id_ for part in parts for id_ in part[0]]
    if not ids:
        raise DataError("There is no usable clip to predict.")
    repeated = [id_ for id_, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(
            f"{len(repeated)} ids name more than one clip, such as {examples(repeated)}. Each clip counts once, so "
            "ids must be unique: remove repeated rows, or name another column with data.id_column."
        )
    order = sorted(range(len(ids)), key=ids.__getitem__)
    logits = np.concatenate([part[1] for part in parts])
    targets = np.concatenate([part[2] for part in parts]).astype(np.float32)
    groups = [group for part in parts for group in part[3]]
    predictions = Predictions(ids, logits, targets, groups or None).take(order)
    is_finite = np.isfinite(predictions.logits).all(axis=1)
    if not is_finite.all():
        broken = [id_ for id_, finite in zip(predictions.ids, is_finite, strict=True) if not finite]
        raise DataError(
            f"The logits of {len(broken)} of {len(ids)} clips are not finite, such as of {examples(broken)}. The "
            "model has diverged, or mixed_precision is too coarse."
        )
    return predictions

"""What a classifier says of every clip of a split, and how good that is.

    predictions = predict(model, make_loader(..., repeat=False), LabelSet.of_model(model.config), accelerator)
    compute_metrics(predictions, "multi_label_classification", labels.names)["map"]

Every process passes over its own clips, however many those are, and results are exchanged once, after the pass: no
process waits for another in between, and no clip is repeated to make batches even. Clips are told apart by their ids,
so a clip that came twice is an error and not a weight of two. In the last bits of a logit shows which clips shared a
batch; nothing else depends on the number of processes.
"""

from collections import Counter
from collections.abc import Iterator
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

# No process holds the whole model, so none can go ahead of the others.
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
NUM_NAMED = 5


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


def _some(ids: list[str]) -> str:
    return ", ".join(ids[:NUM_NAMED])

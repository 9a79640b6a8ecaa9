"""Weights by which training draws clips of rare classes more often: AST's recipe, as for AudioSet-2M.

    python -m training.class_weights --data audioset --data.split balanced+unbalanced --output weights.csv
    accelerate launch -m training.finetune ... --data.sample_weights weights.csv --data.clips_per_epoch 200000

Writes a table `id,weight` with a line for each clip: the sum over the clip's labels of 1000 / (n + 0.01), where n is
the number of clips that have the label (Gong et al. 2021, arXiv 2104.01778). Ids are the loader's. Of parquet files
only ids and labels are read.
"""

import csv
import dataclasses
import io
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from modeling_sslam.common.files import write_text
from training.arguments import parse
from training.data.config import DataConfig
from training.data.sources import open_source

SCALE, SMOOTHING = 1000.0, 0.01


def clip_weights(labels: Iterable[Sequence[str]]) -> np.ndarray:
    """The weight of each clip: the sum over its labels of 1000 / (clips with that label + 0.01).

    Args:
        labels: Of each of N clips. A label counts once in a clip; a clip without any has weight 0 and is never drawn.

    Returns:
        float64 of shape `(N,)`.
    """
    clips = [frozenset(names) for names in labels]
    counts = Counter(name for names in clips for name in names)
    # In the order of their names, or sums would differ in their last bits from run to run.
    weights = {name: SCALE / (count + SMOOTHING) for name, count in counts.items()}
    return np.array([sum(weights[name] for name in sorted(names)) for names in clips], dtype=np.float64)


@dataclass
class ClassWeightsConfig:
    """All settings of the command."""

    data: DataConfig
    output: Path = field(metadata={"help": "Table to write."})
    overwrite: bool = field(default=False, metadata={"help": "Whether to replace a table that is there."})


def write_class_weights(config: ClassWeightsConfig) -> np.ndarray:
    """Writes the table.

    Returns:
        The weights, in its order: that of the source.

    Raises:
        FileExistsError: If the table is there and is not to be replaced.
        ValueError: If no clip has a label, or two of its clips have the same id.
    """
    if config.output.exists() and not config.overwrite:
        raise FileExistsError(f"{config.output} is there already; name another file, or replace it: --overwrite true.")
    data = dataclasses.replace(config.data, label_column=config.data.label_column or "auto", shuffle_buffer=0)
    source = open_source(data)
    ids, labels = [], []
    for id_, names in tqdm(source.ids_and_labels(), unit="clip", desc="Labels", mininterval=0.5):
        ids.append(id_)
        labels.append(names)
    if repeated := [id_ for id_, count in Counter(ids).items() if count > 1]:
        raise ValueError(
            f"{len(repeated)} ids of {data.source} are those of several clips, such as {repeated[0]!r}. Name a column "
            "whose ids differ by --data.id_column."
        )
    if not any(labels):
        raise ValueError(f"{data.source} has no clip with a label in {data.split}.")
    weights = clip_weights(labels)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("id", "weight"))
    rows.writerows(zip(ids, weights.tolist(), strict=True))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.output, table.getvalue())
    return weights


def main(argv: Sequence[str] | None = None) -> None:
    config = parse(ClassWeightsConfig, argv, description=__doc__)
    try:
        weights = write_class_weights(config)
    except (ValueError, OSError) as error:
        sys.exit(f"training.class_weights: {error}")
    drawable = weights[weights > 0]
    print(
        f"{config.output}: {len(weights)} clips, weights {drawable.min():.4g} to {drawable.max():.4g}; "
        f"{len(weights) - len(drawable)} clips without a label have weight 0."
    )


if __name__ == "__main__":
    main()

"""Compute sampling weights that draw clips of rare classes more often, as AST does for AudioSet-2M.

    python -m training.class_weights --data audioset --data.split balanced+unbalanced --output weights.csv
    accelerate launch -m training.finetune ... --data.sample_weights weights.csv --data.clips_per_epoch 200000

The output is a table `id,weight` with one line for each clip. The weight of a clip is the sum over its labels of
1000 / (n + 0.01), where n is the number of clips with the label (Gong et al. 2021, arXiv 2104.01778). Ids are those of
the loader. Only ids and labels are read from parquet files, not the audio.
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
    """Compute the weight of each clip: the sum over its labels of 1000 / (clips with that label + 0.01).

    Args:
        labels: Labels of each of N clips. A repeated label counts once. A clip without labels gets weight 0, so it is
            never drawn.

    Returns:
        float64 of shape `(N,)`.
    """
    clips = [frozenset(names) for names in labels]
    counts = Counter(name for names in clips for name in names)
    weights = {name: SCALE / (count + SMOOTHING) for name, count in counts.items()}
    # Sets have no fixed order between runs, and a sum's last bits depend on the order.
    return np.array([sum(weights[name] for name in sorted(names)) for names in clips], dtype=np.float64)


@dataclass
class ClassWeightsConfig:
    """All settings of the command."""

    data: DataConfig
    output: Path = field(metadata={"help": "Table to write."})
    overwrite: bool = field(default=False, metadata={"help": "Whether to replace an existing table."})


def write_class_weights(config: ClassWeightsConfig) -> np.ndarray:
    """Write the table.

    Returns:
        The weights in the order of the source, float64 of shape `(N,)`.

    Raises:
        FileExistsError: If the table exists and must not be replaced.
        ValueError: If no clip has a label, or two clips have the same id.
    """
    if config.output.exists() and not config.overwrite:
        raise FileExistsError(f"{config.output} exists already; name another file, or add --overwrite true.")
    data = dataclasses.replace(config.data, label_column=config.data.label_column or "auto", shuffle_buffer=0)
    source = open_source(data)
    ids, labels = [], []
    for id_, names in tqdm(source.ids_and_labels(), unit="clip", desc="Labels", mininterval=0.5):
        ids.append(id_)
        labels.append(names)
    if repeated := [id_ for id_, count in Counter(ids).items() if count > 1]:
        raise ValueError(
            f"{len(repeated)} ids of {data.source} name several clips, such as {repeated[0]!r}. Name a column of "
            "unique ids with --data.id_column."
        )
    if not any(labels):
        raise ValueError(f"No clip of {data.source} has a label in the split {data.split}.")
    weights = clip_weights(labels)
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(("id", "weight"))
    rows.writerows(zip(ids, weights.tolist(), strict=True))
    config.output.parent.mkdir(parents=True, exist_ok=True)
    write_text(config.output, table.getvalue())
    return weights


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
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

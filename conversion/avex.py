"""Facts about the Earth Species Project's EATs that their checkpoints do not state.

The repositories `EarthSpeciesProject/esp-aves2-*eat*` hold one safetensors file each and no config.json. Their package
`avex` states how inputs are normalised, and reads the names of the classes from label_map.json.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from modeling_sslam.layouts import AVEX, Layout

from . import ConversionError

# Key in `DATASET_PRESETS`.
PRESET = "esp_aves2"
LABEL_MAP = "label_map.json"


def is_avex(layout: Layout, names: Iterable[str]) -> bool:
    """Tell whether a checkpoint is one of the Earth Species Project's.

    The names of the weights tell a supervised model. The self-supervised ones have fairseq's names, as other EATs do,
    and are known by the name of the repository or file.

    Args:
        layout: The layout found.
        names: Names of the repository, the folder and the files.
    """
    return layout is AVEX or any(re.search(r"esp[-_]aves2", name, re.IGNORECASE) for name in names)


def read_label_map(path: Path) -> list[str]:
    """Read the names of the classes from a label_map.json, which holds each name's index.

    Raises:
        ConversionError: If the indices are not 0, 1, ..., each once.
    """
    try:
        indices = json.loads(path.read_text(encoding="utf-8"))
        labels = sorted(indices, key=indices.__getitem__)
        if [indices[label] for label in labels] != list(range(len(labels))):
            raise ValueError("its indices are not 0, 1, ..., each once")
    except (ValueError, TypeError, AttributeError) as error:
        raise ConversionError(f"{path} does not hold the index of each class: {error}") from error
    return labels

"""IDMT-DESED-FL: domestic soundscapes of 10 s, the 10 classes of DESED (Johnson et al. 2021, arXiv 2102.08833).

The file layout of the download is not known, so `--annotations train=TABLE test=TABLE` (paths in SOURCE) is required.
A table has a header. Tabs separate its cells, or commas in a `.csv`. It has one of two sets of columns:

- `filename`, `onset`, `offset` and `event_label`: one row for each event;
- `filename` and `event_labels`: one row for each clip, with its labels separated by commas.

Options name other columns. A sound is searched by its name in all of SOURCE, first in folders with the table's name.
If several sounds match a name, it is an error. Classes are in alphabetical order.
"""

from typing import Any

from training.preparation import desed

list_clips = desed.list_clips
OPTIONS: dict[str, dict[str, Any]] = desed.OPTIONS | {
    "annotations": desed.OPTIONS["annotations"] | {"required": True, "help": "tables of each split"}
}

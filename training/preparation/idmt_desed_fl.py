"""IDMT-DESED-FL: domestic soundscapes of 10 s, the 10 classes of DESED (Johnson et al. 2021, arXiv 2102.08833).

No documentation of its file layout was found, so `--annotations train=TABLE test=TABLE` (paths in SOURCE) is required.
A table has a header and one row for each event, separated by tabs, or by commas in a `.csv`. Its columns are
`filename`, `onset`, `offset` and `event_label`, or `filename` and `event_labels`, with the labels of a clip separated
by commas. Options name other columns.

A sound is searched by its name in all of SOURCE, first in folders named as the table. A name that several sounds match
is an error. Classes are in alphabetical order.
"""

from typing import Any

from training.preparation import desed

list_clips = desed.list_clips
OPTIONS: dict[str, dict[str, Any]] = desed.OPTIONS | {
    "annotations": desed.OPTIONS["annotations"] | {"required": True, "help": "tables of each split"}
}

"""IDMT-DESED-FL: domestic soundscapes of 10 s, the 10 classes of DESED (Johnson et al. 2021, arXiv 2102.08833).

How its files are laid out was not to be found documented, so `--annotations train=TABLE test=TABLE` (paths in SOURCE)
names the tables, with a header and a line for each event, separated by tabs, or in a `.csv` by commas. Columns that
are not called `filename`, `onset`, `offset` and `event_label` (or `event_labels`, with the labels of a clip separated
by commas) are named too. A sound is looked for by its name in all of SOURCE, first in folders that are called as the
table; a name that may be any of several sounds is an error. Classes are in alphabetical order.
"""

from typing import Any

from training.preparation import desed

list_clips = desed.list_clips
OPTIONS: dict[str, dict[str, Any]] = desed.OPTIONS | {
    "annotations": desed.OPTIONS["annotations"] | {"required": True, "help": "tables of each split"}
}

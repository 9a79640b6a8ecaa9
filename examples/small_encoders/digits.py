"""Write a table of the Free Spoken Digit Dataset with its published split.

    python -m examples.small_encoders.digits free-spoken-digit-dataset data/digits.csv

The table has the columns path, label and split. File names are DIGIT_SPEAKER_INDEX; recordings with index 0 to 4 are
the test recordings.
"""

import argparse
import csv
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from modeling_sslam.common.files import write_text

NAME = re.compile(r"(?P<digit>\d)_(?P<speaker>[a-z]+)_(?P<index>\d+)\.(wav|flac)")
# Recordings of each digit and speaker for testing, as published.
NUM_TEST = 5


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.small_encoders.digits",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the data set as downloaded")
    parser.add_argument("table", type=Path, metavar="TABLE", help="table to write")
    arguments = parser.parse_args(argv)
    rows = [
        (path.resolve(), found["digit"], "test" if int(found["index"]) < NUM_TEST else "train")
        for path in sorted(arguments.folder.rglob("*"))
        if (found := NAME.fullmatch(path.name))
    ]
    if not rows:
        sys.exit(f"error: {arguments.folder} has no recordings with names such as 3_jackson_12.wav.")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("path", "label", "split"))
    writer.writerows(rows)
    arguments.table.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.table, text.getvalue())
    num_test = sum(split == "test" for _, _, split in rows)
    print(f"{arguments.table}: {len(rows) - num_test} recordings for training, {num_test} for testing.")


if __name__ == "__main__":
    main()

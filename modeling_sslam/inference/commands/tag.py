"""`sslam tag`: print the labels of sound files."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TextIO

from ...common.errors import ClipError
from ...common.text import csv_row, escape_controls, escape_undecodable
from .arguments import add_compile_argument, add_model_arguments, positive_int, score
from .output import results_stream

SUMMARY = "Print the labels of sound files, the most probable first."
DETAILS = """\
A file that is longer than the model's training clips is cut into windows of that length. A class gets the highest of
its scores in all windows, or with a single-label model the mean. A file that cannot be read is reported on stderr and
left out; the exit status is then 1. A file that was cut is used as far as it goes, with a warning. Sampling rates of
100 Hz to 1 MHz are read. Bytes of file names that are not UTF-8 are printed as escapes such as \\udce9.
"""
EXAMPLES = """\
examples:
  sslam tag crow.flac --model ta012/SSLAM_AS2M_Finetuned --top-k 3
  sslam tag recordings/ --model ta012/SSLAM_AS2M_Finetuned --threshold 0.3 --format csv > tags.csv
  find . -name '*.mp3' -size +1M -print0 | sslam tag - --model ta012/SSLAM_AS2M_Finetuned --format jsonl > tags.jsonl
"""

# Writes the labels of a file: its name, `[{"label": name, "score": score}, ...]` and its length in seconds.
Writer = Callable[[str, list[dict[str, Any]], float], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "sources",
        metavar="FILE|DIR|-",
        nargs="+",
        help="sound files, folders (searched recursively), quoted patterns (** matches any depth), or - for a list of "
        "paths on standard input",
    )
    add_model_arguments(parser)
    add_compile_argument(parser)
    results = parser.add_argument_group("results")
    results.add_argument(
        "--top-k", type=positive_int, default=10, metavar="K", help="print at most K labels of a file (default: 10)"
    )
    results.add_argument(
        "--threshold",
        type=score,
        default=0.0,
        metavar="SCORE",
        help="print only labels with at least this score (default: 0)",
    )
    results.add_argument(
        "--format",
        choices=tuple(WRITERS),
        default="table",
        help="table is for people; json, jsonl and csv hold path, label and score (default: table)",
    )


def run(args: argparse.Namespace) -> int:
    """Print the labels of all files as they become known; return the exit status."""
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ...common.recordings import find_recordings
    from ..tagger import SSLAMTagger

    recordings = find_recordings(args.sources)
    tagger = SSLAMTagger.from_pretrained(
        args.model, args.device, args.dtype, args.batch_size, args.revision, args.compile
    )
    num_failed = 0
    with (
        results_stream(is_json=args.format.startswith("json")) as stream,
        WRITERS[args.format](stream) as write,
        tqdm(total=len(recordings), unit="file", disable=None, dynamic_ncols=True) as progress,
        logging_redirect_tqdm(),
    ):
        results = tagger.tag_each_with_duration(recordings, args.top_k, args.threshold)
        for path, (result, seconds) in zip(recordings, results, strict=True):
            # The bar goes to stderr, which may share the terminal with stdout.
            with progress.external_write_mode(sys.stdout):
                if isinstance(result, ClipError):
                    print(escape_controls(f"{path}: {result}"), file=sys.stderr)
                    num_failed += 1
                else:
                    write(path, result, seconds)
            progress.update()
    if num_failed:
        print(f"{num_failed} of {len(recordings)} files could not be used", file=sys.stderr)
    return int(num_failed > 0)


@contextmanager
def _table(file: TextIO) -> Iterator[Writer]:
    def write(path: str, labels: list[dict[str, Any]], seconds: float) -> None:
        print(f"{escape_controls(path)}  ({seconds:.2f} s)", file=file)
        for entry in labels:
            print(f"  {entry['score']:.3f}  {escape_controls(entry['label'])}", file=file)
        file.flush()

    yield write


def _json_entry(path: str, labels: list[dict[str, Any]]) -> str:
    return json.dumps({"path": escape_undecodable(path), "labels": labels}, ensure_ascii=False)


@contextmanager
def _json(file: TextIO) -> Iterator[Writer]:
    separator = "["

    def write(path: str, labels: list[dict[str, Any]], seconds: float) -> None:
        nonlocal separator
        file.write(f"{separator}\n{_json_entry(path, labels)}")
        separator = ","

    try:
        yield write
    finally:
        # The list is closed also after Ctrl-C, so that the output is valid JSON.
        file.write("[]\n" if separator == "[" else "\n]\n")


@contextmanager
def _jsonl(file: TextIO) -> Iterator[Writer]:
    def write(path: str, labels: list[dict[str, Any]], seconds: float) -> None:
        print(_json_entry(path, labels), file=file, flush=True)

    yield write


@contextmanager
def _csv(file: TextIO) -> Iterator[Writer]:
    file.write(csv_row(("path", "label", "score")))

    def write(path: str, labels: list[dict[str, Any]], seconds: float) -> None:
        file.writelines(csv_row((path, entry["label"], f"{entry['score']:.6f}")) for entry in labels)
        file.flush()

    yield write


WRITERS: dict[str, Callable[[TextIO], AbstractContextManager[Writer]]] = {
    "table": _table,
    "json": _json,
    "jsonl": _jsonl,
    "csv": _csv,
}

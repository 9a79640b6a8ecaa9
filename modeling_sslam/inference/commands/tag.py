"""`sslam tag`: the labels of sound files."""

import argparse
import csv
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from ...common.decoding import duration_seconds
from ...common.errors import ClipError
from ...common.recordings import find_recordings
from ..tagger import SSLAMTagger
from .arguments import add_model_arguments, positive_int, share

DESCRIPTION = """\
Prints the labels of sound files, the most probable first. A file longer than the clips that the model was trained on
is cut into windows of that length: a class gets its highest score of any, or with a single-label model the mean.
A file that cannot be used is reported and left out; the exit status is then 1.
"""
EXAMPLES = """\
examples:
  sslam tag crow.flac --model sslam-as2m --top-k 3
  sslam tag recordings/ --model sslam-as2m --threshold 0.3 --format csv > tags.csv
  find . -name '*.mp3' -size +1M -print0 | sslam tag - --model sslam-as2m --format jsonl > tags.jsonl
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "sources",
        metavar="FILE|DIR|-",
        nargs="+",
        help="sound files, folders to search through, patterns (quoted, ** for any depth), or - for paths on stdin",
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--top-k", type=positive_int, default=10, metavar="K", help="labels of a file at most (default: 10)"
    )
    parser.add_argument(
        "--threshold", type=share, default=0.0, metavar="SCORE", help="lowest score to print (default: 0)"
    )
    parser.add_argument(
        "--format",
        choices=tuple(WRITERS),
        default="table",
        help="table to read; json, jsonl and csv with path, label and score for programs",
    )


def run(args: argparse.Namespace) -> int:
    recordings = find_recordings(args.sources)
    tagger = SSLAMTagger.from_pretrained(args.model, args.device, args.dtype, args.batch_size, args.revision)
    failed = 0
    with (
        WRITERS[args.format](sys.stdout) as write,
        tqdm(total=len(recordings), unit="file", disable=None, dynamic_ncols=True) as progress,
    ):
        results = tagger.tag_each(recordings, args.top_k, args.threshold)
        for path, result in zip(recordings, results, strict=True):
            # The bar is on stderr, but perhaps on the same screen.
            with progress.external_write_mode(sys.stdout):
                if isinstance(result, ClipError):
                    print(f"{path}: {result}", file=sys.stderr)
                    failed += 1
                else:
                    write(path, result)
            progress.update()
    if failed:
        print(f"{failed} of {len(recordings)} files could not be used", file=sys.stderr)
    return int(failed > 0)


@contextmanager
def _table(file: TextIO) -> Iterator[Any]:
    def write(path: str, labels: list[dict[str, Any]]) -> None:
        seconds = duration_seconds(path)
        print(path if seconds is None else f"{path}  ({seconds:.2f} s)", file=file)
        for entry in labels:
            print(f"  {entry['score']:.3f}  {entry['label']}", file=file)
        file.flush()

    yield write


@contextmanager
def _json(file: TextIO) -> Iterator[Any]:
    separator = "["

    def write(path: str, labels: list[dict[str, Any]]) -> None:
        nonlocal separator
        file.write(f"{separator}\n{json.dumps({'path': path, 'labels': labels}, ensure_ascii=False)}")
        separator = ","

    try:
        yield write
    finally:
        # Whole also after Ctrl-C.
        file.write("[]\n" if separator == "[" else "\n]\n")


@contextmanager
def _jsonl(file: TextIO) -> Iterator[Any]:
    def write(path: str, labels: list[dict[str, Any]]) -> None:
        print(json.dumps({"path": path, "labels": labels}, ensure_ascii=False), file=file, flush=True)

    yield write


@contextmanager
def _csv(file: TextIO) -> Iterator[Any]:
    rows = csv.writer(file, lineterminator="\n")
    rows.writerow(("path", "label", "score"))

    def write(path: str, labels: list[dict[str, Any]]) -> None:
        rows.writerows((path, entry["label"], f"{entry['score']:.6f}") for entry in labels)
        file.flush()

    yield write


WRITERS = {"table": _table, "json": _json, "jsonl": _jsonl, "csv": _csv}

"""`sslam timeline`: what sounds when in a recording of any length."""

import argparse
import csv
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from ...common.decoding import duration_seconds
from ...common.errors import ClipError, InferenceError
from ...common.files import replacing
from ..tagger import SSLAMTagger
from ..timeline.events import EventSettings
from ..timeline.formats import FORMATS, SUFFIXES, format_of
from ..timeline.picture import TimelinePicture, check_picture_format
from .arguments import add_model_arguments, positive_int, positive_seconds, seconds, share

DESCRIPTION = f"""\
Goes through a recording of any length in bounded memory, window by window, and says from when to when each class
sounds. What is written goes by the file name: {", ".join(f"{suffix} ({name})" for suffix, name in SUFFIXES.items())}.

A window tells whether a class sounds anywhere in it, so onsets and offsets are uncertain by half its length. Windows
are padded to the clips of the training: short ones tell the time better, and the class worse.
"""
EXAMPLES = """\
examples:
  sslam timeline night.wav --model sslam-as2m
  sslam timeline night.wav --model sslam-as2m --out night.csv night.txt --plot night.png --scores night-scores.csv
  sslam timeline night.wav --model sslam-as2m --window 1 --hop 0.25 --threshold 0.4 --min-duration 0.5 --format rttm

night.txt is a label track for Audacity: File > Import > Labels.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    defaults = EventSettings()
    parser.add_argument("recording", metavar="FILE", help="a sound file of any length")
    add_model_arguments(parser)
    windows = parser.add_argument_group("windows")
    windows.add_argument(
        "--window", type=positive_seconds, default=2.0, metavar="S", help="length in seconds (default: 2)"
    )
    windows.add_argument(
        "--hop", type=positive_seconds, default=0.5, metavar="S", help="from one to the next (default: 0.5)"
    )
    events = parser.add_argument_group("events")
    events.add_argument(
        "--threshold",
        type=share,
        default=defaults.threshold,
        metavar="SCORE",
        help=f"score that an event reaches (default: {defaults.threshold:g})",
    )
    events.add_argument(
        "--release",
        type=share,
        metavar="SCORE",
        help="score at which it begins and ends (default: half the threshold)",
    )
    events.add_argument(
        "--median",
        type=positive_int,
        default=defaults.median,
        metavar="N",
        help=f"windows of the median filter over scores, odd; 1 for none (default: {defaults.median})",
    )
    events.add_argument(
        "--max-gap",
        type=seconds,
        default=0.0,
        metavar="S",
        help="join a class's events no further apart (default: 0)",
    )
    events.add_argument(
        "--min-duration", type=seconds, default=0.0, metavar="S", help="drop shorter events (default: 0)"
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--format", choices=tuple(FORMATS), help="what to print (default: table, or nothing with --out)"
    )
    results.add_argument(
        "--out", type=Path, nargs="+", default=[], metavar="PATH", help="files to write the events to, by their suffix"
    )
    results.add_argument(
        "--scores", type=Path, metavar="PATH", help="CSV to write the scores of every window and class to"
    )
    results.add_argument(
        "--plot", type=Path, metavar="PATH", help="picture (.png, .pdf, .svg) of spectrogram and events"
    )


def run(args: argparse.Namespace) -> int:
    settings = EventSettings(args.threshold, args.release, args.median, args.max_gap, args.min_duration)
    if os.path.isdir(args.recording):
        raise InferenceError(f"{args.recording} is a folder; sslam timeline takes one recording, sslam tag folders.")
    formats = {path: format_of(path) for path in args.out}
    if args.plot:
        check_picture_format(args.plot)
    tagger = SSLAMTagger.from_pretrained(args.model, args.device, args.dtype, args.batch_size, args.revision)
    write_timeline(tagger, args, settings, formats)
    return 0


def write_timeline(
    tagger: SSLAMTagger, args: argparse.Namespace, settings: EventSettings, formats: dict[Path, str]
) -> None:
    """Writes and prints all that the arguments ask for."""
    total = duration_seconds(args.recording)
    with ExitStack() as stack:
        files = {path: stack.enter_context(replacing(path)) for path in (*formats, args.scores, args.plot) if path}
        progress = stack.enter_context(
            tqdm(total=total and round(total, 1), unit="s", unit_scale=True, disable=None, dynamic_ncols=True)
        )
        picture = None
        if args.plot:
            picture = TimelinePicture(tagger.feature_extractor.sampling_rate, tagger.frame_seconds)
        write_scores = None
        if args.scores:
            write_scores = stack.enter_context(_score_table(files[args.scores], tagger.labels, args.window))

        def on_scores(start: float, scores: np.ndarray) -> None:
            progress.update(start + args.hop - progress.n)
            if picture is not None:
                picture.add_scores(start, scores)
            if write_scores is not None:
                write_scores(start, scores)

        try:
            timeline = tagger.timeline(
                args.recording,
                args.window,
                args.hop,
                settings,
                keep_scores=False,
                on_frames=picture and picture.add_frames,
                on_scores=on_scores,
            )
        except ClipError as error:
            raise InferenceError(f"{args.recording}: {error}") from error
        progress.update(timeline.duration - progress.n)
        for path, name in formats.items():
            files[path].write_text(FORMATS[name](timeline), encoding="utf-8")
        if picture is not None:
            picture.draw(timeline, files[args.plot])
    if args.format or not args.out:
        sys.stdout.write(FORMATS[args.format or "table"](timeline))


@contextmanager
def _score_table(path: Path, labels: list[str], window: float) -> Iterator[Callable[[float, np.ndarray], None]]:
    with open(path, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(("start", "end", *labels))
        yield lambda start, scores: rows.writerow(
            (f"{start:.3f}", f"{start + window:.3f}", *(f"{score:.5f}" for score in scores))
        )

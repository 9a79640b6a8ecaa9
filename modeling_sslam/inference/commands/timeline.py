"""`sslam timeline`: find when each class sounds in a recording of any length."""

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.errors import ClipError, InferenceError
from ...common.files import replacing
from ...common.text import csv_row
from ..timeline.events import EventSettings
from ..timeline.formats import FORMATS, SUFFIXES, format_of
from .arguments import (
    add_compile_argument,
    add_model_arguments,
    non_negative_seconds,
    positive_int,
    positive_seconds,
    score,
)
from .output import results_stream

if TYPE_CHECKING:
    import numpy as np

    from ..tagger import SSLAMTagger

SUMMARY = "Find when each class sounds in a recording of any length."
DETAILS = f"""\
The recording is classified window by window, in memory that does not grow with its length. Events are read off the
scores and written in the format that a file name's suffix selects:
{", ".join(f"{suffix} ({name})" for suffix, name in SUFFIXES.items())}.

A score tells whether a class sounds anywhere in a window, so onsets and offsets are accurate to about half a window.
Windows are padded to the length of the training clips. Short windows locate sounds better in time but recognise
classes worse.
"""
EXAMPLES = """\
examples:
  sslam timeline night.wav --model ta012/SSLAM_AS2M_Finetuned
  sslam timeline night.wav --model ta012/SSLAM_AS2M_Finetuned --out night.csv night.txt --plot night.png
  sslam timeline night.wav --model ta012/SSLAM_AS2M_Finetuned --window 1 --hop 0.25 --threshold 0.4 --format rttm

night.txt is a label track for Audacity: File > Import > Labels.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    defaults = EventSettings()
    parser.add_argument("recording", metavar="FILE", help="a sound file of any length")
    add_model_arguments(parser)
    add_compile_argument(parser)
    windows = parser.add_argument_group("windows")
    windows.add_argument(
        "--window", type=positive_seconds, default=2.0, metavar="S", help="length of a window in seconds (default: 2)"
    )
    windows.add_argument(
        "--hop",
        type=positive_seconds,
        default=0.5,
        metavar="S",
        help="seconds from one window to the next (default: 0.5)",
    )
    events = parser.add_argument_group("events")
    events.add_argument(
        "--threshold",
        type=score,
        default=defaults.threshold,
        metavar="SCORE",
        help=f"score that an event must reach (default: {defaults.threshold:g})",
    )
    events.add_argument(
        "--release",
        type=score,
        metavar="SCORE",
        help="score at which an event begins and ends (default: half the threshold)",
    )
    events.add_argument(
        "--median",
        type=positive_int,
        default=defaults.median,
        metavar="N",
        help=f"length of the scores' median filter in windows, odd; 1: no filter (default: {defaults.median})",
    )
    events.add_argument(
        "--max-gap",
        type=non_negative_seconds,
        default=defaults.max_gap,
        metavar="S",
        help=f"join events of a class that are at most S seconds apart (default: {defaults.max_gap:g})",
    )
    events.add_argument(
        "--min-duration",
        type=non_negative_seconds,
        default=defaults.min_duration,
        metavar="S",
        help=f"drop events shorter than S seconds (default: {defaults.min_duration:g})",
    )
    results = parser.add_argument_group("results")
    results.add_argument(
        "--format", choices=tuple(FORMATS), help="format to print (default: table, or nothing with --out)"
    )
    results.add_argument(
        "--out", type=Path, nargs="+", default=[], metavar="PATH", help="files for the events (default: none)"
    )
    results.add_argument(
        "--scores",
        type=Path,
        metavar="PATH",
        help="CSV file for the scores of all windows and classes (default: none)",
    )
    results.add_argument(
        "--plot",
        type=Path,
        metavar="PATH",
        help="picture (.png, .pdf, .svg) of spectrogram, scores and events (default: none)",
    )


def run(args: argparse.Namespace) -> int:
    """Write and print the timeline of the recording; return the exit status."""
    # Invalid settings are reported before the model is loaded, which takes seconds.
    settings = EventSettings(args.threshold, args.release, args.median, args.max_gap, args.min_duration)
    if os.path.isdir(args.recording):
        raise InferenceError(f"{args.recording} is a folder; sslam timeline takes one recording, sslam tag folders.")
    formats = {path: format_of(path) for path in args.out}
    if args.plot:
        from ..timeline.picture import check_picture_format

        check_picture_format(args.plot)
    from ..tagger import SSLAMTagger

    tagger = SSLAMTagger.from_pretrained(
        args.model, args.device, args.dtype, args.batch_size, args.revision, args.compile
    )
    write_timeline(tagger, args, settings, formats)
    return 0


def write_timeline(
    tagger: "SSLAMTagger", args: argparse.Namespace, settings: EventSettings, formats: dict[Path, str]
) -> None:
    """Write and print the results that the arguments name. Files appear whole or not at all.

    Args:
        tagger: The model.
        args: Values of the arguments of [`add_arguments`].
        settings: Made from `args`.
        formats: Files for the events, with the format of each: a key of `FORMATS`.

    Raises:
        InferenceError: If the recording cannot be used, or if the model cannot take such windows.
        OSError: If a file cannot be written.
    """
    from tqdm import tqdm
    from tqdm.contrib.logging import logging_redirect_tqdm

    from ...common.decoding import duration_seconds
    from ..timeline.picture import TimelinePicture

    total = duration_seconds(args.recording)
    printed = args.format or (None if args.out else "table")
    with results_stream(is_json=printed == "json") as stream, ExitStack() as stack:
        files = {path: stack.enter_context(replacing(path)) for path in (*formats, args.scores, args.plot) if path}
        progress = stack.enter_context(
            tqdm(total=total and round(total, 1), unit="s", unit_scale=True, disable=None, dynamic_ncols=True)
        )
        stack.enter_context(logging_redirect_tqdm())
        picture = None
        if args.plot:
            picture = TimelinePicture(tagger.feature_extractor.sampling_rate, tagger.frame_seconds)
        write_scores = None
        if args.scores:
            write_scores = stack.enter_context(_score_table(files[args.scores], tagger.labels, args.window))

        def on_scores(start: float, scores: "np.ndarray") -> None:
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
                on_frames=None if picture is None else picture.add_frames,
                on_scores=on_scores,
            )
        except ClipError as error:
            raise InferenceError(f"{args.recording}: {error}") from error
        progress.update(timeline.duration - progress.n)
        for path, name in formats.items():
            files[path].write_text(FORMATS[name](timeline), encoding="utf-8")
        if picture is not None:
            picture.save(timeline, files[args.plot])
        stack.close()  # the files are in place before anything is printed
        if printed is not None:
            stream.write(FORMATS[printed](timeline))


@contextmanager
def _score_table(path: Path, labels: list[str], window: float) -> Iterator[Callable[[float, "np.ndarray"], None]]:
    """Open a CSV file with a row for each window; yield a function that writes the row of a start and its scores."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(csv_row(("start", "end", *labels)))

        def write(start: float, scores: "np.ndarray") -> None:
            file.write(csv_row((f"{start:.3f}", f"{start + window:.3f}", *(f"{value:.5f}" for value in scores))))

        yield write

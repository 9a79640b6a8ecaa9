"""Accuracy of timelines for different window lengths, on recordings whose events are known.

Short windows resolve time better; long windows recognise sounds better.

    python -m training.soundscapes soundscapes --clips 400 --seconds 30 --seed 1
    python -m benchmarks.timeline_accuracy soundscapes --model MODEL --windows 0.5 1 2 --hop 0.1 --out accuracy.json

[`SSLAMTagger.timeline`] finds the events of each recording. The field's standard library, sed_eval (Mesaros et al.,
Applied Sciences 2016; `pip install ".[benchmarks]"`), compares them with the true events:

- segment-based F1: whether a class is active in each segment of 1 s, micro-averaged;
- event-based F1: the right class, the onset within 200 ms, the offset within 200 ms or 20 % of the event's length.

For every window length, `--tune-split` chooses the threshold with the best segment-based F1. The figures are from
`--split`. The data set is a folder that `datasets` reads, with the columns `audio` and `events` (lists of `label`,
`onset` and `offset` in seconds), as `python -m training.soundscapes` writes it.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from tqdm import tqdm

from modeling_sslam.common.files import replacing
from modeling_sslam.inference import Event, EventSettings, SSLAMTagger, Timeline
from modeling_sslam.inference.commands.arguments import add_model_arguments, positive_int, positive_seconds
from modeling_sslam.inference.timeline.events import EventDetector, to_events

SEGMENT_SECONDS = 1.0
COLLAR_SECONDS = 0.2
# The tolerance of offsets as a share of the event's length, as in DCASE.
SHARE_OF_LENGTH = 0.2
THRESHOLDS = tuple(round(0.05 * step, 2) for step in range(1, 20))


class Recording(NamedTuple):
    name: str
    audio: bytes
    events: list[Event]


class Scores(NamedTuple):
    f1: float
    precision: float
    recall: float


def read_recordings(folder: str, split: str, count: int | None) -> list[Recording]:
    rows = datasets.load_dataset(folder, split=split).cast_column("audio", datasets.Audio(decode=False))
    rows = rows.select(range(min(len(rows), count or len(rows))))
    return [
        Recording(
            str(row.get("id", index)),
            row["audio"]["bytes"],
            [Event(event["onset"], event["offset"], event["label"], 1.0) for event in row["events"]],
        )
        for index, row in enumerate(rows)
    ]


def evaluate(
    recordings: Sequence[Recording], estimates: Sequence[list[Event]], labels: list[str]
) -> tuple[Scores, Scores]:
    """Compute segment-based and event-based scores of estimated events over all recordings and classes."""
    from dcase_util.containers import MetaDataContainer
    from sed_eval.sound_event import EventBasedMetrics, SegmentBasedMetrics

    def container(name: str, events: list[Event]) -> MetaDataContainer:
        return MetaDataContainer(
            [{"filename": name, "event_label": e.label, "onset": e.onset, "offset": e.offset} for e in events]
        )

    segments = SegmentBasedMetrics(event_label_list=labels, time_resolution=SEGMENT_SECONDS)
    events = EventBasedMetrics(event_label_list=labels, t_collar=COLLAR_SECONDS, percentage_of_length=SHARE_OF_LENGTH)
    for recording, estimated in zip(recordings, estimates, strict=True):
        reference = container(recording.name, recording.events)
        for metric in (segments, events):
            metric.evaluate(reference, container(recording.name, estimated))

    def scores(metric: SegmentBasedMetrics | EventBasedMetrics) -> Scores:
        overall = metric.results_overall_metrics()["f_measure"]
        # If there are no estimates, sed_eval's precision is 0 / 0.
        return Scores(*(float(np.nan_to_num(overall[name])) for name in ("f_measure", "precision", "recall")))

    return scores(segments), scores(events)


def events_at(timeline: Timeline, settings: EventSettings) -> list[Event]:
    """Detect the events of a timeline again, with other settings than those that it was made with."""
    detector = EventDetector(settings)
    detector.push(timeline.scores)
    return to_events(detector.finish(), timeline.borders, timeline.labels, settings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="data set of recordings with events")
    add_model_arguments(parser)
    parser.add_argument("--windows", type=positive_seconds, nargs="+", default=[0.5, 1.0, 2.0], metavar="S")
    parser.add_argument("--hop", type=positive_seconds, default=0.1, metavar="S")
    parser.add_argument(
        "--median",
        type=positive_int,
        default=3,
        metavar="N",
        help="length of the median filter in windows (%(default)s)",
    )
    parser.add_argument("--split", default="test", help="split to evaluate (%(default)s)")
    parser.add_argument("--tune-split", default="validation", help="split to choose the thresholds on (%(default)s)")
    parser.add_argument("--clips", type=positive_int, metavar="N", help="largest number of recordings of each split")
    parser.add_argument("--out", type=Path, help="JSON to write the figures to")
    args = parser.parse_args()

    tagger = SSLAMTagger.from_pretrained(args.model, args.device, args.dtype, args.batch_size, args.revision)
    splits = {split: read_recordings(args.data, split, args.clips) for split in (args.tune_split, args.split)}
    unknown = {e.label for recordings in splits.values() for r in recordings for e in r.events} - set(tagger.labels)
    if unknown:
        print(f"error: the model has no class {', '.join(sorted(unknown))}", file=sys.stderr)
        return 1
    results: list[dict[str, Any]] = []
    print("window  threshold  segment F1  (precision, recall)  event F1  (precision, recall)")
    for window in args.windows:
        timelines = {
            split: [
                tagger.timeline(recording.audio, window, args.hop)
                for recording in tqdm(recordings, f"{window:g} s, {split}", disable=None)
            ]
            for split, recordings in splits.items()
        }

        def figures(split: str, threshold: float, timelines: dict = timelines) -> tuple[Scores, Scores]:
            settings = EventSettings(threshold, median=args.median)
            estimates = [events_at(timeline, settings) for timeline in timelines[split]]
            return evaluate(splits[split], estimates, tagger.labels)

        threshold = max(THRESHOLDS, key=lambda threshold: figures(args.tune_split, threshold)[0].f1)
        segment, event = figures(args.split, threshold)
        results.append(
            {"window": window, "hop": args.hop, "threshold": threshold, "clips": len(splits[args.split])}
            | {"segment_based": segment._asdict(), "event_based": event._asdict()}
        )
        print(
            f"{window:5g} s  {threshold:9.2f}  {segment.f1:10.3f}  ({segment.precision:.3f}, {segment.recall:.3f})"
            f"       {event.f1:8.3f}  ({event.precision:.3f}, {event.recall:.3f})"
        )
    if args.out:
        with replacing(args.out) as path:
            path.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Events as files that other programs read."""

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

from ...common.errors import InferenceError
from .timeline import Timeline


def to_csv(timeline: Timeline) -> str:
    """`onset,offset,label,score`, in seconds."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("onset", "offset", "label", "score"))
    rows.writerows((f"{e.onset:.3f}", f"{e.offset:.3f}", e.label, f"{e.score:.4f}") for e in timeline.events)
    return text.getvalue()


def to_audacity(timeline: Timeline) -> str:
    """A label track for Audacity (File > Import > Labels): onset, offset and label between tabs."""
    return "".join(f"{e.onset:.6f}\t{e.offset:.6f}\t{_one_line(e.label)}\n" for e in timeline.events)


def to_rttm(timeline: Timeline) -> str:
    """NIST's Rich Transcription Time Marked, as diarisation tools read it: ten fields between spaces, the class in the
    place of the speaker, the score in that of the confidence. Spaces in names become underscores."""
    recording = _one_word(Path(timeline.path).stem if timeline.path else "recording")
    return "".join(
        f"SPEAKER {recording} 1 {e.onset:.3f} {e.offset - e.onset:.3f} <NA> <NA> {_one_word(e.label)} {e.score:.4f} "
        "<NA>\n"
        for e in timeline.events
    )


def to_jams(timeline: Timeline) -> str:
    """JSON in the layout of JAMS (Humphrey et al., ISMIR 2014), namespace tag_open: time, duration, value, confidence.
    Under "sandbox" it says how the events were made."""
    data = [
        {
            "time": round(e.onset, 6),
            "duration": round(e.offset - e.onset, 6),
            "value": e.label,
            "confidence": round(e.score, 6),
        }
        for e in timeline.events
    ]
    annotation = {
        "namespace": "tag_open",
        "data": data,
        "time": 0,
        "duration": round(timeline.duration, 6),
        "annotation_metadata": {"annotation_tools": "sslam timeline", "data_source": "program"},
        "sandbox": {},
    }
    jams = {
        "annotations": [annotation],
        "file_metadata": {
            "title": Path(timeline.path).name if timeline.path else "",
            "duration": round(timeline.duration, 6),
            "identifiers": {"path": timeline.path} if timeline.path else {},
            "jams_version": "0.3.4",
        },
        "sandbox": {"window": timeline.window, "hop": timeline.hop, "events": vars(timeline.settings)},
    }
    return json.dumps(jams, indent=1, ensure_ascii=False) + "\n"


def to_table(timeline: Timeline) -> str:
    """To read on a screen."""
    if not timeline.events:
        return f"no class reaches {timeline.settings.threshold:g} in {timeline.duration:.2f} s\n"
    lines = [f"{'onset':>9}  {'offset':>9}  score  label"]
    hours = timeline.duration >= 3600
    lines += [
        f"{clock(e.onset, hours):>9}  {clock(e.offset, hours):>9}  {e.score:.3f}  {e.label}" for e in timeline.events
    ]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[[Timeline], str]] = {
    "table": to_table,
    "csv": to_csv,
    "audacity": to_audacity,
    "rttm": to_rttm,
    "json": to_jams,
}
SUFFIXES = {".csv": "csv", ".txt": "audacity", ".rttm": "rttm", ".json": "json", ".jams": "json"}


def format_of(path: Path) -> str:
    """The format that a file's name asks for.

    Raises:
        InferenceError: If it asks for none.
    """
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in SUFFIXES.items())
        raise InferenceError(f"{path}: what to write there goes by the suffix, one of {known}.")
    return SUFFIXES[path.suffix.lower()]


def clock(seconds: float, hours: bool = False) -> str:
    """2:03.4, or 1:02:03.4 where there are hours or all times are to have them."""
    minutes, rest = divmod(round(seconds, 1), 60)
    num_hours, minutes = divmod(int(minutes), 60)
    return f"{num_hours}:{minutes:02d}:{rest:04.1f}" if hours or num_hours else f"{minutes}:{rest:04.1f}"


def _one_word(text: str) -> str:
    return re.sub(r"\s+", "_", text.strip()) or "_"


def _one_line(text: str) -> str:
    return re.sub(r"[\t\r\n]+", " ", text)

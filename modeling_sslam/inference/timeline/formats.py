"""File formats for the events of a timeline."""

import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.errors import InferenceError
from ...common.text import csv_row, escape_controls, escape_undecodable

if TYPE_CHECKING:
    # Not imported at run time, because windows need torch and `sslam timeline --help` lists the formats.
    from .timeline import Timeline


def to_csv(timeline: "Timeline") -> str:
    """Format events as CSV with the columns `onset,offset,label,score`; times are in seconds."""
    rows = [(f"{e.onset:.3f}", f"{e.offset:.3f}", e.label, f"{e.score:.4f}") for e in timeline.events]
    return "".join(map(csv_row, [("onset", "offset", "label", "score"), *rows]))


def to_audacity(timeline: "Timeline") -> str:
    r"""Format events as a label track for Audacity (File > Import > Labels): onset, offset and label between tabs.

    Tabs, line breaks and other control characters in labels become escapes such as `\t`.
    """
    return "".join(f"{e.onset:.6f}\t{e.offset:.6f}\t{escape_controls(e.label)}\n" for e in timeline.events)


def to_rttm(timeline: "Timeline") -> str:
    r"""Format events as NIST's Rich Transcription Time Marked (RTTM), which diarisation tools read.

    A line has ten fields between spaces. The class is in the speaker field, and the score in the confidence field.
    Spaces in names become underscores, or `\u0020` if two classes would otherwise get the same name. Control
    characters become escapes such as `\n`.
    """
    recording = Path(timeline.path).stem if timeline.path else "recording"
    (recording,) = _words([recording])
    words = dict(zip(timeline.labels, _words(timeline.labels), strict=True))
    return "".join(
        f"SPEAKER {recording} 1 {e.onset:.3f} {e.offset - e.onset:.3f} <NA> <NA> {words[e.label]} {e.score:.4f} <NA>\n"
        for e in timeline.events
    )


def to_jams(timeline: "Timeline") -> str:
    """Format events as JSON in the layout of JAMS (Humphrey et al., ISMIR 2014).

    The namespace is tag_open: time, duration, value, confidence. "sandbox" holds the settings of the event detection.
    """
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
    path = escape_undecodable(timeline.path or "")
    jams = {
        "annotations": [annotation],
        "file_metadata": {
            "title": Path(path).name,
            "duration": round(timeline.duration, 6),
            "identifiers": {"path": path} if path else {},
            "jams_version": "0.3.4",
        },
        "sandbox": {"window": timeline.window, "hop": timeline.hop, "events": vars(timeline.settings)},
    }
    # A label can hold surrogates, which UTF-8 cannot encode. JSON's escapes of them are read back unchanged.
    return json.dumps(jams, indent=1, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"


def to_text(timeline: "Timeline") -> str:
    """Format events as a table for people."""
    if not timeline.events:
        return f"no class reaches {timeline.settings.threshold:g} in {timeline.duration:.2f} s\n"
    lines = [f"{'onset':>9}  {'offset':>9}  score  label"]
    hours = timeline.duration >= 3600
    lines += [
        f"{clock(e.onset, hours):>9}  {clock(e.offset, hours):>9}  {e.score:.3f}  {escape_controls(e.label)}"
        for e in timeline.events
    ]
    return "\n".join(lines) + "\n"


FORMATS: dict[str, Callable[["Timeline"], str]] = {
    "table": to_text,
    "csv": to_csv,
    "audacity": to_audacity,
    "rttm": to_rttm,
    "json": to_jams,
}
SUFFIXES = {".csv": "csv", ".txt": "audacity", ".rttm": "rttm", ".json": "json", ".jams": "json"}


def format_of(path: Path) -> str:
    """Return the format, a key of `FORMATS`, that a file's suffix selects.

    Raises:
        InferenceError: If no format has this suffix.
    """
    if path.suffix.lower() not in SUFFIXES:
        known = ", ".join(f"{suffix} ({name})" for suffix, name in SUFFIXES.items())
        raise InferenceError(f"{path} selects no format; end the name in one of {known}.")
    return SUFFIXES[path.suffix.lower()]


def clock(seconds: float, hours: bool = False) -> str:
    """Format a time as 2:03.4, or with hours as 1:02:03.4.

    Args:
        seconds: The time.
        hours: Whether to write the hours even if there are none.
    """
    minutes, rest = divmod(round(seconds, 1), 60)
    num_hours, minutes = divmod(int(minutes), 60)
    return f"{num_hours}:{minutes:02d}:{rest:04.1f}" if hours or num_hours else f"{minutes}:{rest:04.1f}"


def _words(names: Sequence[str]) -> list[str]:
    """Return a word without spaces for each name. Different names have different words."""
    escaped = [escape_controls(name) for name in names]
    words = [re.sub(r"\s+", "_", name.strip()) or "_" for name in escaped]
    counts = Counter(words)
    return [
        word
        if word == name or counts[word] == 1
        else re.sub(r"\s", lambda space: f"\\u{ord(space[0]):04x}", name) or "<NA>"
        for name, word in zip(escaped, words, strict=True)
    ]

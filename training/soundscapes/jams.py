"""Annotations of a scene in the JAMS format, version 0.3 (https://jams.readthedocs.io).

A file has three annotations: `scaper` has each event and its origin, as the program scaper writes them; `segment_open`
has the labels of the events; and `tag_open` has the labels of the scene. Levels (`snr`, and `background_level` in the
sandbox) are RMS levels, whereas scaper writes LUFS.
"""

from typing import Any

JAMS_VERSION = "0.3.4"
TOOL = "python -m training.soundscapes"


def jams_of(row: dict[str, Any], duration: float) -> dict[str, Any]:
    """Return the content of a JAMS file.

    Args:
        row: A row of the data set.
        duration: Length of the scene in seconds.
    """
    events = row["events"]
    scaper = [
        _observation(
            event["onset"],
            event["offset"] - event["onset"],
            {
                "label": event["label"],
                "source_file": event["source_file"],
                "source_time": event["source_time"],
                "event_time": event["onset"],
                "event_duration": round(event["offset"] - event["onset"], 4),
                "snr": event["snr"],
                "role": "foreground",
                "pitch_shift": event["pitch"] or None,
                "time_stretch": None if event["stretch"] == 1 else event["stretch"],
            },
        )
        for event in events
    ]
    background = {
        "label": "background",
        "source_file": row["background"] or "noise",
        "source_time": 0.0,
        "event_time": 0.0,
        "event_duration": duration,
        "snr": 0.0,
        "role": "background",
        "pitch_shift": None,
        "time_stretch": None,
    }
    scaper.insert(0, _observation(0.0, duration, background))
    segments = [_observation(event["onset"], event["offset"] - event["onset"], event["label"]) for event in events]
    tags = [_observation(0.0, duration, label) for label in row["labels"]]
    sandbox = {"duration": duration, "n_events": len(events), "background_level": row["level"]}
    return {
        "annotations": [
            _annotation("scaper", scaper, duration, {"scaper": sandbox}),
            _annotation("segment_open", segments, duration, {}),
            _annotation("tag_open", tags, duration, {}),
        ],
        "file_metadata": {
            "title": row["id"],
            "artist": "",
            "release": "",
            "duration": duration,
            "identifiers": {},
            "jams_version": JAMS_VERSION,
        },
        "sandbox": {},
    }


def _observation(time: float, duration: float, value: Any) -> dict[str, Any]:
    return {"time": time, "duration": round(duration, 4), "value": value, "confidence": 1.0}


def _annotation(
    namespace: str, observations: list[dict[str, Any]], duration: float, sandbox: dict[str, Any]
) -> dict[str, Any]:
    return {
        "namespace": namespace,
        "data": observations,
        "time": 0.0,
        "duration": duration,
        "annotation_metadata": {
            "curator": {"name": "", "email": ""},
            "annotator": {},
            "version": "",
            "corpus": "",
            "annotation_tools": TOOL,
            "annotation_rules": "",
            "validation": "",
            "data_source": "program",
        },
        "sandbox": sandbox,
    }

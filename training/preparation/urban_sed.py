"""URBAN-SED: 10 000 synthesised soundscapes of 10 s with 1 to 9 sound events, 10 classes (Salamon et al. 2017).

SOURCE is the data set as downloaded: `audio/{train,validate,test}/*.wav` and, with the same names,
`annotations/{train,validate,test}/*.txt` (lines `onset<TAB>offset<TAB>label`, no header) and `*.jams`. A clip's
`.jams` file is read only if the clip has no `.txt` file; its background event is ignored. `validate` becomes the split
validation. Classes are in alphabetical order.
"""

import json
from pathlib import Path

from training.preparation.events import labels_of
from training.preparation.listing import (
    AnnotatedEvent,
    Clip,
    Findings,
    Listing,
    PreparationError,
    read_lines,
    sound_files,
)

SPLITS = {"train": "train", "validate": "validation", "test": "test"}
CLASSES = [
    "air_conditioner", "car_horn", "children_playing", "dog_bark", "drilling", "engine_idling", "gun_shot",
    "jackhammer", "siren", "street_music",
]  # fmt: skip


def list_clips(source: Path) -> Listing:
    """List the clips of URBAN-SED; the module describes the files."""
    clips, findings = [], Findings()
    for folder, split in SPLITS.items():
        annotations = source / "annotations" / folder
        # A clip may have both files. The .txt file comes last here, so it replaces the .jams file.
        paths = {path.stem: path for suffix in (".jams", ".txt") for path in sorted(annotations.glob(f"*{suffix}"))}
        for stem, path in sorted(paths.items()):
            events = _read_text(path, findings) if path.suffix == ".txt" else _read_jams(path)
            clips.append(Clip(stem, split, source / "audio" / folder / f"{stem}.wav", labels_of(events), events))
    if not clips:
        raise PreparationError(f"{source / 'annotations'} has no train/*.txt or train/*.jams; is this URBAN-SED?")
    return Listing(source, clips, CLASSES, sound_files(source), has_events=True, has_sources=True, findings=findings)


def _read_text(path: Path, findings: Findings) -> tuple[AnnotatedEvent, ...]:
    events: list[AnnotatedEvent] = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            onset, offset, label = line.strip().split("\t")
            event = AnnotatedEvent(label, float(onset), float(offset))
        except ValueError as error:
            raise PreparationError(f"{path}, line {number} is not `onset<TAB>offset<TAB>label`: {line!r}.") from error
        if event in events:
            findings.add("duplicated_rows", f"{path.name}:{number}")
        else:
            events.append(event)
    return tuple(sorted(events, key=lambda event: event.onset))


def _read_jams(path: Path) -> tuple[AnnotatedEvent, ...]:
    """Return the foreground events of a JAMS file, which is JSON, as scaper writes it."""
    try:
        annotations = json.loads("".join(read_lines(path)))["annotations"]
        events = [
            AnnotatedEvent(item["value"]["label"], float(item["time"]), float(item["time"]) + float(item["duration"]))
            for annotation in annotations
            for item in annotation["data"]
            if item["value"]["role"] == "foreground"
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise PreparationError(f"{path} is not a JAMS file as scaper writes it: {error!r}.") from error
    return tuple(sorted(events, key=lambda event: event.onset))

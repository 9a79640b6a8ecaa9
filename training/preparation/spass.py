"""SPASS: five synthesised urban soundscapes of 5000 clips of about 10 s (Viveros-Muñoz et al., on Zenodo).

SOURCE is the data set as downloaded. For each of Market, Park, Square, Street and Waterfront, it has a folder of
sounds ("Market audio files", or with underscores) and a table with one row for each sound in each clip
("1_MatrixLabelsMarket.csv"). The published SSLAM preparation reads the columns `audio_filename` and `class`, and does
not document the others. If a table has the onset and offset in seconds, name these columns to get `events`.

Each soundscape is a separate task with its own classes, in alphabetical order. `--soundscape` selects it. The splits
are the published ones: of the sorted names in the table, the first 75 % (3750) are train, and the others (from
market03751 on) are test.
"""

from pathlib import Path
from typing import Any

from training.preparation.events import Columns, labels_of, read_events
from training.preparation.listing import Clip, Findings, Listing, PreparationError, sound_files

TRAIN_FRACTION = 0.75
# From label_descriptors.csv of the published manifests. No published classifier fixes an order of the classes.
IN_ALL = (
    "airborne", "bird", "bus_idling", "bus_moving", "car_idling", "car_moving", "crowd", "dog", "horn",
    "motorcycle_idling", "motorcycle_moving", "music", "rain", "shouting", "siren", "steps", "talk", "truck_idling",
    "truck_moving", "wind",
)  # fmt: skip
BUILDING = ("alarm", "braking", "cutting", "drilling", "impact")
CLASSES = {
    "square": sorted((*IN_ALL, *BUILDING, "bells", "water")),
    "park": sorted((*IN_ALL, "bells", "fireworks", "water")),
    "waterfront": sorted((*IN_ALL, *BUILDING, "Vwater", "fireworks", "river", "waves")),
    "street": sorted((*IN_ALL, *BUILDING, "air_conditioner", "explosives")),
    "market": sorted((*IN_ALL, "air_conditioner", "alarm")),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "soundscape": {"choices": list(CLASSES), "required": True, "help": "the soundscape to prepare"},
    "file_column": {"default": "audio_filename", "help": "column with the file name (default: audio_filename)"},
    "class_column": {"default": "class", "help": "column with the class (default: class)"},
    "onset_column": {"help": "column with the onset in seconds (default: none)"},
    "offset_column": {"help": "column with the offset in seconds (default: none)"},
}


def list_clips(
    source: Path,
    soundscape: str,
    file_column: str = "audio_filename",
    class_column: str = "class",
    onset_column: str | None = None,
    offset_column: str | None = None,
) -> Listing:
    """List the clips of one soundscape of SPASS; the module describes the files and the options."""
    if (onset_column is None) != (offset_column is None):
        raise PreparationError("--onset-column and --offset-column need each other: give both or neither.")
    tables = [path for path in sorted(source.rglob("*.csv")) if path.stem.lower().endswith(f"labels{soundscape}")]
    if len(tables) != 1:
        raise PreparationError(
            f"{source} must have one table *Labels{soundscape.capitalize()}.csv; it has {len(tables)}"
            f"{': ' if tables else ''}{', '.join(map(str, tables))}."
        )
    findings = Findings()
    events = read_events(tables[0], Columns(file_column, class_column, onset_column, offset_column), findings)
    files = [
        path
        for path in sound_files(source)
        if any(part.lower().startswith(soundscape) for part in path.relative_to(source).parts)
    ]
    paths = {path.name: path for path in reversed(files)}
    names = sorted(events)
    num_train = int(TRAIN_FRACTION * len(names))
    has_events = onset_column is not None
    clips = [
        Clip(
            Path(name).stem,
            "train" if i < num_train else "test",
            paths.get(Path(name).name, source / name),
            labels_of(events[name]),
            tuple(events[name]) if has_events else (),
        )
        for i, name in enumerate(names)
    ]
    return Listing(
        source, clips, CLASSES[soundscape], files, has_events=has_events, has_sources=True, findings=findings
    )

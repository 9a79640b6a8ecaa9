"""ESC-50: 2000 recordings of 5 s, 50 classes, five folds (Piczak 2015, github.com/karolpiczak/ESC-50).

SOURCE is the data set as downloaded: `meta/esc50.csv` with the columns `filename`, `fold`, `target` and `category`,
and `audio/*.wav`. The folds become the splits fold1 to fold5. For cross-validation, each of them is the test split
once, and the other four are for training. Classes are in the order of `target`. `--esc10` prepares only ESC-10: 400 of
these recordings in ten classes, under a CC BY licence. The column `esc10` marks them.
"""

from pathlib import Path
from typing import Any

from training.preparation.listing import Clip, Findings, Listing, read_table, sound_files

CLASSES = [
    "dog", "rooster", "pig", "cow", "frog", "cat", "hen", "insects", "sheep", "crow", "rain", "sea_waves",
    "crackling_fire", "crickets", "chirping_birds", "water_drops", "wind", "pouring_water", "toilet_flush",
    "thunderstorm", "crying_baby", "sneezing", "clapping", "breathing", "coughing", "footsteps", "laughing",
    "brushing_teeth", "snoring", "drinking_sipping", "door_wood_knock", "mouse_click", "keyboard_typing",
    "door_wood_creaks", "can_opening", "washing_machine", "vacuum_cleaner", "clock_alarm", "clock_tick",
    "glass_breaking", "helicopter", "chainsaw", "siren", "car_horn", "engine", "train", "church_bells", "airplane",
    "fireworks", "hand_saw",
]  # fmt: skip
CLASSES_OF_ESC10 = [
    "dog", "rooster", "rain", "sea_waves", "crackling_fire", "crying_baby", "sneezing", "clock_tick", "helicopter",
    "chainsaw",
]  # fmt: skip

OPTIONS: dict[str, dict[str, Any]] = {
    "esc10": {
        "action": "store_true",
        "default": False,
        "help": "prepare only ESC-10, the clips whose column esc10 is True",
    },
}


def list_clips(source: Path, esc10: bool = False) -> Listing:
    """List the clips of ESC-50, or of ESC-10. Where `target` and `category` of a row disagree, the category counts."""
    clips, findings = [], Findings()
    columns = ("filename", "fold", "target", "category", *(["esc10"] if esc10 else []))
    others = set()
    for row in read_table(source / "meta" / "esc50.csv", columns):
        name, label = row["filename"], row["category"]
        if esc10 and row["esc10"] != "True":
            others.add(source / "audio" / name)
            continue
        clips.append(Clip(Path(name).stem, f"fold{row['fold']}", source / "audio" / name, (label,)))
        if label in CLASSES and row["target"] != str(CLASSES.index(label)):
            findings.add("conflicting_rows", f"{name}: target {row['target']} is not {label}")
    files = [path for path in sound_files(source / "audio") if path not in others]
    return Listing(source, clips, CLASSES_OF_ESC10 if esc10 else CLASSES, files, findings=findings)

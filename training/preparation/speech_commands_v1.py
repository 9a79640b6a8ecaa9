"""Speech Commands v0.01 as the task of 12 classes: ten commands, unknown words and silence (SUPERB's "ks").

SOURCE is the unpacked speech_commands_v0.01.tar.gz: a folder of `.wav` files for each of 30 words,
`_background_noise_`, `validation_list.txt` and `testing_list.txt`. The lists give the splits validation and test; all
other clips are train. The classes are those of S3PRL and SUPERB, in their order:

- yes, no, up, down, left, right, on, off, stop, go: the recordings of these words;
- `_unknown_`: the recordings of all other words. They are more than half of the data. S3PRL draws each class equally
  often; `python -m training.class_weights` makes weights for that;
- `_silence_`: the recordings in `_background_noise_`, cut from the start into pieces of 1 s without overlap. A
  remainder shorter than 1 s is left out. Of each recording, the first 80 % of the pieces are train, the next 10 % are
  validation, and the last 10 % are test. (S3PRL uses the same whole recordings for training and validation, with a new
  random crop each time.)

SUPERB tests on another archive of 3081 clips, which include `_unknown_` and `_silence_`. `--test-set FOLDER` makes
this archive the split test; FOLDER is the unpacked speech_commands_test_set_v0.01.tar.gz. As in SUPERB, the clips of
testing_list.txt are then left out. The silence is then divided into 90 % train and 10 % validation.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import soundfile

from training.preparation.listing import Clip, Findings, Listing, PreparationError, sound_files
from training.preparation.speech_commands_v2 import CLASSES as WORDS
from training.preparation.speech_commands_v2 import NOISE_FOLDER, list_words

UNKNOWN, SILENCE = "_unknown_", "_silence_"
CLASSES = ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go", UNKNOWN, SILENCE]
OPTIONS: dict[str, dict[str, Any]] = {
    "test_set": {
        "type": Path,
        "metavar": "FOLDER",
        "help": "the unpacked speech_commands_test_set_v0.01.tar.gz, which replaces testing_list.txt",
    }
}


def list_clips(source: Path, test_set: Path | None = None) -> Listing:
    """List the clips of the task of 12 classes; the module describes the files and the options."""
    files, findings = sound_files(source), Findings()
    noise = [path for path in files if path.parent.name == NOISE_FOLDER]
    noise_paths = set(noise)
    clips = list_words(source, [path for path in files if path not in noise_paths])
    shares = {"train": 0.8, "validation": 0.1, "test": 0.1}
    if test_set is not None:
        tests = sound_files(test_set)
        if not tests:
            raise PreparationError(f"--test-set {test_set} has no sound files.")
        findings.add("replaced_clips", *(clip.id for clip in clips if clip.split == "test"))
        replaced = {clip.path for clip in clips if clip.split == "test"}
        files = [path for path in files if path not in replaced] + tests
        clips = [clip for clip in clips if clip.split != "test"]
        clips += [Clip(f"test/{path.parent.name}/{path.stem}", "test", path, (path.parent.name,)) for path in tests]
        shares = {"train": 0.9, "validation": 0.1}
    clips = [clip_of_task(clip) for clip in clips]
    for path in noise:
        clips += cut_silence(path, shares, findings)
    return Listing(source, clips, CLASSES, files, findings=findings)


def clip_of_task(clip: Clip) -> Clip:
    """Relabel a clip as `_unknown_` if its word is not one of the ten commands."""
    (label,) = clip.labels
    return replace(clip, labels=(UNKNOWN,)) if label in WORDS and label not in CLASSES else clip


def cut_silence(path: Path, shares: dict[str, float], findings: Findings) -> list[Clip]:
    """Cut a recording into pieces of 1 s, and assign consecutive pieces to the splits.

    Args:
        path: Recording of background noise.
        shares: Fraction of the pieces of each split, in order.
        findings: Receives an unreadable file.
    """
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError:
        findings.add("unreadable_files", str(path))
        return []
    number, rate = info.frames // info.samplerate, info.samplerate
    splits: list[str] = []
    total = 0.0
    for split, share in shares.items():
        total += share
        splits += [split] * (round(total * number) - len(splits))
    return [
        Clip(f"{SILENCE}/{path.stem}-{i:03d}", split, path, (SILENCE,), span=(i * rate, (i + 1) * rate))
        for i, split in enumerate(splits)
    ]

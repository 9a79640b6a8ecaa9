"""Speech Commands v0.01 as the task of 12 classes: ten commands, unknown words and silence (SUPERB's "ks").

As downloaded (speech_commands_v0.01.tar.gz): a folder of `.wav` for each of 30 words, `_background_noise_`,
`validation_list.txt` and `testing_list.txt`. The classes are those of S3PRL and SUPERB, in their order:

- yes, no, up, down, left, right, on, off, stop, go: the recordings of these words;
- `_unknown_`: all recordings of all other words, none left out. They are more than half of the data; S3PRL draws
  every class as often as any other, for which see `python -m training.class_weights`;
- `_silence_`: the recordings in `_background_noise_`, cut from their beginnings into pieces of 1 s that do not
  overlap; the rest of less than 1 s is left out. Of each recording the first 80 % of the pieces are in train, the next
  10 % in validation, the last in test. (S3PRL puts the same whole recordings in train and in validation, and crops
  each anew whenever it comes up.)

The lists give validation and test; the rest is train. SUPERB tests on another archive, of 3081 clips with `_unknown_`
and `_silence_` among them: with `--test-set FOLDER`, the unpacked speech_commands_test_set_v0.01.tar.gz, it is the
split test. The clips of testing_list.txt are then left out, as SUPERB does, and silence is shared out 90 % to train,
10 % to validation.
"""

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
        "help": "the unpacked speech_commands_test_set_v0.01.tar.gz, to test on in place of testing_list.txt",
    }
}


def list_clips(source: Path, test_set: Path | None = None) -> Listing:
    """See [`training.preparation.speech_commands_v1`]."""
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
    """The clip with its label among the twelve classes, if it is of the data set's words."""
    (label,) = clip.labels
    return Clip(clip.id, clip.split, clip.path, (UNKNOWN,)) if label in WORDS and label not in CLASSES else clip


def cut_silence(path: Path, shares: dict[str, float], findings: Findings) -> list[Clip]:
    """Pieces of 1 s of a recording, the first ones to the first of the splits, in proportion to their shares."""
    try:
        info = soundfile.info(str(path))
    except soundfile.LibsndfileError:
        findings.add("unreadable_files", str(path))
        return []
    number, rate = info.frames // info.samplerate, info.samplerate
    splits, total = [], 0.0
    for split, share in shares.items():
        total += share
        splits += [split] * (round(total * number) - len(splits))
    return [
        Clip(f"{SILENCE}/{path.stem}-{i:03d}", split, path, (SILENCE,), span=(i * rate, (i + 1) * rate))
        for i, split in enumerate(splits)
    ]

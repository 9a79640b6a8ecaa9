"""Speech Commands v0.02: 105 829 words of 1 s, 35 classes (Warden 2018, arXiv 1804.03209).

SOURCE is the unpacked speech_commands_v0.02.tar.gz: a folder of `.wav` files for each word, and `validation_list.txt`
and `testing_list.txt` with lines `word/speaker_nohash_0.wav`. Clips in neither list form the split train. The
recordings in `_background_noise_` are left out. Classes are in alphabetical order.
"""

from pathlib import Path

from training.preparation.listing import Clip, Findings, Listing, read_lines, sound_files

NOISE_FOLDER = "_background_noise_"
CLASSES = [
    "backward", "bed", "bird", "cat", "dog", "down", "eight", "five", "follow", "forward", "four", "go", "happy",
    "house", "learn", "left", "marvin", "nine", "no", "off", "on", "one", "right", "seven", "sheila", "six", "stop",
    "three", "tree", "two", "up", "visual", "wow", "yes", "zero",
]  # fmt: skip


def list_clips(source: Path) -> Listing:
    """List the clips of the task of 35 classes; the module describes the files."""
    files, findings = sound_files(source), Findings()
    noise = {path for path in files if path.parent.name == NOISE_FOLDER}
    findings.add("noise_files", *(path.name for path in sorted(noise)))
    files = [path for path in files if path not in noise]
    return Listing(source, list_words(source, files), CLASSES, files, findings=findings)


def list_words(source: Path, files: list[Path]) -> list[Clip]:
    """List the clips of validation_list.txt and testing_list.txt, then all other recordings as train.

    The label is the name of the folder.

    Args:
        source: Folder of the data set.
        files: Its sound files. Those directly in a folder of `source` are recordings of words.

    Raises:
        PreparationError: If a list cannot be read.
    """
    clips = []
    for split, name in (("validation", "validation_list.txt"), ("test", "testing_list.txt")):
        lines = filter(None, map(str.strip, read_lines(source / name)))
        clips += [_word(source, source / line, split) for line in lines]
    listed = {clip.path for clip in clips}
    in_folders = (path for path in files if path.parent.parent == source and path not in listed)
    return clips + [_word(source, path, "train") for path in in_folders]


def _word(source: Path, path: Path, split: str) -> Clip:
    return Clip(path.relative_to(source).with_suffix("").as_posix(), split, path, (path.parent.name,))

"""Search for sound files, and lists of their paths."""

import glob
import os
import sys
from collections.abc import Iterable
from typing import IO

import soundfile

from .errors import InferenceError

# What torchcodec and FFmpeg add to libsndfile's formats, and file names that its formats also go by.
OTHER_SUFFIXES = {"aac", "ac3", "aif", "aifc", "amr", "m4a", "m4b", "mka", "mkv", "mov", "mp4", "oga", "opus"}
OTHER_SUFFIXES |= {"snd", "weba", "webm", "wma", "wave"}
OTHER_SUFFIXES |= {"3g2", "3gp", "asf", "avi", "f4v", "flv", "m4v", "mpg", "mxf", "nut", "ogm", "wmv"}
# Headerless samples: nobody can say what rate and format they have.
UNREADABLE_SUFFIXES = {"raw"}


def audio_suffixes() -> set[str]:
    """File name suffixes, with their dot, that folders are searched for."""
    known = {name.lower() for name in soundfile.available_formats()} | OTHER_SUFFIXES
    return {f".{name}" for name in known - UNREADABLE_SUFFIXES}


AUDIO_SUFFIXES = frozenset(audio_suffixes())


def find_recordings(sources: Iterable[str]) -> list[str]:
    """Paths of the sound files that arguments mean, in the order of the arguments and sorted within each.

    Args:
        sources: Each a file (kept whether it is there or not: reading it will tell), a folder (searched through and
            through for [`audio_suffixes`], hidden files left out), a pattern with `*`, `?`, `[` or `**`, or `-`: paths
            on standard input, one a line or, as `find -print0` writes them, ended by NUL.

    Raises:
        InferenceError: If a folder, pattern or list has no sound file in it.
    """
    recordings: list[str] = []
    for source in sources:
        if source == "-":
            found = _read_list(sys.stdin)
        elif os.path.isdir(source):
            found = _search(source)
        elif glob.has_magic(source) and not os.path.exists(source):
            found = sorted(path for path in glob.glob(source, recursive=True) if os.path.isfile(path))
        else:
            found = [source]
        if not found:
            where = "standard input" if source == "-" else source
            raise InferenceError(
                f"{where}: no sound files there; folders are searched for {', '.join(sorted(audio_suffixes()))}."
            )
        recordings += found
    return recordings


def _read_list(file: IO[str]) -> list[str]:
    text = file.read()
    return [path for path in (text.split("\0") if "\0" in text else text.splitlines()) if path.strip()]


def _search(folder: str) -> list[str]:
    suffixes, found = audio_suffixes(), []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(parent, name)
            for name in sorted(names)
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes
        ]
    return found

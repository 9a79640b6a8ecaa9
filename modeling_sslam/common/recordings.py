"""Search for sound files, and lists of their paths."""

import glob
import os
import sys
from collections.abc import Iterable
from typing import IO

import soundfile

from .errors import InferenceError

# Formats that FFmpeg decodes and libsndfile does not, containers of video among them.
FFMPEG_SUFFIXES = {
    "3g2",
    "3gp",
    "aac",
    "ac3",
    "amr",
    "asf",
    "avi",
    "f4v",
    "flv",
    "m4a",
    "m4b",
    "m4v",
    "mka",
    "mkv",
    "mov",
}
FFMPEG_SUFFIXES |= {"mp4", "mpg", "mxf", "nut", "ogm", "opus", "weba", "webm", "wma", "wmv"}
# Other suffixes of libsndfile's formats than the formats' names.
ALTERNATIVE_SUFFIXES = {"aif", "aifc", "oga", "snd", "wave"}
# Headerless samples: their rate and sample format are unknown.
UNREADABLE_SUFFIXES = {"raw"}
LIBSNDFILE_SUFFIXES = {name.lower() for name in soundfile.available_formats()} - UNREADABLE_SUFFIXES
# File name suffixes, in lower case and with their dot, by which folders are searched for sound files.
AUDIO_SUFFIXES = frozenset(f".{name}" for name in LIBSNDFILE_SUFFIXES | ALTERNATIVE_SUFFIXES | FFMPEG_SUFFIXES)


def is_recording_name(name: str) -> bool:
    """Tell whether a file name has an audio suffix and is not hidden."""
    return os.path.splitext(name)[1].lower() in AUDIO_SUFFIXES and not name.startswith(".")


def display_name(path: str) -> str:
    """Return a path as it is printed and written to files.

    Bytes of a file name that are not UTF-8, which Python keeps as lone surrogates, appear as escapes such as
    `\\udce9`. No other output than a path's own bytes can hold them.
    """
    return path.encode("utf-8", "backslashreplace").decode("utf-8")


def find_recordings(sources: Iterable[str]) -> list[str]:
    """Find the sound files that command-line arguments name.

    Args:
        sources: Each a file (kept even if it does not exist, because reading it reports that), a folder (searched with
            its subfolders for [`AUDIO_SUFFIXES`], without hidden files and folders), a pattern with `*`, `?`, `[` or
            `**`, or `-`: paths on standard input, one a line or, as `find -print0` writes them, ended by NUL.

    Returns:
        Paths in the order of the arguments, sorted within each.

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
                f"{where}: no sound files there; folders are searched for {', '.join(sorted(AUDIO_SUFFIXES))}."
            )
        recordings += found
    return recordings


def _read_list(file: IO[str]) -> list[str]:
    text = file.read()
    return [path for path in (text.split("\0") if "\0" in text else text.splitlines()) if path.strip()]


def _search(folder: str) -> list[str]:
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(parent, name) for name in sorted(names) if is_recording_name(name)]
    return found

"""Search for sound files, and lists of their paths."""

import fnmatch
import glob
import io
import logging
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import soundfile

from .errors import InferenceError
from .text import escape_controls

logger = logging.getLogger(__name__)

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


def find_recordings(sources: Iterable[str]) -> list[str]:
    """Find the sound files that command-line arguments name.

    Args:
        sources: Each a file (kept even if it does not exist, because reading it reports that), a folder (searched by
            [`search_folder`]), a pattern with `*`, `?`, `[` or `**`, or `-`: paths on standard input, one a line or,
            as `find -print0` writes them, ended by NUL.

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
            found = search_folder(source)
        elif glob.has_magic(source) and not os.path.exists(source):
            found = _expand(source)
        else:
            found = [source]
        if not found:
            where = "standard input" if source == "-" else source
            raise InferenceError(
                f"{where}: no sound files there; folders are searched for {', '.join(sorted(AUDIO_SUFFIXES))}."
            )
        recordings += found
    return recordings


def search_folder(folder: str) -> list[str]:
    """Find the files of [`AUDIO_SUFFIXES`] in a folder and its subfolders, without hidden files and folders.

    Links to folders are followed, after everything else, unless they lead to a folder that was searched already.
    Pipes, sockets, devices and folders that may not be read are left out with a warning.

    Returns:
        Paths: first the folder's files, then the files of each subfolder, sorted by name.
    """
    return [e.path for e in _files(folder) if is_recording_name(e.name) and not _is_special(e)]


def _files(folder: str, with_hidden: bool = False) -> Iterator[os.DirEntry[str]]:
    """Yield the entries of a folder and its subfolders that are no folders; see [`search_folder`]."""
    searched: set[tuple[int, int]] = set()
    links = [folder]
    while links:
        folders = [links.pop(0)]
        while folders:
            folder = folders.pop()
            try:
                status = os.stat(folder)
                if (status.st_dev, status.st_ino) in searched:
                    continue
                searched.add((status.st_dev, status.st_ino))
                with os.scandir(folder) as scanned:
                    entries = [entry for entry in scanned if with_hidden or not entry.name.startswith(".")]
            except OSError as error:
                logger.warning("%s cannot be searched: %s", escape_controls(folder), error.strerror)
                continue
            subfolders = []
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir(follow_symlinks=False):
                    subfolders.append(entry.path)
                elif entry.is_dir():
                    links.append(entry.path)
                else:
                    yield entry
            folders += reversed(subfolders)


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Tell whether a name belongs to a pipe, socket or device, and log a warning if so."""
    try:
        mode = entry.stat().st_mode
    except OSError:  # a broken link, which reading reports
        return False
    is_special = not stat.S_ISREG(mode)
    if is_special:
        logger.warning("%s is left out: it is not a file but a pipe, socket or device", escape_controls(entry.path))
    return is_special


def _expand(pattern: str) -> list[str]:
    """Return the files that a pattern matches, sorted."""
    parts = pattern.split(os.sep)
    if "**" not in parts:
        return sorted(path for path in glob.glob(pattern) if os.path.isfile(path))
    # glob follows a link to one of its own parent folders again and again.
    first = parts.index("**")
    head, tail = os.sep.join(parts[:first]), parts[first:]
    folders = [folder for folder in glob.glob(head or os.curdir) if os.path.isdir(folder)]
    if not head:
        folders = [os.sep if pattern.startswith(os.sep) else os.curdir]
    with_hidden = any(part.startswith(".") for part in tail)
    found: set[str] = set()
    for folder in folders:
        for entry in _files(folder, with_hidden):
            path = os.path.relpath(entry.path, folder)
            if _matches(path.split(os.sep), tail) and entry.is_file():
                found.add(path if not head else os.path.join(folder, path))
    return sorted(found)


def _matches(names: Sequence[str], pattern: Sequence[str]) -> bool:
    """Tell whether the names on a path match a pattern, as glob does: `**` stands for any number of visible ones."""
    if not pattern:
        return not names
    if pattern[0] == "**":
        is_visible = bool(names) and not names[0].startswith(".")
        return _matches(names, pattern[1:]) or (
            is_visible and (_matches(names[1:], pattern) or len(pattern) == len(names) == 1)
        )
    return (
        bool(names)
        and (pattern[0].startswith(".") or not names[0].startswith("."))
        and fnmatch.fnmatch(names[0], pattern[0])
        and _matches(names[1:], pattern[1:])
    )


def _read_list(file: IO[str]) -> list[str]:
    if isinstance(file, io.TextIOWrapper):
        file.reconfigure(encoding="utf-8", errors="surrogateescape")  # names need not be UTF-8
    text = file.read().removeprefix("\ufeff")
    return [path for path in (text.split("\0") if "\0" in text else text.splitlines()) if path.strip()]

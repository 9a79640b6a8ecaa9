"""Search for sound files, and lists of their paths."""

import glob
import io
import logging
import os
import stat
import sys
from collections.abc import Iterable
from typing import IO

import soundfile

from .errors import InferenceError
from .names import display_name

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

    Links to folders are followed, after everything else, unless they lead to a folder that was searched already. Pipes,
    sockets, devices and folders that may not be read are left out with a warning.

    Returns:
        Paths: those in the folder, then those of each subfolder, sorted by name.
    """
    found: list[str] = []
    searched: set[tuple[int, int]] = set()
    links = [folder]
    while links:
        _search(links.pop(0), found, links, searched)
    return found


def _search(folder: str, found: list[str], links: list[str], searched: set[tuple[int, int]]) -> None:
    """Add the sound files of a folder that was not searched before to `found`, and its links to folders to `links`."""
    try:
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in searched:
            return
        searched.add((status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            visible = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda e: e.name)
    except OSError as error:
        logger.warning("%s cannot be searched: %s", display_name(folder), error.strerror)
        return
    folders = []
    for entry in visible:
        if entry.is_dir(follow_symlinks=False):
            folders.append(entry.path)
        elif entry.is_dir():
            links.append(entry.path)
        elif is_recording_name(entry.name) and not _is_special(entry):
            found.append(entry.path)
    for subfolder in folders:
        _search(subfolder, found, links, searched)


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Tell whether a name is that of a pipe, socket or device, and log a warning if it is."""
    try:
        mode = entry.stat().st_mode
    except OSError:  # a broken link, which reading reports
        return False
    is_special = not stat.S_ISREG(mode)
    if is_special:
        logger.warning("%s is left out: it is not a file but a pipe, socket or device", display_name(entry.path))
    return is_special


def _expand(pattern: str) -> list[str]:
    """Return the files that a pattern matches, sorted. A file that links make match twice counts once."""
    files: dict[str, str] = {}
    for path in sorted(glob.glob(pattern, recursive=True)):
        if os.path.isfile(path):
            folder, name = os.path.split(path)
            files.setdefault(os.path.join(os.path.realpath(folder), name), path)
    return list(files.values())


def _read_list(file: IO[str]) -> list[str]:
    if isinstance(file, io.TextIOWrapper):
        file.reconfigure(encoding="utf-8", errors="surrogateescape")  # names need not be UTF-8
    text = file.read().removeprefix("\ufeff")
    return [path for path in (text.split("\0") if "\0" in text else text.splitlines()) if path.strip()]

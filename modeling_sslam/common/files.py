"""Files and folders that appear under their name whole or not at all.

Writers fill a hidden path beside the target. [`publish`] forces the result to disk and renames it. At every moment,
also after a crash, the target is the old content or the new. There is one exception: where the system cannot exchange
two paths atomically, a target that a folder replaces has no name for a moment.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_PREFIX = ".tmp-"
# From Linux' fcntl.h (relative paths start at the working directory) and fs.h (the two paths trade places).
AT_FDCWD, RENAME_EXCHANGE = -100, 2


def temporary_path(target: Path) -> Path:
    """Return the hidden path beside `target` at which its next content is prepared. It keeps the suffix."""
    return target.with_name(f"{TEMPORARY_PREFIX}{target.name}")


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """Yield a hidden path beside `target` for a new file or folder, and publish what was written there.

    If the body raises, the hidden path is removed and `target` keeps its content.

    Raises:
        OSError: If the folder of `target` is missing or not writable.
    """
    target = Path(target)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        problem = "is not writable" if target.parent.is_dir() else "does not exist"
        raise OSError(f"{target} cannot be written: the folder {target.parent} {problem}.")
    temporary = temporary_path(target)
    remove(temporary)
    try:
        yield temporary
        publish(temporary, target)
    finally:
        remove(temporary)


def publish(temporary: Path, target: Path) -> None:
    """Force a file or folder to disk and give it the name `target`, replacing what has that name.

    Raises:
        OSError: If a file is to replace a folder, whose content would be lost, or if renaming fails.
    """
    for path in (temporary, *temporary.rglob("*")) if temporary.is_dir() else (temporary,):
        force_to_disk(path)
    if temporary.is_dir() and os.path.lexists(target):
        _replace_by_folder(temporary, target)
    elif target.is_dir() and not target.is_symlink():
        raise OSError(f"{target} is a folder and is not replaced by a file. Choose another name.")
    else:
        temporary.replace(target)
    force_to_disk(target.parent)


def write_text(path: Path, text: str) -> None:
    """Replace the content of a text file (UTF-8)."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def force_to_disk(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file or a folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _replace_by_folder(temporary: Path, target: Path) -> None:
    """Put a folder in the place of `target`, whose content stays at a hidden path until the new one is on disk."""
    if not _exchange(temporary, target):
        aside = temporary.with_name(f"{TEMPORARY_PREFIX}old-{target.name}")
        remove(aside)
        target.rename(aside)
        try:
            temporary.rename(target)
        except OSError:
            aside.rename(target)
            raise
        temporary = aside
    force_to_disk(target.parent)
    remove(temporary)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths trade places atomically. Return False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return renameat2 is not None and (
        renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0
    )

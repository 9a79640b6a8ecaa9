"""Files and folders that appear under their name whole or not at all.

Writers fill a hidden path beside the target. [`publish`] forces the result to disk and renames it. At every moment,
also after a crash, the target is the old content or the new. There is one exception: where the system cannot exchange
two paths atomically, a target that a folder replaces has no name for a moment. If a process is killed in this moment,
the next call puts the old content back.

[`replacing`] locks its target, so a second call at the same time is refused. [`temporary_path`] and [`publish`] take
no lock. Their callers must ensure that no other process writes the same target.
"""

import ctypes
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

# Prefixes of this program alone: any path that has one may be removed.
TEMPORARY_PREFIX = ".sslam-tmp-"
_OLD_PREFIX = ".sslam-old-"
_LOCK_PREFIX = ".sslam-lock-"
# From Linux' fcntl.h (relative paths start at the working directory) and fs.h (the two paths trade places).
AT_FDCWD, RENAME_EXCHANGE = -100, 2


class TargetInUseError(OSError):
    """Another call, in this process or in another, is writing the target."""


def temporary_path(target: Path) -> Path:
    """Return the hidden path beside `target` at which its next content is prepared. It keeps the suffix."""
    return target.with_name(f"{TEMPORARY_PREFIX}{target.name}")


@contextmanager
def replacing(target: str | Path) -> Iterator[Path]:
    """Yield a hidden path beside `target` for a new file or folder, and publish the result.

    Leftovers of killed calls are repaired or removed first. If the body raises, the hidden path is removed and
    `target` keeps its content.

    Raises:
        TargetInUseError: If another call is writing `target`.
        OSError: If the folder of `target` is missing or not writable.
    """
    target = Path(target)
    if not os.access(target.parent, os.W_OK | os.X_OK):
        problem = "is not writable" if target.parent.is_dir() else "does not exist"
        raise OSError(f"{target} cannot be written: the folder {target.parent} {problem}.")
    with _locked(target):
        temporary = temporary_path(target)
        _repair(target)
        remove(temporary)
        try:
            yield temporary
            publish(temporary, target)
        finally:
            remove(temporary)


def publish(temporary: Path, target: Path) -> None:
    """Force a file or folder to disk and give it the name `target`, replacing the old one.

    The files of a folder get the folder's permissions to read and write.

    Raises:
        OSError: If a file is to replace a folder, whose content would be lost, or if renaming fails.
    """
    if temporary.is_dir():
        # Some libraries create files that only their owner may read. A new folder's mode shows the umask.
        mode = temporary.stat().st_mode & 0o666
        for path in temporary.rglob("*"):
            if path.is_file() and not path.is_symlink():
                path.chmod(mode)
            force_to_disk(path)
    force_to_disk(temporary)
    _repair(target)
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


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Turn the errors with which torch and safetensors report a failed write into an OSError that names `path`."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise OSError(f"{path} could not be written; is the disk full? ({reason})") from error


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


def remove_leftovers(folder: Path) -> None:
    """Repair or remove leftovers of killed processes anywhere in a folder. Paths that are being written stay."""
    for prefix in (_OLD_PREFIX, TEMPORARY_PREFIX, _LOCK_PREFIX):
        for path in sorted(folder.rglob(f"{prefix}*")):
            target = path.with_name(path.name.removeprefix(prefix))
            # A path inside a leftover that is gone has no parent any more.
            with suppress(TargetInUseError, FileNotFoundError), _locked(target):
                _repair(target)
                remove(temporary_path(target))


def _old_path(target: Path) -> Path:
    return target.with_name(f"{_OLD_PREFIX}{target.name}")


def _repair(target: Path) -> None:
    """Put the old content back if a process was killed between two renames; otherwise remove it."""
    old = _old_path(target)
    if os.path.lexists(old) and not os.path.lexists(target):
        old.rename(target)
    remove(old)


def _replace_by_folder(temporary: Path, target: Path) -> None:
    """Replace `target` by a folder. The old content stays at a hidden path until the new one is on disk."""
    if not _exchange(temporary, target):
        old = _old_path(target)
        target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            old.rename(target)
            raise
        temporary = old
    force_to_disk(target.parent)
    remove(temporary)


def _exchange(one: Path, other: Path) -> bool:
    """Let two paths trade places atomically. Return False where the system or file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return renameat2 is not None and (
        renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) == 0
    )


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Hold the lock of a target. The system releases it if the process is killed.

    Raises:
        TargetInUseError: If another call holds it.
    """
    import fcntl  # not on Windows, where this module can be imported but cannot write

    path = target.with_name(f"{_LOCK_PREFIX}{target.name}")
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise TargetInUseError(f"{target} is being written by another call; wait until that has ended.") from error
        except OSError:
            pass  # The file system has no locks, so the call continues without one.
        # The previous holder may have removed the file after it was opened here. Then the file locks nothing.
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            break
        os.close(descriptor)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        # Processes forked in the meantime share the lock; closing alone would leave it to them.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)

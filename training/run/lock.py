"""A lock on the output folder of a program, so that two runs never write into one folder."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path

from accelerate.utils import broadcast_object_list

from training.run.config import TrainingError
from training.run.processes import join_processes

logger = logging.getLogger(__name__)

LOCK = ".run.lock"


class FolderInUseError(TrainingError):
    """Another program is writing into the folder. The message names it."""


@contextmanager
def locked_by_launch(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder for all processes of this launch. Call it in every process.

    Raises:
        TrainingError: If the folder cannot be made, or in all processes [`FolderInUseError`] if another launch holds
            the lock.
    """
    if not join_processes().is_main_process:
        (refusal,) = broadcast_object_list([None])
        if refusal is not None:
            raise refusal
        yield
        return
    lock = locked_folder(folder)
    try:
        lock.__enter__()
    except TrainingError as error:
        broadcast_object_list([error])
        raise
    broadcast_object_list([None])
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of an output folder, which is created if it is missing and removed if it stays empty.

    The system releases the lock when the process ends, even if it is killed; data workers do not inherit it. On a
    network disk it works between hosts if the file system forwards POSIX locks, as NFS and Lustre do by default.
    If the disk has no locks, the program logs a warning.

    Raises:
        FolderInUseError: If another process holds the lock.
        TrainingError: If the folder cannot be made or written to.
    """
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(folder)
    except OSError as error:
        raise TrainingError(f"output_dir={str(folder)!r} cannot be made or written to: {error}") from error
    try:
        yield
    finally:
        # The file is removed before the lock is released, because it may then belong to another process.
        (folder / LOCK).unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # the first folder that is not empty
            for path in missing:
                path.rmdir()


def _acquire(folder: Path) -> int:
    """Lock the file of a folder and write this process into it. Return its descriptor."""
    import fcntl  # not on Windows, where this module can be imported

    path = folder / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:  # POSIX allows either error
            holder = os.read(descriptor, 500).decode(errors="replace").strip() or "another process"
            os.close(descriptor)
            raise FolderInUseError(
                f"{folder} is in use by {holder}. Wait until that has ended, or choose another --output_dir."
            ) from error
        except OSError as error:
            logger.warning("%s is on a disk without locks (%s): start no second run in it.", folder, error)
        # The previous holder may have removed the file after this process opened it. Then it is no longer the lock.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                break
        os.close(descriptor)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    os.truncate(descriptor, 0)
    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {now}".encode())
    return descriptor

"""Puts results in their place whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import ConversionError


@contextmanager
def replacing(out: Path, overwrite: bool) -> Iterator[Path]:
    """Gives a path beside `out` to write a file or folder at, which takes the place of `out` when all went well. When
    not, it is removed, and `out` is as it was.

    Raises:
        ConversionError: If `out` is there and may not be overwritten, or is a folder with something else than a model.
    """
    out = out.resolve()
    occupied = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if occupied and not overwrite:
        raise ConversionError(f"{out} is there already; name another place, or replace it with --overwrite.")
    if occupied and out.is_dir() and not (out / "config.json").is_file():
        raise ConversionError(f"{out} is a folder, but not of a model; it is not overwritten. Name another place.")
    out.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    result, previous = workplace / out.name, workplace / "previous"
    try:
        yield result
        for path in (result, *result.rglob("*"), workplace):
            force_to_disk(path)
        if out.exists():
            out.rename(previous)
        try:
            result.rename(out)
        except OSError:
            if previous.exists():
                previous.rename(out)
            raise
        force_to_disk(out.parent)
    finally:
        shutil.rmtree(workplace)


def force_to_disk(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, would outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

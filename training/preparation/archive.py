"""Access to a data set as downloaded: a folder, or a zip or tar archive of a folder."""

import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.preparation.listing import PreparationError


@contextmanager
def unpacked(source: Path, workplace: Path) -> Iterator[Path]:
    """Yield the folder with the data. Outer folders that contain only one folder are skipped.

    Args:
        source: Folder or archive.
        workplace: Folder in which an archive is unpacked. The unpacked files are removed on exit.

    Raises:
        PreparationError: If `source` is neither a folder nor a zip or tar archive.
    """
    if source.is_dir():
        yield _innermost(source)
        return
    if not source.is_file() or not (zipfile.is_zipfile(source) or tarfile.is_tarfile(source)):
        raise PreparationError(f"{source} is neither a folder nor a zip or tar archive.")
    workplace.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{source.name}-", dir=workplace) as folder:
        print(f"Unpacking {source} ...", file=sys.stderr)
        if zipfile.is_zipfile(source):
            with zipfile.ZipFile(source) as zip_archive:
                zip_archive.extractall(folder)
        else:
            with tarfile.open(source) as tar_archive:
                tar_archive.extractall(folder, filter="data")
        yield _innermost(Path(folder))


def _innermost(folder: Path) -> Path:
    while True:
        entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
        if len(entries) != 1 or not entries[0].is_dir():
            return folder
        folder = entries[0]

"""Records of `.pt` files: torch's zip format, and the one before torch 1.6."""

import io
import math
import struct
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from .pickles import MAX_PROGRAM_BYTES, Machine, PickleError, Storage, TensorView

# Format before torch 1.6: five pickles (this number, the version, facts of the system, the content, the storages'
# keys), then each storage's size and numbers.
_MAGIC = 0x1950A86A20F9469CFC6C
_VERSION = 1001
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # a zip record's signature, lengths of name and extra field
# Tensors at multiples of this many bytes can be used without a copy.
_ALIGNMENT = 8
# Several names may share numbers, but not so many that a small file fills the memory.
_MOST_SHARING, _ALLOWANCE = 4, 1 << 20


@dataclass(frozen=True)
class TorchFile:
    """A `.pt` file.

    Attributes:
        path: The file.
        payload: Its content, as [`Machine`] returns it.
        places: First byte and number of bytes of each storage by key.
        byteorder: The byte order of the machine that wrote it, "little" or "big".
    """

    path: Path
    payload: Any
    places: dict[str, tuple[int, int]]
    byteorder: str = "little"

    def tensors(self, views: dict[str, TensorView]) -> dict[str, torch.Tensor]:
        """Return tensors in the mapped file.

        Raises:
            PickleError: If the file does not hold them, or if they claim far more memory than the file has.
        """
        file_size = self.path.stat().st_size
        claimed = sum(math.prod(view.shape) * view.storage.dtype.itemsize for view in views.values())
        if claimed > _MOST_SHARING * file_size + _ALLOWANCE:
            raise PickleError(f"its weights claim {claimed} bytes, but the file has {file_size}")
        mapped = torch.from_file(str(self.path), size=file_size, dtype=torch.uint8).untyped_storage()
        storages = {view.storage: self._storage(mapped, view.storage) for view in views.values()}
        return {
            name: torch.empty(0, dtype=view.storage.dtype).set_(
                storages[view.storage], view.offset, view.shape, view.strides
            )
            for name, view in views.items()
        }

    def _storage(self, mapped: torch.UntypedStorage, storage: Storage) -> torch.UntypedStorage:
        start, size = self.places.get(storage.key, (0, 0))
        first, end = (number * storage.dtype.itemsize for number in (storage.first, storage.first + storage.size))
        if end > size or start + end > mapped.nbytes():
            raise PickleError(f"its storage {storage.key[:100]} claims {end} bytes, but the file holds {size} of it")
        content = mapped[start + first : start + end]
        if (start + first) % _ALIGNMENT:
            content = content.clone()
        if self.byteorder != sys.byteorder:
            content = content.clone()
            content.byteswap(storage.dtype)
        return content


def read_torch_file(path: Path, is_zip: bool) -> TorchFile:
    """Read a `.pt` file without its tensors.

    Args:
        path: The file.
        is_zip: Whether it is in torch's zip format.

    Raises:
        PickleError: If it describes anything but plain data, or more than it can hold.
        ValueError, LookupError, zipfile.BadZipFile: If it is damaged.
    """
    return _read_zip(path) if is_zip else _read_legacy(path)


def _read_zip(path: Path) -> TorchFile:
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        records = {record.filename: record for record in archive.infolist()}
        _check_records(archive, path.stat().st_size)
        programs = [name for name in records if name.endswith("/data.pkl") and name.count("/") == 1]
        folder = programs[0].removesuffix("data.pkl") if programs else ""
        if len(programs) != 1 or f"{folder}constants.pkl" in records:
            raise ValueError("it is a zip file, but none that torch.save writes")
        program = programs[0]
        if records[program].file_size > MAX_PROGRAM_BYTES:
            raise PickleError(f"its {program} has {records[program].file_size} bytes, more than {MAX_PROGRAM_BYTES}")
        payload = Machine(io.BytesIO(_content(stream, records[program]))).run()
        byteorder = _content(stream, records[f"{folder}byteorder"]) if f"{folder}byteorder" in records else b"little"
        if byteorder not in (b"little", b"big"):
            raise ValueError("its record byteorder is neither little nor big")
        places = {
            name.removeprefix(f"{folder}data/"): (_first_byte(stream, record), record.file_size)
            for name, record in records.items()
            if name.startswith(f"{folder}data/")
        }
    return TorchFile(path, payload, places, byteorder.decode())


def _first_byte(stream: IO[bytes], record: zipfile.ZipInfo) -> int:
    """Return the position of a record's content in its file."""
    stream.seek(record.header_offset)
    _, name_length, extra_length = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    return record.header_offset + _LOCAL_HEADER.size + name_length + extra_length


def _content(stream: IO[bytes], record: zipfile.ZipInfo) -> bytes:
    stream.seek(_first_byte(stream, record))
    return stream.read(record.file_size)


def _check_records(archive: zipfile.ZipFile, file_size: int) -> None:
    """Check that the records of a zip file are as declared, and as torch.save writes them.

    Raises:
        PickleError: If a record is compressed, larger than the file, or there twice.
        ValueError: If a record's content does not have its checksum.
    """
    records = archive.infolist()
    for record in records:
        # torch never compresses. A compressed record could unpack to any size.
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise PickleError(f"its record {record.filename[:100]} is compressed")
    if (total := sum(record.file_size for record in records)) > file_size:
        raise PickleError(f"its records claim {total} bytes, but the file has {file_size}")
    if len({record.filename for record in records}) < len(records):
        raise PickleError("two of its records have the same name")
    # torch can be told to compute no checksums. It then writes zeros.
    if any(record.CRC for record in records) and (damaged := archive.testzip()) is not None:
        raise ValueError(f"its record {damaged[:100]} does not have the checksum that was stored with it")


def _read_legacy(path: Path) -> TorchFile:
    file_size = path.stat().st_size
    with path.open("rb") as stream:
        program = io.BytesIO(stream.read(MAX_PROGRAM_BYTES))
        machine = Machine(program)
        magic, version, _, payload, keys = (machine.run() for _ in range(5))
        if magic != _MAGIC or version != _VERSION:
            raise ValueError("it is a pickle, but none that torch.save writes")
        places = {}
        position = program.tell()
        for key in keys:
            stream.seek(position)
            (count,) = struct.unpack("<q", stream.read(8))
            size = count * machine.storages[key].dtype.itemsize
            places[key] = (position + 8, size)
            position += 8 + size
            if count < 0 or position > file_size:
                raise ValueError(f"its storage {key[:100]} ends beyond the file")
    return TorchFile(path, payload, places)

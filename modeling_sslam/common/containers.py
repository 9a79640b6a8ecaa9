"""Views of sound files whose headers mislead libsndfile.

libsndfile trusts the sizes in a file's header and reads only the first of several sounds. Through a file object it
counts positions from the wrong byte if a tag comes first. [`find_links`] divides a file into its sounds without the
leading tags. Each [`Link`] opens views of its bytes in which a wrong size is replaced.
"""

import io
import re
import struct
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

# Bytes to read at a sound's beginning, and at an Ogg stream's end to find its last page.
HEAD_BYTES, OGG_TAIL_BYTES = 4096, 1 << 17
SCAN_BYTES, BUFFER_BYTES = 1 << 20, 1 << 16
# A file whose chunks exceed this number is damaged.
MAX_CHUNKS = 10_000
# Programs that write to a pipe leave a size near the largest that the field holds. A size from
# these on (by the field's number of bytes) states nothing.
LARGEST_CLAIM = {4: 0x7FFF_0000, 8: 1 << 40}
# Samples that can follow the stated end of an intact MP3: the encoder's padding and a frame that only some count.
MP3_SLACK = 4095 + 1152
# A header of MPEG audio, of any layer. ADTS, which has the same sync word, has the layer 0.
MPEG_FRAME = re.compile(rb"\xff[\xe2-\xe7\xea-\xef\xf2-\xf7\xfa-\xff]")
# Bytes before the number of frames (4 bytes) in the first frame of an MP3. Xing's flags say that the number is there.
MP3_COUNT, MP3_TAG_BYTES = re.compile(rb"(?:Xing|Info)...[\x01\x03\x05\x07\x09\x0b\x0d\x0f]|VBRI.{10}", re.DOTALL), 64
MP3_LARGEST_COUNT = 1 << 30
# Apparent size of an MP3 without a count, whose length libsndfile derives from the file's size and first frame.
UNBOUNDED_BYTES = 1 << 40
OGG_FIRST_PAGE, OGG_PAGE_HEADER = re.compile(rb"OggS\0[\x02\x06]"), 27
OGG_LAST_PAGE_FLAG = 0x04
FLAC_START = re.compile(rb"fLaC[\x00\x80]\x00\x00\x22")
# Byte after the total number of samples, the low 36 bits of 8 bytes, in FLAC's STREAMINFO.
FLAC_TOTAL_END = 26
FLAC_TOTAL_MASK = (1 << 36) - 1
W64_RIFF = bytes.fromhex("726966662e91cf11a5d628db04c10000")
W64_DATA = bytes.fromhex("64617461f3acd3118cd100c04f8edb8a")


class ChunkLayout(NamedTuple):
    """Where the chunks of a container begin and how their headers look.

    Args:
        first: Position of the first chunk.
        header: Id and size of a chunk.
        alignment: Chunks begin at multiples of it.
        counts_header: Whether a chunk's size includes its header.
        data: Ids of the chunk that holds the samples.
    """

    first: int
    header: struct.Struct
    alignment: int
    counts_header: bool
    data: tuple[bytes, ...]


CHUNK_LAYOUTS = {
    b"RIFF": ChunkLayout(12, struct.Struct("<4sI"), 2, False, (b"data",)),
    b"RIFX": ChunkLayout(12, struct.Struct(">4sI"), 2, False, (b"data",)),
    b"FORM": ChunkLayout(12, struct.Struct(">4sI"), 2, False, (b"SSND", b"BODY")),
    b"caff": ChunkLayout(8, struct.Struct(">4sQ"), 1, False, (b"data",)),
    W64_RIFF[:4]: ChunkLayout(40, struct.Struct("<16sQ"), 8, True, (W64_DATA,)),
}


class DataSize(NamedTuple):
    """The field of a header that states how many bytes of samples there are.

    Args:
        position: Position of the field.
        field: The field.
        value: The number that it holds.
        start: Position from which the number counts.
        is_empty: Whether other chunks follow `start` at once, so that 0 means that there are no samples.
    """

    position: int
    field: struct.Struct
    value: int
    start: int
    is_empty: bool


class View(io.RawIOBase):
    """A part of a file, read-only, with some bytes replaced.

    Args:
        file: The file, which the view leaves open.
        start, end: The part.
        replaced: Bytes that take the place of others, by their position in the part.
        apparent_size: Size to report instead of the part's own. The last bytes of a larger size are zeros, because
            libsndfile looks for a tag there. The bytes in between are missing.
    """

    def __init__(
        self,
        file: BinaryIO,
        start: int,
        end: int,
        replaced: Mapping[int, bytes] | None = None,
        apparent_size: int | None = None,
    ) -> None:
        self._file, self._start, self._size = file, start, end - start
        self._replaced = replaced or {}
        self._apparent_size = self._size if apparent_size is None else apparent_size
        self._position = 0

    def readable(self) -> bool:
        """Return True: the view can be read."""
        return True

    def seekable(self) -> bool:
        """Return True: the view can seek."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position and return it."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._apparent_size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer and return the number of bytes."""
        target, position = memoryview(buffer).cast("B"), self._position
        if position >= max(self._size, self._apparent_size - HEAD_BYTES):
            data = bytes(max(0, min(len(target), self._apparent_size - position)))
        else:
            self._file.seek(self._start + position)
            data = self._file.read(max(0, min(len(target), self._size - position)))
        target[: len(data)] = data
        for place, replacement in self._replaced.items():
            first, last = max(place, position), min(place + len(replacement), position + len(data))
            if first < last:
                target[first - position : last - position] = replacement[first - place : last - place]
        self._position += len(data)
        return len(data)


class Link:
    """One sound of a file. Most files have one; files of the same format put one after the other are a chain.

    Args:
        file: The file.
        start, end: The sound's bytes.
    """

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._start, self._end = file, start, end
        self.head = _read_at(file, start, min(HEAD_BYTES, end - start))
        self._replaced: dict[int, bytes] = {}
        # Ratio of the bytes of samples that the header states to those that the file has.
        self.stated_share = 1.0
        data = self._data_size()
        if data is not None:
            self._mend(data)

    def open(self) -> BinaryIO:
        """Return a view whose header states no size beyond the end of the file."""
        return self._view(self._end, self._replaced)

    def open_unbounded(self) -> tuple[BinaryIO, int | None] | None:
        """Return a view that libsndfile reads to its end, whatever length the header states.

        Returns:
            The view and the number of samples that may follow the stated length without belonging to the sound, or
            `None` for that number if the header states no length. `None` alone if [`open`] returns such a view.
        """
        if FLAC_START.match(self.head):
            start = FLAC_TOTAL_END - 8
            field = int.from_bytes(self.head[start:FLAC_TOTAL_END], "big")
            return self._view(self._end, {start: (field & ~FLAC_TOTAL_MASK).to_bytes(8, "big")}), 0
        if not MPEG_FRAME.match(self.head):
            return None
        end = self._end - _trailing_tags(self._file, self._start, self._end)
        count = MP3_COUNT.search(self.head, 0, MP3_TAG_BYTES)
        if count is None:
            return self._view(end, {}, UNBOUNDED_BYTES), None
        return self._view(end, {count.end(): MP3_LARGEST_COUNT.to_bytes(4, "big")}), MP3_SLACK

    @property
    def lacks_its_end(self) -> bool:
        """Whether this is an Ogg stream without the mark of its last page."""
        if not self.head.startswith(b"OggS"):
            return False
        size = min(OGG_TAIL_BYTES, self._end - self._start)
        tail = _read_at(self._file, self._end - size, size)
        last = tail.rfind(b"OggS\0")
        return last < 0 or len(tail) < last + OGG_PAGE_HEADER or not tail[last + 5] & OGG_LAST_PAGE_FLAG

    def _view(self, end: int, replaced: Mapping[int, bytes], apparent_size: int | None = None) -> BinaryIO:
        return io.BufferedReader(View(self._file, self._start, end, replaced, apparent_size), BUFFER_BYTES)

    def _mend(self, data: DataSize) -> None:
        """Replace a size that is unknown, or larger than the file has bytes."""
        present = self._end - self._start - data.start
        largest = (1 << 8 * data.field.size) - 1
        is_unknown = data.value == 0 and not data.is_empty
        if present <= 0 or (data.value <= present and not is_unknown):
            return
        self._replaced = {data.position: data.field.pack(min(present, largest))}
        if not is_unknown and data.value < LARGEST_CLAIM[data.field.size]:
            self.stated_share = data.value / present

    def _data_size(self) -> DataSize | None:
        """Find the field that states the size of the samples."""
        magic = self.head[:4]
        if magic in (b".snd", b"dns.") and len(self.head) >= 12:
            field = struct.Struct(">I" if magic == b".snd" else "<I")
            (start,), (value,) = field.unpack_from(self.head, 4), field.unpack_from(self.head, 8)
            return DataSize(8, field, value, start, is_empty=False)
        if magic in (b"RF64", b"BW64") and self.head[12:16] == b"ds64" and len(self.head) >= 36:
            field = struct.Struct("<Q")
            chunks = self._chunks(CHUNK_LAYOUTS[b"RIFF"], 12)
            start = next((start for name, _, start in chunks if name == b"data"), None)
            (value,) = field.unpack_from(self.head, 28)
            return None if start is None else DataSize(28, field, value, start, is_empty=False)
        layout = CHUNK_LAYOUTS.get(magic)
        if layout is None or (magic == b"riff" and not self.head.startswith(W64_RIFF)):
            return None
        for name, size, start in self._chunks(layout, layout.first):
            if name in layout.data:
                field = struct.Struct(layout.header.format[0] + layout.header.format[-1])
                # The size counts from the chunk's beginning in W64.
                origin = start - layout.header.size * layout.counts_header
                return DataSize(start - field.size, field, size, origin, self._are_chunks(layout, start))
        return None

    def _chunks(self, layout: ChunkLayout, position: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield the id of each chunk, its size and the position of its content."""
        for _ in range(MAX_CHUNKS):
            header = _read_at(self._file, self._start + position, layout.header.size)
            if len(header) < layout.header.size or not header.strip(b"\0"):
                return
            name, size = layout.header.unpack(header)
            yield name, size, position + layout.header.size
            position += max(layout.header.size, size + layout.header.size * (not layout.counts_header))
            position += -position % layout.alignment
            if self._start + position > self._end:
                return

    def _are_chunks(self, layout: ChunkLayout, position: int) -> bool:
        """Tell whether the rest of the sound consists of chunks that end where it ends."""
        end = position
        for _, size, start in self._chunks(layout, position):
            end = start + size - layout.header.size * layout.counts_header
        return self._end - self._start - end in range(layout.alignment)


def find_links(file: BinaryIO) -> list[Link]:
    """Return the sounds of a file in their order, each without the tags before it."""
    size = file.seek(0, io.SEEK_END)
    start = _leading_tags(file, size)
    magic = _read_at(file, start, 4)
    starts = [start]
    if magic == b"OggS":
        starts = _ogg_starts(file, start)
    elif magic == b"fLaC":
        starts = list(_search(file, FLAC_START, 8, start)) or [start]
    return [Link(file, first, end) for first, end in zip(starts, [*starts[1:], size], strict=True)]


def _read_at(file: BinaryIO, position: int, size: int) -> bytes:
    file.seek(position)
    return file.read(max(0, size))


def _search(file: BinaryIO, pattern: re.Pattern[bytes], size: int, start: int) -> Iterator[int]:
    """Yield the positions of a pattern of `size` bytes, from `start` on."""
    kept = b""
    while new := _read_at(file, start + len(kept), SCAN_BYTES):
        data = kept + new
        for match in pattern.finditer(data):
            yield start + match.start()
        kept = data[-(size - 1) :]
        start += len(data) - len(kept)


def _ogg_starts(file: BinaryIO, start: int) -> list[int]:
    """Return where each link of an Ogg file begins. The streams of a link begin with pages that lie side by side."""
    starts, page_end = [], -1
    for place in _search(file, OGG_FIRST_PAGE, 6, start):
        if place != page_end:
            starts.append(place)
        header = _read_at(file, place, OGG_PAGE_HEADER + 255)
        num_segments = header[OGG_PAGE_HEADER - 1] if len(header) >= OGG_PAGE_HEADER else 0
        page_end = place + OGG_PAGE_HEADER + num_segments
        page_end += sum(header[OGG_PAGE_HEADER : OGG_PAGE_HEADER + num_segments])
    return [start, *(place for place in starts if place != start)]


def _leading_tags(file: BinaryIO, size: int) -> int:
    """Return the number of bytes of the ID3v2 and APEv2 tags that a file begins with."""
    position = 0
    while True:
        header = _read_at(file, position, 32)
        if header[:3] == b"ID3" and len(header) >= 10:
            length = 0
            for byte in header[6:10]:
                length = length << 7 | byte & 0x7F
            length += 20 if header[5] & 0x10 else 10  # with or without a footer
        elif header[:8] == b"APETAGEX" and len(header) == 32:
            length = 32 + int.from_bytes(header[12:16], "little")
        else:
            return position
        if position + length >= size:
            return position
        position += length


def _trailing_tags(file: BinaryIO, start: int, end: int) -> int:
    """Return the number of bytes of the ID3v1 and APEv2 tags that the part of a file ends with."""
    size = 0
    if _read_at(file, max(start, end - 128), 3) == b"TAG":
        size = 128
    footer = _read_at(file, max(start, end - size - 32), 32)
    if footer[:8] == b"APETAGEX":
        has_header = footer[23] & 0x80
        size += int.from_bytes(footer[12:16], "little") + (32 if has_header else 0)
    return min(size, end - start)

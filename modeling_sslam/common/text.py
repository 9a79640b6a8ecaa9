"""Text files of users, and text for outputs that cannot hold every character: escapes, and rows of CSV."""

import csv
import io
import re
from collections.abc import Iterable
from pathlib import Path

# Lone surrogates: Python's stand-ins for the bytes of a file name that are not UTF-8.
UNDECODABLE = r"\ud800-\udfff"
# Characters that a terminal obeys or that end a line, and marks that reverse the direction of text.
CONTROLS = r"\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069"
# Text that looks like an escape of one of these characters.
UNDECODABLE_ESCAPE = r"ud[89a-f][0-9a-f]{2}"
ANY_ESCAPE = r"[nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}"


def escape_undecodable(path: str) -> str:
    r"""Write the bytes of a path that are not UTF-8 as Python's escapes, such as `\udce9` for the byte 0xE9.

    Different paths stay different. A path that is UTF-8 stays the same, unless it holds such an escape already.
    """
    return _escape(path, UNDECODABLE, UNDECODABLE_ESCAPE)


def unescape_undecodable(name: str) -> str:
    """Return the path that [`escape_undecodable`] wrote as `name`."""

    def read(found: re.Match[str]) -> str:
        backslashes, code = found.groups()
        kept = backslashes[: len(backslashes) // 2]
        return kept + (chr(int(code[1:], 16)) if len(backslashes) % 2 else code)

    return re.sub(rf"(\\+)({UNDECODABLE_ESCAPE})", read, name)


def escape_controls(text: str) -> str:
    r"""Write control characters, line breaks and undecodable bytes as Python's escapes, such as `\n` and `\x1b`.

    Different texts stay different. A text without such characters stays the same, unless it holds an escape already.
    """
    return _escape(text, CONTROLS + UNDECODABLE, ANY_ESCAPE)


def escape_markdown(text: str) -> str:
    """Write text so that Markdown shows it as it is, on one line and also in the cell of a table."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", escape_controls(text))


def read_utf8(path: Path) -> str:
    """Read a text file, with or without a byte order mark. Line ends stay as they are.

    Raises:
        ValueError: If it is not UTF-8. The message names the line and the remedy.
    """
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{content[error.start]:02x} in line {line}. Save it as UTF-8, for "
            "example with `iconv -f LATIN1 -t UTF-8`."
        ) from error


def csv_row(cells: Iterable[object]) -> str:
    r"""Format a row of CSV (UTF-8) that ends with `\n`. Line breaks of any kind are quoted."""
    row = io.StringIO()
    # csv.writer quotes only the line breaks that its line terminator holds.
    csv.writer(row, lineterminator="\r\n").writerow(cells)
    return escape_undecodable(row.getvalue().removesuffix("\r\n")) + "\n"


def _escape(text: str, characters: str, escape: str) -> str:
    # Double the backslashes before such a character or before text like an escape, so that no two texts merge.
    text = re.sub(rf"\\(?=\\*(?:[{characters}]|{escape}))", r"\\\\", text)
    return re.sub(f"[{characters}]", lambda found: found[0].encode("unicode_escape").decode(), text)

"""Text from files and users on its way to a terminal."""

import unicodedata

# Marks that reorder the text after them, so that a line reads differently from what it holds.
_DIRECTION_MARKS = {0x061C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def terminal_text(text: object) -> str:
    r"""Return text on one line that a terminal prints and does not obey.

    Control characters (line breaks, escape sequences), marks of writing direction and bytes of undecodable file names
    become Python's escapes, such as `\n`, `\x1b` or `\udcff`. Other text stays as it is.
    """
    return "".join(_escaped(character) for character in str(text))


def _escaped(character: str) -> str:
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or ord(character) in _DIRECTION_MARKS:
        return character.encode("unicode_escape").decode("ascii")
    return character

"""A step of a study: one command, finished when its result exists."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Options of a program: a value, or a list of values, by the option's name.
Options = Mapping[str, object]


@dataclass(frozen=True)
class Step:
    """A command of a study.

    Attributes:
        program: Module of the program.
        arguments: Its arguments.
        result: What exists once the program has finished, and not before.
        scratch: Folder that nobody needs once all steps that name it have finished.
    """

    program: str
    arguments: tuple[str, ...]
    result: Path
    scratch: Path | None = None

    @property
    def is_finished(self) -> bool:
        """Whether the step needs no run."""
        return self.result.exists()


def words(options: Options) -> Iterator[str]:
    """Yield the words of a command line that sets options to values."""
    for name, value in options.items():
        yield f"--{name}"
        yield from map(str, value if isinstance(value, (list, tuple)) else [value])

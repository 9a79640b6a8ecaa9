from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest

from training.arguments import flatten, parse, settings, to_yaml, with_optional_fields


@dataclass
class Inner:
    rate: float = field(default=0.5, metadata={"help": "A rate of 5 %."})
    sizes: list[int] = field(default_factory=lambda: [1, 2])
    pair: tuple[float, float] = (0.9, 0.95)

    def __post_init__(self):
        if self.rate > 1:
            raise ValueError(f"rate={self.rate} is more than 1")


class Described:
    """Something.

    Args:
        width: How wide
            it is.
        depth: How deep.
    """

    width: int = 3
    depth: int | None = None


@dataclass
@with_optional_fields(Described)
class Change:
    """Changes to something."""


@dataclass
class Outer:
    output_dir: Path
    inner: Inner
    other: Inner = field(default_factory=lambda: Inner(rate=0.25))
    change: Change = field(default_factory=Change)
    name: str | None = None
    mode: Literal["no", "fp16"] | None = None
    count: int = 3
    is_on: bool = False


def refused(capsys, argv) -> str:
    with pytest.raises(SystemExit) as stop:
        parse(Outer, argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        path = tmp_path / "config.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_defaults_then_file_then_command_line(write):
    path = write("output_dir: runs/a\ncount: 7\ninner:\n  rate: 5e-4\n  sizes: [4]\nmode: no\n")
    config = parse(Outer, ["--config", path, "--inner.rate", "1e-3", "--other.pair=0.5,1", "--is_on", "true"])
    assert config.output_dir == Path("runs/a")
    assert config.count == 7
    assert config.inner == Inner(rate=1e-3, sizes=[4])
    assert config.other == Inner(rate=0.25, pair=(0.5, 1.0))
    assert config.mode == "no"
    assert config.is_on is True
    assert config.name is None


def test_a_configuration_survives_its_file(write):
    config = parse(Outer, ["--output_dir", "x", "--inner.rate", "1e-7", "--change.width", "9", "--name", "5"])
    assert parse(Outer, ["--config", write(to_yaml(config))]) == config
    assert flatten(config)["change.width"] == 9


def test_optional_settings_can_be_unset(write):
    path = write("output_dir: x\nname: y\nmode: fp16\n")
    config = parse(Outer, ["--config", path, "--name", "null", "--mode", "none"])
    assert (config.name, config.mode) == (None, None)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--inner.rat", "1"], ["'--inner.rat'", "'inner.rate'"]),
        (["--widht", "1"], ["'--widht'", "'change.width'"]),
        (["--zzz", "1"], ["'--zzz'", "--help"]),
        (["--count", "2.5"], ["--count", "int", "'2.5'"]),
        (["--count", "many"], ["--count", "int", "'many'"]),
        (["--is_on", "maybe"], ["--is_on", "bool", "'maybe'"]),
        (["--mode", "fp8"], ["--mode", "{no,fp16}", "'fp8'"]),
        (["--inner.pair", "1,2,3"], ["--inner.pair", "[float,float]"]),
        (["--inner.rate", "2"], ["inner", "rate=2.0 is more than 1"]),
        ([], ["output_dir is not set"]),
    ],
)
def test_errors_name_wrong_arguments(argv, words, capsys):
    given = [] if not argv else ["--output_dir", "x"]
    message = refused(capsys, given + argv)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("innr:\n  rate: 1\n", ["config.yaml", "'innr'"]),
        ("inner:\n  rte: 1\n", ["'inner.rte'", "'inner.rate'"]),
        ("inner: 3\n", ["'inner'", "keys and values"]),
        ("count: true\n", ["count", "int", "True"]),
        ("count: 3.5\n", ["count", "int", "3.5"]),
        ("name: [a]\n", ["name", "str"]),
        ("- a\n", ["the file"]),
        ("a: [\n", ["not YAML"]),
    ],
)
def test_errors_name_wrong_files(text, words, write, capsys):
    message = refused(capsys, ["--output_dir", "x", "--config", write(text)])
    assert all(word in message for word in words), message


def test_error_names_a_missing_file(capsys):
    assert "nowhere.yaml" in refused(capsys, ["--config", "nowhere.yaml"])


def test_help_lists_every_key(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Outer, ["--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in settings(Outer):
        assert f"--{setting.key} " in text
    assert "A rate of 5 %. [default: 0.25]" in text
    assert "How wide it is. [default: as it was, a new one 3]" in text
    assert "[required]" in text

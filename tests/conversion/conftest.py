"""Converted golden checkpoints, modified checkpoints, and the command line in this process."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from conversion.__main__ import main
from conversion.reader import Checkpoint, read_checkpoint


@dataclass(frozen=True)
class Outcome:
    """Exit status, lines on stdout and text on stderr of the command."""

    code: int
    lines: list[str]
    error: str


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`run(source, out, *options)` runs the command line and returns its outcome."""

    def command(*arguments: Any) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out.splitlines(), captured.err)

    return command


@pytest.fixture(scope="session")
def converted(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`converted(name, *options)` is the path of a converted golden checkpoint. Each is converted once a session."""
    results: dict[tuple[str, ...], Path] = {}

    def get(name: str, *options: str) -> Path:
        key = (name, *options)
        if key not in results:
            out = tmp_path_factory.mktemp("converted") / "out"
            assert main([str(golden_dir / name), str(out), "--quiet", *options]) == 0
            results[key] = out
        return results[key]

    return get


@pytest.fixture(scope="session")
def pretrained(golden_dir: Path) -> Checkpoint:
    return read_checkpoint(golden_dir / "sslam_pretrained.pt")


@pytest.fixture(scope="session")
def fine_tuned(golden_dir: Path) -> Checkpoint:
    return read_checkpoint(golden_dir / "sslam_finetuned.pt")


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """`save(checkpoint, tensors, settings)` writes a file in fairseq's layout with some tensors and settings replaced.

    None in place of a tensor leaves it out. Settings have dotted paths as keys.
    """

    def write(
        checkpoint: Checkpoint,
        tensors: dict[str, torch.Tensor | None] | None = None,
        settings: dict[str, Any] | None = None,
        name: str = "checkpoint.pt",
    ) -> Path:
        state = {key: tensor for key, tensor in (checkpoint.tensors | (tensors or {})).items() if tensor is not None}
        torch.save({"cfg": _replaced(checkpoint.settings, settings or {}), "model": state}, tmp_path / name)
        return tmp_path / name

    return write


def _replaced(settings: dict[str, Any], replacements: dict[str, Any]) -> dict[str, Any]:
    settings = dict(settings)
    for path, value in replacements.items():
        group, _, rest = path.partition(".")
        settings[group] = _replaced(settings[group], {rest: value}) if rest else value
    return settings

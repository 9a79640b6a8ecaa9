"""The commands, errors and Python of conversion/README.md agree with the program."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from conversion.__main__ import main

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
README = (ROOT / "conversion" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _clone(tmp_path, monkeypatch):
    """Work in an empty folder that has the repository's tests."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    monkeypatch.chdir(tmp_path)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_commands_run_as_printed(capsys, tmp_path):
    commands = [line for block in blocks("bash") for line in block.splitlines() if line and not line.startswith("#")]
    assert len(commands) >= 10
    assert all(line.startswith("python -m conversion ") for line in commands)
    assert main(shlex.split(commands[0])[3:]) == 0
    output = capsys.readouterr().out
    assert output.replace(str(tmp_path.resolve()), "...") in README
    for command in commands[1:]:
        assert main([*shlex.split(command)[3:], "--quiet"]) == 0, command


def test_python_runs_as_printed():
    (code,) = blocks("python")
    exec(code, {})
    assert Path("outputs/mean/model.safetensors").is_file()


class Hostile:
    def __reduce__(self):
        return __import__("os").system, ("touch marker",)


def test_errors_read_as_printed(run, save, golden_dir, pretrained):
    Path("cut.pt").write_bytes((golden_dir / "sslam_pretrained.pt").read_bytes()[:1_000_000])
    torch.save({"model": {}, "extra": Hostile()}, "hostile.pt")
    torch.save(torch.nn.Linear(2, 2).state_dict(), "other.pt")
    torch.save(pretrained.tensors, "bare.pt")
    nan = {"blocks.0.norm1.weight": torch.full((32,), torch.nan)}
    Path("home").mkdir()
    Path("home/thesis.txt").touch()
    run(golden_dir / "hub_pretrained", "outputs/classifier")
    requests = [
        ["hostile.pt", "out"],
        ["cut.pt", "out"],
        ["other.pt", "out"],
        [save(pretrained, {"blocks.1.norm1.bias": None}, name="missing.pt"), "out"],
        [save(pretrained, nan, name="nan.pt"), "out"],
        [save(pretrained, settings={"model.layer_norm_first": True}, name="other-settings.pt"), "out"],
        ["bare.pt", "out"],
        [golden_dir / "sslam_pretrained.pt", "out", "--head", "classification"],
        [golden_dir / "sslam_pretrained.pt", "out", "--to", "fairseq", "--head", "encoder"],
        [golden_dir / "hub_pretrained", "outputs/classifier"],
        [golden_dir / "hub_pretrained", "home", "--overwrite"],
    ]
    table = README.partition("## Errors")[2].partition("\n## ")[0]
    printed = re.findall(r"\| `(.*)` \|$", table, flags=re.MULTILINE)
    for request, expected in zip(requests, printed, strict=True):
        outcome = run(*request)
        assert outcome.code == 1
        # Three dots stand for the working directory, or for the rest of a long list.
        pattern = ".*".join(map(re.escape, expected.split("...")))
        assert re.fullmatch(f"error: {pattern}", outcome.error.strip()), outcome.error
    assert not Path("marker").exists()

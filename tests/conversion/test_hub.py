"""Download from the Hub and upload to it, against a local server for the parts of its protocol that are used."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(golden_dir: Path, serve_hub) -> Iterator:
    def files(folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (golden_dir / folder).iterdir()}

    repositories = {
        "them/fine-tuned": files("hub_finetuned")
        | {
            "modeling_eat.py": b"raise SystemExit('a stranger\\'s code ran')",
            "pytorch_model.bin": b"the same weights again",
            "checkpoint-10/model.safetensors": b"not these",
            "README.md": b"---\nlicense: mit\n---\n",
        },
        "them/fairseq": {"sslam.pt": (golden_dir / "sslam_pretrained.pt").read_bytes()},
        "them/code": {"README.md": b"# Nothing but code"},
    }
    with serve_hub(repositories) as hub:
        yield hub


@pytest.fixture
def command(hub, hub_environment, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess]:
    environment = hub_environment(hub, tmp_path / "home")

    def run(*arguments: object, **changes: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=Path(__file__).parents[2],
            env=environment | changes,
            capture_output=True,
            text=True,
        )

    return run


def test_download_and_upload(hub, command, converted, tmp_path):
    result = command(
        "-m",
        "conversion",
        "them/fine-tuned",
        tmp_path / "out",
        "--revision",
        "v1",
        "--push-to-hub",
        "me/copy",
        "--private",
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[0].startswith(f"them/fine-tuned (revision {COMMIT}): Hub (EATModel)")
    assert result.stdout.splitlines()[-1] == f"uploaded: {hub.address}/me/copy"

    fetched = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert fetched == {"config.json", "model.safetensors", "README.md"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        converted("hub_finetuned") / "model.safetensors"
    ).read_bytes()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: mit" in card
    assert f"them/fine-tuned (revision {COMMIT})" in card

    uploaded = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert hub.repositories["me/copy"] == uploaded
    assert hub.private == {"me/copy"}


SOURCES = {
    "them/fairseq": None,
    "them/nothing": "cannot be downloaded from the Hub",
    "them/fine-tuned --revision v9": "cannot be downloaded from the Hub",
    "them/code": "holds no weights",
}


def test_repositories_of_other_content(command, tmp_path):
    # One process for all repositories, because importing torch takes most of the time.
    lines = [[*line.split(), str(tmp_path / f"out{i}"), "--quiet"] for i, line in enumerate(SOURCES)]
    result = command("-c", f"from conversion.__main__ import main; print([main(line) for line in {lines}])")
    assert result.stdout == "[0, 1, 1, 1]\n", result.stderr
    assert [path.name for path in tmp_path.glob("out*")] == ["out0"]
    reasons = [reason for reason in SOURCES.values() if reason]
    for error, reason in zip(result.stderr.splitlines(), reasons, strict=True):
        assert error.startswith("error: ")
        assert reason in error


def test_refused_upload_keeps_the_folder(golden_dir, command, tmp_path):
    result = command(
        "-m",
        "conversion",
        golden_dir / "hub_pretrained",
        tmp_path / "out",
        "--push-to-hub",
        "me/copy",
        HF_TOKEN="hf_wrong",
    )
    assert result.returncode == 1
    assert "is written, but was not uploaded to me/copy" in result.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_unreachable_hub_is_an_error(command, tmp_path):
    result = command("-m", "conversion", "them/fine-tuned", tmp_path / "out", HF_ENDPOINT="http://127.0.0.1:9")
    assert result.returncode == 1
    assert "is not a local path and cannot be downloaded from the Hub" in result.stderr
    assert result.stderr.count("\n") == 1

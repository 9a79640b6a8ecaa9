"""Fixtures that all tests share, and the table of parity with the published code at the end of a run."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import transformers

from conversion.convert import convert
from modeling_sslam import SSLAMConfig
from modeling_sslam.inference import SSLAMTagger, stream_blocks


@pytest.fixture(scope="session")
def repository() -> Path:
    """Return the root folder of the repository."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def golden_dir(repository: Path) -> Path:
    """Return the folder of vectors and checkpoints from the published code; see its README."""
    return repository / "tests" / "fixtures" / "golden"


@pytest.fixture(scope="session")
def audio_dir(repository: Path) -> Path:
    """Return the folder of real recordings; see its README."""
    return repository / "tests" / "fixtures" / "audio"


@pytest.fixture(scope="session")
def make_config() -> Callable[..., SSLAMConfig]:
    """Return a function that makes the configuration of a model that runs in milliseconds."""

    def make(**overrides: Any) -> SSLAMConfig:
        tiny = {
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "intermediate_size": 64,
            "num_mel_bins": 32,
            "max_length": 64,
            "max_position_embeddings": 8,
            "initializer_range": 0.2,
            "num_clones": 2,
            "decoder_num_layers": 2,
        }
        return SSLAMConfig(**(tiny | overrides))

    return make


@pytest.fixture
def tiny_config(make_config: Callable[..., SSLAMConfig]) -> SSLAMConfig:
    """Return the configuration of a model that runs in milliseconds."""
    return make_config()


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Seed torch before every test."""
    torch.manual_seed(0)


@pytest.fixture
def parity(record_property: Callable[[str, object], None]) -> Callable[[str, float, float], None]:
    """Return a function that asserts `error <= tolerance` and lists both in the table of parity."""

    def check(name: str, error: float, tolerance: float) -> None:
        error = float(error)
        record_property("parity", (name, error, tolerance))
        assert error <= tolerance, f"{name}: error {error:.3g} exceeds {tolerance:.3g}"

    return check


@pytest.fixture(scope="session")
def model_folder(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a classifier of twelve classes, several a clip, on clips of 1024 frames."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    convert(golden_dir / "sslam_finetuned.pt", folder, report=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def tagger(model_folder: Path) -> SSLAMTagger:
    """Return a tagger with that classifier."""
    return SSLAMTagger.from_pretrained(model_folder, device="cpu")


@pytest.fixture
def write_sound(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes noise, or the given samples, to a sound file and returns its path."""

    def write(
        name: str,
        seconds: float = 1.0,
        rate: int = 16_000,
        channels: int = 1,
        samples: np.ndarray | torch.Tensor | None = None,
    ) -> Path:
        if samples is None:
            generator = np.random.default_rng(0)
            samples = 0.1 * generator.standard_normal((round(seconds * rate), channels)).astype(np.float32)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
        return path

    return write


@pytest.fixture
def recording(audio_dir: Path) -> torch.Tensor:
    """Return the five recordings joined, each followed by 0.4 s of silence: 10 s at 16 kHz."""
    parts = [torch.cat(list(stream_blocks(str(path), 16_000))) for path in sorted(audio_dir.glob("*.flac"))]
    return torch.cat([torch.cat((part, torch.zeros(6400))) for part in parts])


@pytest.fixture
def write_audio_parquet(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes sound files as parquet shards with the columns `id` and `audio`."""
    # Imported here, because an older transformers, with which most tests also run, has a Hub client that is too old
    # for datasets.
    import datasets

    from modeling_sslam.common.encoded_audio import EncodedAudio

    def write(paths: Iterable[str | Path], shards: int = 1, name: str = "dataset") -> Path:
        rows = [{"id": Path(p).name, "audio": {"bytes": Path(p).read_bytes(), "path": None}} for p in paths]
        features = datasets.Features({"id": datasets.Value("string"), "audio": EncodedAudio()})
        dataset = datasets.Dataset.from_list(rows, features=features)
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        for index in range(shards):
            shard = dataset.shard(shards, index, contiguous=True)
            shard.to_parquet(str(folder / f"train-{index:05d}-of-{shards:05d}.parquet"))
        return folder.parent

    return write


def pytest_configure() -> None:
    """Let torch use one thread: the models are tiny, and the test workers (-n) already share the cores."""
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    """Name the versions that the results depend on."""
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table of parity."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    rows = [
        value
        for report in reports
        if report.when == "call"
        for key, value in report.user_properties
        if key == "parity"
    ]
    if not rows:
        return
    width = max(len(name) for name, _, _ in rows)
    terminalreporter.section("Parity with the published code")
    terminalreporter.line(f"{'name':{width}}  max abs error  tolerance")
    for name, error, tolerance in sorted(map(tuple, rows)):
        terminalreporter.line(f"{name:{width}}  {error:13.2e}  {tolerance:9.1e}")

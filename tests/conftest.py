"""What every test package shares: fixtures' paths, a tiny model, and the table of parity with the published code."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import transformers

from conversion.convert import convert
from modeling_sslam import SSLAMConfig
from modeling_sslam.inference import SSLAMTagger, stream_blocks

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """Vectors and checkpoints from the published code; see its README."""
    return FIXTURES / "golden"


@pytest.fixture(scope="session")
def audio_dir() -> Path:
    """Real recordings; see its README."""
    return FIXTURES / "audio"


@pytest.fixture
def make_config() -> Callable[..., SSLAMConfig]:
    """Builds the configuration of a model that runs in milliseconds, with fields of one's choice."""

    def make(**overrides) -> SSLAMConfig:
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
    return make_config()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def parity(record_property: Callable[[str, object], None]) -> Callable[[str, float, float], None]:
    """`parity(name, error, tolerance)` asserts error <= tolerance and lists both in the summary."""

    def check(name: str, error: float, tolerance: float) -> None:
        error = float(error)
        record_property("parity", (name, error, tolerance))
        assert error <= tolerance, f"{name}: error {error:.3g} exceeds {tolerance:.3g}"

    return check


@pytest.fixture(scope="session")
def model_folder(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of twelve classes, several a clip, on clips of 1024 frames."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    convert(golden_dir / "sslam_finetuned.pt", folder, report=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def tagger(model_folder: Path) -> SSLAMTagger:
    return SSLAMTagger.from_pretrained(model_folder, device="cpu")


@pytest.fixture
def write_sound(tmp_path: Path) -> Callable[..., Path]:
    """Writes noise of so many seconds, or the samples given, as float samples; returns the path."""

    def write(name: str, seconds: float = 1.0, rate: int = 16_000, channels: int = 1, samples=None) -> Path:
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
    """The five recordings one after the other, with a breath between them: 10 s at 16 kHz."""
    parts = [torch.cat(list(stream_blocks(str(path), 16_000))) for path in sorted(audio_dir.glob("*.flac"))]
    return torch.cat([torch.cat((part, torch.zeros(6400))) for part in parts])


@pytest.fixture
def write_audio_parquet(tmp_path):
    """Sound files as a data set of parquet shards with the columns `id` and `audio`."""
    # Not at the top: the other tests also run beside an older transformers, whose hub client is too old for datasets.
    import datasets

    from modeling_sslam.common.encoded_audio import EncodedAudio

    def write(paths, shards=1, name="dataset"):
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
    # Tests use tiny models, whose tensors several threads share at a loss; workers (-n) run beside each other instead.
    torch.set_num_threads(1)


def pytest_report_header() -> str:
    return f"transformers {transformers.__version__}, torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
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

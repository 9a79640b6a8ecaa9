"""What every test package shares: fixtures' paths, a tiny model, and the table of parity with the published code."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

from modeling_sslam import SSLAMConfig

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

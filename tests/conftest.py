"""Fixtures that all tests share, and the table of parity with the published code at the end of a run."""

import base64
import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
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


@pytest.fixture
def _python_s_own_sigint() -> Iterator[None]:
    """Restore Python's handler, because a shell starts background processes with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


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
    """Return the folder of a classifier with twelve classes, several per clip, for clips of 1024 frames."""
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
    # Imported here, because most tests also run on an older transformers, whose Hub client is too old for datasets.
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


COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """Repositories by name, and the requests received."""

    repositories: dict[str, dict[str, bytes]]
    requests: list[str] = field(default_factory=list)
    private: set[str] = field(default_factory=set)
    address: str = ""


def _make_handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_) -> None:
            pass

        def answer(self, content: bytes, code: int = 200, **headers: str) -> None:
            self.send_response(code)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def answer_json(self, content, code: int = 200) -> None:
            self.answer(json.dumps(content).encode(), code, Content_Type="application/json")

        def not_found(self, what: str) -> None:
            self.answer(b"", 404, X_Error_Code=what, X_Error_Message=f"{what}: {self.path}")

        def do_GET(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            hub.requests.append(f"{self.command} {path}")
            if path.startswith("api/models/"):
                owner, name, *rest = path.removeprefix("api/models/").split("/")
                files = hub.repositories.get(f"{owner}/{name}")
                if files is None:
                    self.not_found("RepoNotFound")
                elif rest[:1] == ["tree"]:
                    self.answer_json([_tree_entry(name, content) for name, content in files.items()])
                elif rest[:1] in ([], ["revision"]) and rest[1:] in ([], ["main"], ["v1"], [COMMIT]):
                    siblings = [{"rfilename": file} for file in files]
                    self.answer_json({"id": f"{owner}/{name}", "sha": COMMIT, "siblings": siblings, "private": False})
                else:
                    self.not_found("RevisionNotFound")
                return
            owner, name, *where = path.split("/", 4)
            content = hub.repositories.get(f"{owner}/{name}", {}).get(where[-1]) if len(where) == 3 else None
            if content is None:
                self.not_found("EntryNotFound")
            else:
                self.answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET  # noqa: N815

        def do_POST(self) -> None:
            path = self.path.partition("?")[0].strip("/")
            hub.requests.append(f"POST {path}")
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers["Authorization"] != "Bearer hf_stand_in":
                self.answer(b"", 401, X_Error_Message="Invalid token")
            elif path == "api/repos/create":
                wish = json.loads(body)
                name = f"{wish['organization']}/{wish['name']}"
                hub.repositories.setdefault(name, {})
                if wish.get("private") or wish.get("visibility") == "private":
                    hub.private.add(name)
                self.answer_json({"url": f"{hub.address}/{name}", "name": name, "id": name})
            elif path == "api/validate-yaml":
                self.answer_json({"errors": [], "warnings": []})
            elif "/preupload/" in path:
                files = [file["path"] for file in json.loads(body)["files"]]
                answers = [
                    {"path": file, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for file in files
                ]
                self.answer_json({"files": answers})
            elif "/commit/" in path:
                owner, name = path.removeprefix("api/models/").split("/")[:2]
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        content = base64.b64decode(line["value"]["content"])
                        hub.repositories[f"{owner}/{name}"][line["value"]["path"]] = content
                self.answer_json({"commitUrl": f"{hub.address}/{owner}/{name}/commit/{COMMIT}", "commitOid": COMMIT})
            else:
                self.not_found("Unknown")

    return Handler


def _tree_entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


@pytest.fixture(scope="session")
def serve_hub() -> Callable[[dict[str, dict[str, bytes]]], AbstractContextManager[Hub]]:
    """Return a function that serves repositories as the Hub does, on this machine."""

    @contextmanager
    def serve(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
        hub = Hub(repositories)
        server = ThreadingHTTPServer(("127.0.0.1", 0), _make_handler(hub))
        hub.address = f"http://127.0.0.1:{server.server_port}"
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield hub
        server.shutdown()
        thread.join()
        server.server_close()

    return serve


@pytest.fixture(scope="session")
def hub_environment() -> Callable[[Hub, Path], dict[str, str]]:
    """Return a function that makes the environment of a process that takes a stand-in for the Hub."""

    def environment(hub: Hub, home: Path) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        return inherited | {
            "HF_ENDPOINT": hub.address,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_TOKEN": "hf_stand_in",
            "NO_PROXY": "127.0.0.1",
        }

    return environment


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

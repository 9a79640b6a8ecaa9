"""Streaming from an HTTP server on loopback that drops connections, answers 500 and 429, and stalls."""

import io
import itertools
import random
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import pytest
import torch

from training.data import stream
from training.data.config import DataConfig
from training.data.loader import make_loader
from training.data.sources import open_source

pytestmark = pytest.mark.slow

# Seconds after which a stalled answer counts as lost. A good one must arrive within it on a busy machine.
READ_TIMEOUT = 1.0
COLUMNS = (("bytes", "binary"), ("path", "string"))


class FaultyServer(ThreadingHTTPServer):
    """A server of a folder's files, with byte ranges. It answers a fraction of the requests with one of its faults."""

    daemon_threads = True

    def __init__(self, folder, fault_rate=0.0, faults=("drop", "500", "429", "stall")):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fault_rate = fault_rate
        self.faults = itertools.cycle(faults)
        self.random = random.Random(0)
        self.lock = threading.Lock()
        self.served = Counter()
        self.stall_seconds = 2 * READ_TIMEOUT

    def url(self, name):
        return f"http://127.0.0.1:{self.server_port}/{name}"

    def draw(self):
        with self.lock:
            fault = next(self.faults) if self.random.random() < self.fault_rate else "good"
            self.served[fault] += 1
            return fault

    def handle_error(self, request, client_address):
        """Ignore errors: the client closes the connection of a stalled answer."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = self.server.folder / self.path.strip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        fault = self.server.draw()
        if fault in ("500", "429"):
            self.send_response(int(fault))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, total = path.read_bytes(), path.stat().st_size
        requested = self.headers.get("Range")
        if requested:
            first, last = requested.removeprefix("bytes=").split("-")
            first, last = int(first), min(int(last or total - 1), total - 1)
            data = data[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{total}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if not with_body:
            return
        if fault == "good":
            self.wfile.write(data)
            return
        self.wfile.write(data[: len(data) // 2])
        self.wfile.flush()
        if fault == "stall":
            time.sleep(self.server.stall_seconds)
        self.close_connection = True


@pytest.fixture
def serve(tmp_path):
    servers = []

    def serve(folder, **kwargs):
        server = FaultyServer(folder, **kwargs)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return server

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hurried(monkeypatch):
    """Make waits between retries fewer and shorter, both in `datasets` and in our own code."""
    monkeypatch.setattr(datasets.config, "STREAMING_READ_MAX_RETRIES", 2)
    monkeypatch.setattr(datasets.config, "STREAMING_READ_RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_MAX_RETRIES", 2)
    monkeypatch.setattr(datasets.config, "STREAMING_OPEN_RETRY_INTERVAL", 0.01)
    monkeypatch.setattr(stream, "FIRST_RETRY_SECONDS", 0.01)


def config_for(server, paths, num_workers, **kwargs):
    urls = [server.url(path.name) for path in paths]
    return DataConfig(
        "parquet",
        data_files=urls,
        num_workers=num_workers,
        shuffle_buffer=8,
        read_timeout=READ_TIMEOUT,
        max_retries=12,
        **kwargs,
    )


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_connection_loses_and_repeats_no_clip(tmp_path, write_parquet, extractor, serve, hurried, num_workers):
    paths = write_parquet(tmp_path / "data", [12, 9, 15], row_group_size=3)
    local = DataConfig("parquet", data_files=[str(p) for p in paths], num_workers=num_workers, shuffle_buffer=8)
    expected = list(itertools.islice(make_loader(open_source(local), extractor, batch_size=4, seed=0), 45))

    server = serve(tmp_path / "data")
    loader = make_loader(open_source(config_for(server, paths, num_workers)), extractor, batch_size=4, seed=0)
    server.fault_rate = 0.35
    batches = list(itertools.islice(loader, 45))
    print(dict(server.served))
    assert [batch["ids"] for batch in batches] == [batch["ids"] for batch in expected]
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch["input_values"], other["input_values"])
    assert all(server.served[fault] > 1 for fault in ("drop", "500", "429", "stall"))
    assert not loader.skipped


def test_resume_in_the_middle_of_a_bad_connection(tmp_path, write_parquet, extractor, serve, hurried):
    paths = write_parquet(tmp_path / "data", [12, 9], row_group_size=3)
    server = serve(tmp_path / "data")
    config = config_for(server, paths, 2)
    loader = make_loader(open_source(config), extractor, batch_size=3, seed=0)
    expected, states = [], []
    for batch in itertools.islice(loader, 10):
        expected.append(batch)
        states.append(loader.state_dict())
    resumed = make_loader(open_source(config), extractor, batch_size=3, seed=0)
    server.fault_rate = 0.35
    resumed.load_state_dict(states[3])
    assert [batch["ids"] for batch in itertools.islice(resumed, 6)] == [batch["ids"] for batch in expected[4:]]


def test_a_server_that_stays_down_stops_the_run_with_its_error(
    tmp_path, write_parquet, extractor, serve, hurried, caplog
):
    paths = write_parquet(tmp_path / "data", [6])
    server = serve(tmp_path / "data", faults=("500",))
    config = config_for(server, paths, 0)
    config.max_retries = 2
    loader = make_loader(open_source(config), extractor, batch_size=4, seed=0)
    server.fault_rate = 1.0
    with pytest.raises(FileNotFoundError, match=paths[0].name) as caught:
        list(itertools.islice(loader, 3))
    assert caught.value.__cause__.status == 500
    assert caplog.text.count("ClientResponseError: 500") == 2


def test_clips_that_are_files_on_a_server(tmp_path, make_folder, extractor, serve, hurried):
    """A dataset may hold only URLs. A missing file is skipped; a failing one is tried again."""
    folder = make_folder(6)
    server = serve(folder, fault_rate=0.35)
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.flac"))]
    rows = [{"id": name, "audio": {"bytes": None, "path": server.url(name)}} for name in [*names, "gone.flac"]]
    features = datasets.Features({"id": datasets.Value("string"), "audio": {n: datasets.Value(t) for n, t in COLUMNS}})
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    config = DataConfig(
        str(tmp_path / "saved"), num_workers=0, shuffle_buffer=8, read_timeout=READ_TIMEOUT, max_retries=12
    )
    loader = make_loader(open_source(config), extractor, batch_size=4, seed=0, repeat=False)
    assert sorted(itertools.chain(*(batch["ids"] for batch in loader))) == names
    assert loader.skipped == {"missing": 1}
    assert server.served["500"] + server.served["drop"] > 1


def test_webdataset_over_http(tmp_path, encode, extractor, serve, hurried):
    """A tar is read sequentially, so a dropped connection must not look like its end."""
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "train-0.tar", "w") as archive:
        for i in range(40):
            member, data = tarfile.TarInfo(f"clip{i:03d}.flac"), encode(i)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))

    def ids(url, fault_rate=0.0):
        config = DataConfig(
            "webdataset", data_files=[url], num_workers=0, shuffle_buffer=8, read_timeout=READ_TIMEOUT, max_retries=20
        )
        loader = make_loader(open_source(config), extractor, batch_size=4, seed=0)
        server.fault_rate = fault_rate
        return [batch["ids"] for batch in itertools.islice(loader, 80)]

    server = serve(tmp_path / "tars", faults=("drop", "stall"))
    expected = ids(str(tmp_path / "tars" / "train-0.tar"))
    assert ids(server.url("train-0.tar"), fault_rate=0.5) == expected
    print(dict(server.served))
    assert server.served["drop"] > 1
    assert server.served["stall"] > 1

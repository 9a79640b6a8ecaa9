import io
import os
import socket
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState, GradientState

from modeling_sslam import SSLAMFeatureExtractor

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _one_thread():
    """Limit torch to one thread. On a busy machine several threads mostly wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _no_process_state():
    """Reset accelerate, which keeps the device and precision of the first program in a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def extractor():
    return SSLAMFeatureExtractor(max_length=32)


@pytest.fixture(scope="session")
def encode():
    """A function that returns encoded noise."""

    def encode(seed=0, seconds=0.3, rate=16_000, channels=1, file_format="FLAC", subtype=None):
        samples = 0.1 * np.random.default_rng(seed).standard_normal((round(seconds * rate), channels))
        file = io.BytesIO()
        soundfile.write(file, samples.clip(-1, 1), rate, format=file_format, subtype=subtype)
        return file.getvalue()

    return encode


@pytest.fixture(scope="session")
def write_parquet(encode):
    """A function that writes parquet shards with the columns of AudioSet. Clips are numbered over all shards."""

    def write_parquet(folder, sizes, row_group_size=4, seconds=0.3, typed=True):
        folder.mkdir(parents=True, exist_ok=True)
        features = datasets.Features(
            {
                "video_id": datasets.Value("string"),
                "audio": datasets.Audio(),
                "labels": datasets.List(datasets.Value("string")),
                "human_labels": datasets.List(datasets.Value("string")),
            }
        )
        schema = features.arrow_schema if typed else pa.schema(list(features.arrow_schema))
        first, paths = 0, []
        for shard, size in enumerate(sizes):
            rows = [
                {
                    "video_id": f"clip{i:03d}",
                    "audio": {"bytes": encode(i, seconds), "path": f"clip{i:03d}.flac"},
                    "labels": [f"/m/{i % 3}"],
                    "human_labels": [f"class {i % 3}"],
                }
                for i in range(first, first + size)
            ]
            first += size
            path = folder / f"train-{shard:05d}-of-{len(sizes):05d}.parquet"
            pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=row_group_size)
            paths.append(path)
        return paths

    return write_parquet


@pytest.fixture
def make_folder(tmp_path, encode):
    """A function that makes a folder with a number of sound files, every second one in another subfolder."""

    def make_folder(count, name="clips", seconds=0.3, first="."):
        folder = tmp_path / name
        (folder / first).mkdir(parents=True)
        (folder / "deeper").mkdir()
        for i in range(count):
            (folder / ("deeper" if i % 2 else first) / f"clip{i:03d}.flac").write_bytes(encode(i, seconds))
        return folder

    return make_folder


@pytest.fixture(scope="session")
def write_sounds():
    """A function that writes a folder of classes. A class is a tone with zeros around it; two files share a take."""

    def write_sounds(folder, classes=("high", "low", "middle"), count=8, rate=16_000):
        pitches = {"low": 500, "middle": 1500, "high": 4000}
        for label in classes:
            (folder / label).mkdir(parents=True)
            for i in range(count):
                tone = np.sin(2 * np.pi * pitches[label] * (1 + 0.01 * i) / rate * np.arange(round(0.4 * rate)))
                padded = np.concatenate([np.zeros(1600), 0.5 * tone, np.zeros(3200)])
                soundfile.write(folder / label / f"take{i // 2}-{i % 2}.flac", padded, rate)
        return folder

    return write_sounds


@pytest.fixture
def launch():
    """A function that runs a program in two processes and returns its output."""

    def launch(*arguments) -> str:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        options = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
        # Without MPI `accelerate launch --cpu --num_processes 2` starts one process.
        command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", str(port)]
        environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [*command, *options, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return launch

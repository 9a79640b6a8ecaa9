"""Loading of a model to the device, and the data loader against what the steps consume."""

import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from benchmarks.data import BATCH_SIZE, own_loader, write_clips
from benchmarks.gpu.bench import Bench, Figure, Sizes, Stage
from benchmarks.measurement import Measurement, ratio, synchronize
from benchmarks.report import Row, base_config
from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification

FRONT_ENDS = {"worker": "filter bank in the workers", "device": "filter bank on the device"}
# The loader is repeated without end; shards hold this many clips for each worker.
CLIPS_PER_SHARD = 2 * BATCH_SIZE
# Batches of each worker before the measured rounds: those that it has prepared while it started.
WARMUP_BATCHES_PER_WORKER = 3


def model_stage(sizes: Sizes, where: str) -> Stage:
    row = Row("load classifier base to the device", where, "of reading the file", None)
    return Stage("loading", {"load": row}, measure_model)


def measure_model(bench: Bench) -> Iterator[Figure]:
    with tempfile.TemporaryDirectory() as folder:
        SSLAMForAudioClassification(base_config(bench.sizes.layers)).save_pretrained(folder)
        seconds = bench.time(
            {
                "read": (Path(folder) / "model.safetensors").read_bytes,
                "load": lambda: SSLAMForAudioClassification.from_pretrained(folder).to(bench.device),
            }
        )
    yield Figure("load", ratio(seconds["load"], seconds["read"]), f"{1000 * seconds['load'].median:.3g} ms")


def num_workers(sizes: Sizes) -> int:
    return min(sizes.workers, len(os.sched_getaffinity(0)))


def data_stage(sizes: Sizes, where: str) -> Stage:
    what = f"FLAC shards to batches, {num_workers(sizes)} workers"
    rows = {}
    for front_end, name in FRONT_ENDS.items():
        rows[front_end] = Row(f"{what}, {name}", where, "clips/s", None)
    rows["fed"] = Row(
        f"{what}, beside the fastest eager step of stage 2", where, "times the clips/s of the step", None
    )
    return Stage("data", rows, measure_data)


def measure_data(bench: Bench) -> Iterator[Figure]:
    workers = num_workers(bench.sizes)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder, workers * CLIPS_PER_SHARD, num_shards=workers)
        for front_end in FRONT_ENDS:
            rate = loader_rate(bench, folder, workers, front_end)
            bench.clips_per_second = max(rate.median, bench.clips_per_second or 0.0)
            yield Figure(front_end, rate)
    if "sslam" in bench.step_seconds:
        yield from bench.fed("fed", bench.step_seconds["sslam"])


def loader_rate(bench: Bench, folder: Path, workers: int, front_end: str) -> Measurement:
    """Measure the clips/s of a loader that gives batches without end, on the device."""
    loader = own_loader(folder, SSLAMFeatureExtractor(), workers, front_end, endless=True)
    batches = map(partial(loader.input_values, device=bench.device), loader)
    for _ in islice(batches, WARMUP_BATCHES_PER_WORKER * workers):
        pass
    rates = []
    for _ in range(bench.sizes.rounds):
        start = time.perf_counter()
        count = sum(len(batch) for batch in islice(batches, bench.sizes.batches_per_worker * workers))
        synchronize(bench.device)
        rates.append(count / (time.perf_counter() - start))
    return Measurement.of(rates)

"""Loading of a model to the device, and the data loader against what the steps consume."""

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from benchmarks.data import own_loader, time_steps, write_clips
from benchmarks.gpu.bench import Bench, Figure, Sizes, Stage
from benchmarks.measurement import Measurement, ratio, synchronize
from benchmarks.report import Row, base_config
from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification
from training.data.loader import AudioLoader

FRONT_ENDS = {"worker": "filter bank in the workers", "device": "filter bank on the device"}
BATCHES_PER_SHARD = 2
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


def data_stage(sizes: Sizes, where: str) -> Stage:
    what = f"FLAC shards to batches, {sizes.workers} workers"
    rows = {}
    for front_end, name in FRONT_ENDS.items():
        rows[front_end] = Row(f"{what}, {name}", where, "clips/s", None)
    rows["fed"] = Row(f"{what}, fastest eager step of stage 2", where, "loader's clips/s, times the step's", None)
    return Stage("data", rows, measure_data)


def measure_data(bench: Bench) -> Iterator[Figure]:
    sizes = bench.sizes
    shards(bench).mkdir()
    write_clips(shards(bench), sizes.workers * sizes.batch * BATCHES_PER_SHARD, num_shards=sizes.workers)
    for front_end in FRONT_ENDS:
        rate = loader_rate(bench, front_end)
        bench.clips_per_second = max(rate.median, bench.clips_per_second or 0.0)
        yield Figure(front_end, rate)
    if "sslam" in bench.step_seconds:
        yield from bench.fed("fed", bench.step_seconds["sslam"])


def shards(bench: Bench) -> Path:
    """Return the dataset folder that the stage "data" writes."""
    return bench.scratch / "clips"


def endless_loader(bench: Bench, front_end: str) -> AudioLoader:
    """Make a loader of the step's batches that does not end."""
    sizes, extractor = bench.sizes, SSLAMFeatureExtractor(max_length=bench.sizes.frames)
    return own_loader(shards(bench), extractor, sizes.workers, front_end, endless=True, batch_size=sizes.batch)


def loader_rate(bench: Bench, front_end: str) -> Measurement:
    """Measure the clips/s of a loader, with its batches on the device."""
    loader, workers = endless_loader(bench, front_end), bench.sizes.workers
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


def share_of_ready_batch(bench: Bench, step: Callable[[torch.Tensor], None]) -> Measurement:
    """Measure the steps/s on batches from the loader over those on one ready batch."""
    loader, sizes = endless_loader(bench, "worker"), bench.sizes
    seconds = time_steps(step, loader, sizes.workers, sizes.steps, sizes.rounds, bench.device)
    return ratio(seconds["ready batch"], seconds["loader"])

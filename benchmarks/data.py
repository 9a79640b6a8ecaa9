"""Speed of the data pipeline from FLAC in Parquet shards to batches on the device, with and without a training step.

    python -m benchmarks.data [--rounds 5] [--workers N] [--clips-per-worker 128]

The shards resemble those of agkphysics/AudioSet: 10 s of FLAC at 48 kHz and 24 bits, as its card says. They are
stereo, because a clip there takes 1.39 MB, and one channel without compression would take 1.44 MB. Each clip mixes two
soundscapes into two channels. Some clips occur several times under different names.

A pass makes a loader, starts its workers and reads all clips once. Its processor time covers this process and the
workers, including their start. "clips/s per core" divides the clips by this time, so other programs on the machine
hardly affect it. The rival is a plain pipeline with the same number of workers: torch's DataLoader over clips in
memory. It processes each clip by itself, with soundfile.read, torchaudio's resample and kaldi.fbank, padding and
normalisation.

Each stage is also timed alone, over the same clips, in this process on one thread. "The rest" is the time of a pass
without workers that is not spent in any stage: collating, checking, shuffling.

`python -m benchmarks gpu` measures the pipeline beside the steps that it feeds.
"""

import io
import math
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq
import soundfile
import torch
import torchaudio
from torch.utils.data import DataLoader, Dataset

from benchmarks.front_end import published
from benchmarks.measurement import Measurement, ratio, scaled, synchronize, time_in_turn
from benchmarks.report import Report, Row, make_parser
from modeling_sslam import SSLAMFeatureExtractor
from modeling_sslam.common.audio import read_waveform
from modeling_sslam.common.resampling import resample
from training.data.config import DataConfig
from training.data.loader import AudioLoader, make_loader
from training.data.seeding import generator_for
from training.data.sources import open_source
from training.preparation.shards import card_header, write_shards
from training.soundscapes.scene import soundscape

SECONDS, RATE, SUBTYPE = 10.0, 48_000, "PCM_24"
NUM_SOUNDS = 16
BATCH_SIZE, NUM_CLONES = 12, 8
MAX_STAGE_CLIPS = 8 * BATCH_SIZE
# Batches that each worker of torch's DataLoader prepares ahead.
PREFETCHED_PER_WORKER = 2
# More memory than the workers of a pass hold.
WARM_BYTES = 1 << 30


def encoded_sound(number: int) -> bytes:
    """Encode two soundscapes as stereo FLAC, each louder in one of the channels."""
    left, right = (
        soundscape(generator_for(0, "benchmark", number, channel), SECONDS, RATE)[0] for channel in ("left", "right")
    )
    stereo = np.stack((0.7 * left + 0.3 * right, 0.3 * left + 0.7 * right), axis=1)
    file = io.BytesIO()
    soundfile.write(file, stereo, RATE, format="FLAC", subtype=SUBTYPE)
    return file.getvalue()


def write_clips(folder: Path, num_clips: int, num_shards: int) -> None:
    """Write a dataset folder of `num_shards` shards of equal size."""
    sounds = [encoded_sound(number) for number in range(min(NUM_SOUNDS, num_clips))]
    features = datasets.Features({"video_id": datasets.Value("string"), "audio": datasets.Audio(sampling_rate=RATE)})
    rows = (
        {"video_id": f"{index:06d}", "audio": {"bytes": sounds[index % len(sounds)], "path": f"{index:06d}.flac"}}
        for index in range(num_clips)
    )
    per_shard = math.ceil(num_clips / num_shards)
    write_shards(folder, "train", rows, features, max_rows=per_shard, rows_per_group=per_shard)
    (folder / "README.md").write_text(card_header(["train"]))


class PlainClips(Dataset):
    """The rival: decode, resample and transform each clip by itself."""

    def __init__(self, folder: Path, extractor: SSLAMFeatureExtractor) -> None:
        tables = [pq.read_table(path) for path in sorted((folder / "data").glob("*.parquet"))]
        self.rows = [row for table in tables for row in table.to_pylist()]
        self.extractor = extractor

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        extractor, row = self.extractor, self.rows[index]
        samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32", always_2d=True)
        waveform = torch.from_numpy(samples).mean(1)
        waveform = torchaudio.functional.resample(waveform, rate, extractor.sampling_rate)
        return {"ids": row["video_id"], "input_values": published(extractor, [waveform], extractor.max_length)[0]}


def own_loader(
    folder: Path,
    extractor: SSLAMFeatureExtractor,
    workers: int,
    front_end: str,
    endless: bool = False,
    batch_size: int = BATCH_SIZE,
) -> AudioLoader:
    config = DataConfig(str(folder), num_workers=workers, front_end=front_end, shuffle_buffer=BATCH_SIZE)
    return make_loader(open_source(config), extractor, batch_size=batch_size, seed=0, repeat=endless)


def own_batches(
    folder: Path, extractor: SSLAMFeatureExtractor, workers: int, front_end: str, device: torch.device
) -> Iterator[torch.Tensor]:
    loader = own_loader(folder, extractor, workers, front_end)
    return (loader.input_values(batch, device) for batch in loader)


def plain_batches(clips: PlainClips, workers: int, device: torch.device) -> Iterator[torch.Tensor]:
    loader = DataLoader(clips, BATCH_SIZE, num_workers=workers, pin_memory=torch.cuda.is_available())
    return (batch["input_values"].to(device, non_blocking=True) for batch in loader)


def processor_seconds() -> float:
    """Return the processor time of this process and of its child processes that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


class Pass:
    """A pass over all clips. Each call runs it and keeps its wall-clock time and its processor time."""

    def __init__(self, make_batches: Callable[[], Iterable[torch.Tensor]], num_clips: int) -> None:
        self.make_batches = make_batches
        self.num_clips = num_clips
        self.seconds: list[float] = []
        self.processor_seconds: list[float] = []

    def __call__(self) -> None:
        # A virtual machine may return idle memory to its host. Getting it back takes ten times as long as reusing
        # memory that another process has just freed, which would slow down the first pass after a pause.
        np.ones(WARM_BYTES, np.uint8)
        start, before = time.perf_counter(), processor_seconds()
        given = sum(len(batch) for batch in self.make_batches())
        self.processor_seconds.append(processor_seconds() - before)
        self.seconds.append(time.perf_counter() - start)
        if given != self.num_clips:
            raise RuntimeError(f"A pass gave {given} of {self.num_clips} clips.")


def stages(folder: Path, extractor: SSLAMFeatureExtractor, num_clips: int) -> dict[str, Callable[[], object]]:
    """Return a run of each stage alone over the same clips, and of the whole pipeline."""
    stream = own_loader(folder, extractor, 0, "worker").stream
    encoded = [stream.source.audio(row)[0] for row in islice(stream.dataset, num_clips)]

    def decode(audio: bytes) -> torch.Tensor:
        with soundfile.SoundFile(io.BytesIO(audio)) as file:
            return torch.from_numpy(file.read(dtype="float32", always_2d=True).T).mean(0)

    decoded = [decode(audio) for audio in encoded]
    max_samples = extractor.num_samples(extractor.max_length)
    waveforms = [read_waveform(audio, extractor.sampling_rate, max_samples) for audio in encoded]
    batches = [waveforms[start : start + BATCH_SIZE] for start in range(0, num_clips, BATCH_SIZE)]
    return {
        "read": lambda: list(islice(stream.dataset, num_clips)),
        "decode": lambda: [decode(audio) for audio in encoded],
        "resample": lambda: [resample(waveform, RATE, extractor.sampling_rate) for waveform in decoded],
        "filter bank": lambda: [extractor(batch, extractor.sampling_rate, return_tensors="pt") for batch in batches],
        "all": lambda: list(islice(own_loader(folder, extractor, 0, "worker"), len(batches))),
    }


def time_steps(
    step: Callable[[torch.Tensor], None],
    loader: AudioLoader,
    workers: int,
    num_steps: int,
    rounds: int,
    device: torch.device,
) -> dict[str, Measurement]:
    """Time `num_steps` steps on batches from the loader and on a ready batch, in turn."""
    given = (loader.input_values(batch, device) for batch in loader)
    ready = next(given)
    step(ready)
    seconds: dict[str, list[float]] = {"ready batch": [], "loader": []}
    for _ in range(rounds):
        for name, batches in (("ready batch", repeat(ready)), ("loader", given)):
            if name == "loader":
                for _ in islice(given, PREFETCHED_PER_WORKER * workers):
                    pass
            synchronize(device)
            start = time.perf_counter()
            for input_values in islice(batches, num_steps):
                step(input_values)
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: Measurement.of(values) for name, values in seconds.items()}


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("data", __doc__, rounds=5)
    parser.add_argument(
        "--workers", type=int, default=len(os.sched_getaffinity(0)), help="worker processes (default: one a core)"
    )
    parser.add_argument("--clips-per-worker", type=int, default=128, help="clips of a pass, per worker (%(default)s)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    workers, num_clips = arguments.workers, arguments.workers * arguments.clips_per_worker
    names = ("rounds", "layers", "workers", "clips_per_worker")
    report = Report("data", {name: getattr(arguments, name) for name in names})
    extractor = SSLAMFeatureExtractor()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_clips(folder, num_clips, num_shards=workers)
        size = sum(path.stat().st_size for path in folder.glob("data/*")) / num_clips
        report.record("bytes of a clip", size)
        plain = PlainClips(folder, extractor)
        own = partial(own_batches, folder, extractor)
        passes = {
            "no workers": Pass(partial(own, 0, "worker", device), num_clips),
            "workers": Pass(partial(own, workers, "worker", device), num_clips),
            "workers, filter bank on the device": Pass(partial(own, workers, "device", device), num_clips),
            "plain pipeline": Pass(partial(plain_batches, plain, workers, device), num_clips),
        }
        time_in_turn(passes, arguments.rounds, device)  # each pass keeps its own times
        wall = {name: Measurement.of(run.seconds[-arguments.rounds :]) for name, run in passes.items()}
        processor = {name: Measurement.of(run.processor_seconds[-arguments.rounds :]) for name, run in passes.items()}
        where = f"{workers} workers, {device.type}"
        for name in passes:
            report.record(f"seconds of a pass: {name}", wall[name])
            report.record(f"processor seconds of a pass: {name}", processor[name])
            place = where if name != "no workers" else device.type
            report.add(
                Row(f"batches, {name}", place, "clips/s", scaled(wall[name], lambda value: num_clips / value)),
                Row(
                    f"batches, {name}",
                    place,
                    "clips/s per core",
                    scaled(processor[name], lambda value: num_clips / value),
                ),
            )
        for times, figure in ((wall, "clips/s of the plain pipeline's"), (processor, "clips/s per core of the same")):
            report.add(Row("batches, workers", where, figure, ratio(times["plain pipeline"], times["workers"])))

        parts = time_in_turn(
            stages(folder, extractor, min(num_clips, MAX_STAGE_CLIPS)), arguments.rounds, torch.device("cpu")
        )
        for name, measurement in parts.items():
            report.record(f"seconds of a stage: {name}", measurement)
            if name != "all":
                report.add(
                    Row(f"{name}, by itself", "CPU, 1 thread", "of the whole", ratio(measurement, parts["all"]))
                )
        known = sum(measurement.median for name, measurement in parts.items() if name != "all")
        report.add(Row("the rest", "CPU, 1 thread", "of the whole", 1 - known / parts["all"].median))
    report.write(arguments.out)


if __name__ == "__main__":
    main()

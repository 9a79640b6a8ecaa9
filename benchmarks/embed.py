"""What `sslam embed` costs beside the model's forward pass, and whether its memory grows with a recording's length.

    python -m benchmarks.embed                       # base size, 48 FLAC files of 10 s at 44.1 kHz, batches of 8
    python -m benchmarks.embed --memory              # peak memory for a minute and for ten hours, by a tiny model

The throughput is that of the whole: reading, decoding, resampling, filter bank, model, pooling, Parquet on disk. The
rival is the model alone, called on ready batches of the same size, as many in number. Rounds of both take turns, so
that what else the machine does meets both. Ratios are of the medians: of wall-clock time, and of processor time, which
hardly depends on other programs.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import wave
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMModel
from modeling_sslam.inference import Embedder
from modeling_sslam.inference.embedding.folder import embed_to_folder

CLIP_SECONDS, RATE = 10.24, 44_100


def write_clips(folder: Path, count: int) -> None:
    """Stereo FLAC of noise, which takes the longest of all sounds to decode."""
    for number in range(count):
        noise = np.random.default_rng(number).normal(scale=0.1, size=(round(CLIP_SECONDS * RATE), 2)).clip(-1, 1)
        soundfile.write(folder / f"{number:05d}.flac", noise, RATE)


@torch.inference_mode()
def run_bare_model(model: SSLAMModel, input_values: torch.Tensor, num_batches: int) -> None:
    for _ in range(num_batches):
        model(input_values).pooler_output.cpu()


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall-clock and processor time of a call, the latter over all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def measure_throughput(clips: int, batch_size: int, rounds: int, device: str, config: SSLAMConfig) -> None:
    extractor = SSLAMFeatureExtractor()
    model = SSLAMModel(config).eval().to(device)
    embedder = Embedder(model, extractor, batch_size=batch_size)
    input_values = torch.randn(batch_size, extractor.max_length, extractor.num_mel_bins, device=device)
    num_batches = -(-clips // batch_size)
    with tempfile.TemporaryDirectory() as folder:
        sounds = Path(folder) / "sounds"
        sounds.mkdir()
        write_clips(sounds, clips)
        bare, whole = [], []
        run_bare_model(model, input_values, 1)
        for index in range(rounds):
            out = Path(folder) / f"out{index}"
            bare.append(seconds(partial(run_bare_model, model, input_values, num_batches)))
            whole.append(seconds(partial(embed_to_folder, [str(sounds)], out, embedder, "model")))
            print(f"round {index + 1}: bare {bare[-1][0]:.1f} s, embed {whole[-1][0]:.1f} s")
    for index, kind in enumerate(("wall-clock", "processor")):
        ratio = statistics.median(times[index] for times in bare) / statistics.median(times[index] for times in whole)
        print(f"{kind} time: embed at {ratio:.3f} of the bare model")
    print(f"{torch.get_num_threads()} threads, {clips} clips of {CLIP_SECONDS} s in batches of {batch_size}")


def measure_memory(minutes: float, config: SSLAMConfig) -> None:
    """Prints the peak memory of this process after it embedded a recording of that length."""
    embedder = Embedder(SSLAMModel(config), SSLAMFeatureExtractor(), batch_size=8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recording.wav"
        with wave.open(str(path), "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(16_000)
            minute = (np.random.default_rng(0).normal(scale=3000, size=16_000 * 60)).astype("<i2").tobytes()
            for _ in range(round(minutes)):
                file.writeframes(minute)
        start = time.perf_counter()
        embed_to_folder([str(path)], Path(folder) / "out", embedder, "model")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"minutes": minutes, "peak_mb": round(peak), "seconds": round(time.perf_counter() - start)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12, help="of the model, to try this out with fewer")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--minutes", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    tiny = SSLAMConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    if args.minutes:
        measure_memory(args.minutes, tiny)
    elif args.memory:
        # Peak memory is of a process, so each length has one.
        for minutes in (1, 60, 600):
            subprocess.run([sys.executable, "-m", "benchmarks.embed", "--minutes", str(minutes)], check=True)
    else:
        config = SSLAMConfig(num_hidden_layers=args.layers)
        measure_throughput(args.clips, args.batch_size, args.rounds, args.device, config)


if __name__ == "__main__":
    main()

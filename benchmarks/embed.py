"""Speed of `sslam embed` against the model alone, and its peak memory for recordings of different lengths.

    python -m benchmarks.embed                       # base size, 48 FLAC files of 10 s at 44.1 kHz, batches of 8
    python -m benchmarks.embed --memory              # peak memory of a tiny model for a minute, an hour and ten hours

The whole command is timed: reading, decoding, resampling, filter bank, model, pooling, Parquet on disk. The rival is
the model alone, on the same number of ready batches of the same size. Rounds of both take turns, so that other load on
the machine affects both alike. The two ratios are of the medians of wall-clock time, and of processor time, which
other programs hardly affect.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
import wave
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

from benchmarks.measurement import CallTime, print_ratios, time_call
from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMModel
from modeling_sslam.inference import Embedder
from modeling_sslam.inference.embedding.folder import embed_to_folder
from modeling_sslam.onednn_sslam import use_onednn

CLIP_SECONDS, RATE = 10.24, 44_100


def write_clips(folder: Path, count: int) -> None:
    """Write stereo FLAC files of noise, which takes longer to decode than any other sound."""
    for number in range(count):
        noise = np.random.default_rng(number).normal(scale=0.1, size=(round(CLIP_SECONDS * RATE), 2)).clip(-1, 1)
        soundfile.write(folder / f"{number:05d}.flac", noise, RATE)


@torch.inference_mode()
def run_bare_model(model: SSLAMModel, input_values: torch.Tensor, num_batches: int) -> None:
    for _ in range(num_batches):
        model(input_values).pooler_output.cpu()


def measure_throughput(clips: int, batch_size: int, rounds: int, device: str, config: SSLAMConfig) -> None:
    extractor = SSLAMFeatureExtractor()
    model = SSLAMModel(config).eval().to(device)
    embedder = Embedder(use_onednn(model), extractor, batch_size=batch_size)
    input_values = torch.randn(batch_size, extractor.max_length, extractor.num_mel_bins, device=device)
    num_batches = math.ceil(clips / batch_size)
    with tempfile.TemporaryDirectory() as folder:
        sounds = Path(folder) / "sounds"
        sounds.mkdir()
        write_clips(sounds, clips)
        bare: list[CallTime] = []
        whole: list[CallTime] = []
        run_bare_model(model, input_values, 1)
        for index in range(rounds):
            out = Path(folder) / f"out{index}"
            bare.append(time_call(partial(run_bare_model, model, input_values, num_batches)))
            whole.append(time_call(partial(embed_to_folder, [str(sounds)], out, embedder, "model")))
            print(f"round {index + 1}: bare {bare[-1].wall:.1f} s, embed {whole[-1].wall:.1f} s")
    print_ratios("embed", bare, whole)
    print(f"{torch.get_num_threads()} threads, {clips} clips of {CLIP_SECONDS} s in batches of {batch_size}")


def measure_memory(minutes: float, config: SSLAMConfig) -> None:
    """Embed a recording of `minutes` and print the peak memory of this process."""
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
    parser.add_argument("--layers", type=int, default=12, help="layers of the model; fewer for a trial run")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--minutes", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    tiny = SSLAMConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    if args.minutes:
        measure_memory(args.minutes, tiny)
    elif args.memory:
        # Peak memory belongs to a process, so each length runs in its own.
        for minutes in (1, 60, 600):
            subprocess.run([sys.executable, "-m", "benchmarks.embed", "--minutes", str(minutes)], check=True)
    else:
        config = SSLAMConfig(num_hidden_layers=args.layers)
        measure_throughput(args.clips, args.batch_size, args.rounds, args.device, config)


if __name__ == "__main__":
    main()

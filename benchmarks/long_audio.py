"""Speed of `sslam timeline` against the model alone, and its peak memory for recordings of different lengths.

    python -m benchmarks.long_audio                  # base size, 48 windows of 2 s from stereo FLAC at 44.1 kHz
    python -m benchmarks.long_audio --memory         # peak memory of a tiny model for a minute, an hour and ten hours

The whole command is timed except for loading the model: decoding, resampling, filter bank, windows, model, events, the
table of all scores, and the picture. The rival is the model alone, on the same number of ready batches of the same
size. Rounds of both take turns, so that other load on the machine affects both alike. Ratios are of the medians.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import soundfile
import torch

from benchmarks.measurement import CallTime, print_ratios, time_call
from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification
from modeling_sslam.inference import EventSettings, SSLAMTagger
from modeling_sslam.inference.commands.timeline import add_arguments, write_timeline
from modeling_sslam.onednn_sslam import use_onednn

# The number of AudioSet's classes. The scores of each class are kept, filtered and written.
NUM_LABELS = 527


def write_noise(path: Path, duration: float, rate: int, channels: int) -> None:
    """Write `duration` seconds of noise, minute by minute; as FLAC, noise takes longer to decode than other sounds."""
    generator = np.random.default_rng(0)
    with soundfile.SoundFile(path, "w", rate, channels) as file:
        for start in range(0, round(duration * rate), 60 * rate):
            count = min(60 * rate, round(duration * rate) - start)
            file.write((0.1 * generator.standard_normal((count, channels), dtype=np.float32)).clip(-1, 1))


def make_tagger(config: SSLAMConfig, batch_size: int, device: str) -> SSLAMTagger:
    return SSLAMTagger(use_onednn(SSLAMForAudioClassification(config).to(device)), SSLAMFeatureExtractor(), batch_size)


def run_timeline(tagger: SSLAMTagger, recording: Path, window: float, hop: float) -> None:
    """Run the whole command with a model that is already loaded."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    folder = recording.parent
    outputs = {"--out": "events.csv", "--scores": "scores.csv", "--plot": "picture.png"}
    options = [str(x) for name, file in outputs.items() for x in (name, folder / file)]
    options += ["--window", str(window), "--hop", str(hop), "--model", ""]
    args = parser.parse_args([str(recording), *options])
    write_timeline(tagger, args, EventSettings(), dict.fromkeys(args.out, "csv"))


@torch.inference_mode()
def run_bare_model(model: SSLAMForAudioClassification, input_values: torch.Tensor, num_batches: int) -> None:
    for _ in range(num_batches):
        model(input_values).logits.cpu()


def measure_throughput(tagger: SSLAMTagger, num_windows: int, window: float, hop: float, rounds: int) -> None:
    extractor, size = tagger.feature_extractor, tagger.batch_size
    num_windows = math.ceil(num_windows / size) * size
    input_values = torch.randn(size, extractor.max_length, extractor.num_mel_bins, device=tagger.model.device)
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "recording.flac"
        write_noise(recording, window + (num_windows - 1) * hop, rate=44_100, channels=2)
        bare: list[CallTime] = []
        whole: list[CallTime] = []
        run_bare_model(tagger.model, input_values, 1)
        for index in range(rounds):
            bare.append(time_call(partial(run_bare_model, tagger.model, input_values, num_windows // size)))
            whole.append(time_call(partial(run_timeline, tagger, recording, window, hop)))
            print(f"round {index + 1}: bare {bare[-1].wall:.1f} s, timeline {whole[-1].wall:.1f} s")
    print_ratios("timeline", bare, whole)
    print(f"{torch.get_num_threads()} threads, {num_windows} windows in batches of {size}")


def measure_memory(tagger: SSLAMTagger, minutes: float, window: float, hop: float) -> None:
    """Make the timeline of a recording of `minutes` and print the peak memory of this process."""
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder) / "recording.wav"
        write_noise(recording, 60 * minutes, rate=16_000, channels=1)
        duration = time_call(partial(run_timeline, tagger, recording, window, hop)).wall
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"minutes": minutes, "peak_mb": round(peak), "seconds": round(duration)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=48, help="number of windows (rounded up to whole batches)")
    parser.add_argument("--window", type=float, default=2.0)
    parser.add_argument("--hop", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model; fewer for a trial run")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 60, 600], help="lengths for --memory")
    args = parser.parse_args()
    if not args.memory:
        config = SSLAMConfig(num_hidden_layers=args.layers, num_labels=NUM_LABELS)
        tagger = make_tagger(config, args.batch_size, args.device)
        measure_throughput(tagger, args.windows, args.window, args.hop, args.rounds)
    elif len(args.minutes) > 1:
        # Peak memory belongs to a process, so each length runs in its own.
        for minutes in args.minutes:
            command = [sys.executable, "-m", "benchmarks.long_audio", "--memory", "--minutes", str(minutes)]
            command += ["--window", str(args.window), "--hop", str(args.hop), "--batch-size", str(args.batch_size)]
            subprocess.run([*command, "--device", args.device], check=True)
    else:
        tiny = SSLAMConfig(
            hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, num_labels=NUM_LABELS
        )
        measure_memory(make_tagger(tiny, args.batch_size, args.device), args.minutes[0], args.window, args.hop)


if __name__ == "__main__":
    main()

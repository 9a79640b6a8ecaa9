"""Speed of the feature extractor against torchaudio's filter bank clip by clip, and its peak memory.

    python -m benchmarks.front_end                   # 64 clips of 10 s, on one thread and on two

The rival is the published computation. For one clip at a time, it subtracts the mean, calls torchaudio's
`kaldi.fbank`, pads and normalises; then it stacks the clips. Both start from the same list of waveforms and take
turns. Peak memory is the memory of a run in a new process in addition to the waveforms, divided by the bytes of the
waveforms.

`python -m benchmarks gpu` measures the filter bank on a GPU.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torchaudio

from benchmarks.measurement import peak_memory, ratio, scaled, time_in_turn
from benchmarks.report import Report, Row, make_parser
from modeling_sslam import SSLAMFeatureExtractor

LENGTHS = (1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)


def make_clips(count: int, seconds: float, sampling_rate: int, device: torch.device) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    num_samples = round(seconds * sampling_rate)
    return [(0.1 * torch.randn(num_samples, generator=generator)).to(device) for _ in range(count)]


def ours(extractor: SSLAMFeatureExtractor, clips: list[torch.Tensor], max_length: int) -> torch.Tensor:
    inputs = extractor(clips, sampling_rate=extractor.sampling_rate, max_length=max_length, return_tensors="pt")
    return inputs["input_values"]


def published(extractor: SSLAMFeatureExtractor, clips: list[torch.Tensor], max_length: int) -> torch.Tensor:
    features = []
    for clip in clips:
        frames = torchaudio.compliance.kaldi.fbank(
            (clip - clip.mean())[None],
            htk_compat=True,
            sample_frequency=extractor.sampling_rate,
            use_energy=False,
            window_type="hanning",
            num_mel_bins=extractor.num_mel_bins,
            dither=0.0,
            frame_shift=10,
        )[:max_length]
        padded = torch.nn.functional.pad(frames, (0, 0, 0, max_length - len(frames)))
        features.append((padded - extractor.mean) / (2 * extractor.std))
    return torch.stack(features)


def padded_frames(extractor: SSLAMFeatureExtractor, seconds: float) -> int:
    """Round the frames up to a multiple of 128, as published for the datasets: 128 for 1 s, 1024 for 10 s."""
    return math.ceil(extractor.num_frames(round(seconds * extractor.sampling_rate)) / 128) * 128


def set_up_run(count: int, seconds: float, device: torch.device) -> Callable[[], object]:
    """Create the extractor and the clips, run it once to warm up, and return the run to measure."""
    extractor = SSLAMFeatureExtractor()
    clips = make_clips(count, seconds, extractor.sampling_rate, device)
    max_length = padded_frames(extractor, seconds)
    ours(extractor, clips[:1], max_length)
    return partial(ours, extractor, clips, max_length)


def measure_speed(report: Report, count: int, seconds: float, rounds: int, device: torch.device, where: str) -> None:
    """Add the speed ratio to the report; record the seconds and the largest difference of the results."""
    extractor = SSLAMFeatureExtractor()
    clips = make_clips(count, seconds, extractor.sampling_rate, device)
    max_length = padded_frames(extractor, seconds)
    difference = (ours(extractor, clips, max_length) - published(extractor, clips, max_length)).abs().max().item()
    contestants = {
        "ours": partial(ours, extractor, clips, max_length),
        "published": partial(published, extractor, clips, max_length),
    }
    times = time_in_turn(contestants, rounds, device)
    what = f"front end, {count} clips of {seconds:g} s"
    target = 3.0 if where == "CPU, 2 threads" else None
    report.add(
        Row(what, where, "x kaldi.fbank clip by clip", ratio(times["published"], times["ours"]), at_least=target),
        Row(what, where, "clips/s", scaled(times["ours"], lambda duration: count / duration)),
    )
    report.record(f"{what}, {where}", {name: value.as_dict() for name, value in times.items()})
    report.record(f"{what}, {where}: largest difference of the input_values", difference)


def measure_memory(report: Report, count: int, seconds: float, device: torch.device, where: str) -> None:
    peak = peak_memory(partial(set_up_run, count, seconds, device)).of_run
    num_bytes = count * round(seconds * SSLAMFeatureExtractor().sampling_rate) * torch.float32.itemsize
    what = f"front end, {count} clips of {seconds:g} s"
    report.add(Row(what, where, "peak memory, x the input", peak / num_bytes, at_most=4.0))


def measure_lengths(report: Report, lengths: Sequence[float], total: float, rounds: int, device: torch.device) -> None:
    """Record milliseconds per clip for each clip length, with the same amount of audio each time."""
    extractor = SSLAMFeatureExtractor()
    for seconds in lengths:
        count = max(1, round(total / seconds))
        clips = make_clips(count, seconds, extractor.sampling_rate, device)
        run = partial(ours, extractor, clips, padded_frames(extractor, seconds))
        times = time_in_turn({"ours": run}, rounds, device)["ours"]
        per_clip = scaled(times, lambda duration, count=count: 1000 * duration / count)
        report.record(f"ms a clip, {count} clips of {seconds:g} s, {device.type}", per_clip)


def main() -> None:
    parser = make_parser("front_end", __doc__, rounds=9)
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0, help="length of each clip in s (%(default)s)")
    parser.add_argument(
        "--lengths", type=float, nargs="*", default=LENGTHS, help="lengths in s of the scaling measurement"
    )
    args = parser.parse_args()
    report = Report("front_end", {name: value for name, value in vars(args).items() if name not in ("out", "layers")})
    cpu = torch.device("cpu")
    for threads in sorted({1, args.threads}):
        torch.set_num_threads(threads)
        where = f"CPU, {threads} thread{'s' * (threads > 1)}"
        measure_speed(report, args.clips, args.seconds, args.rounds, cpu, where)
    measure_memory(report, args.clips, args.seconds, cpu, where)
    measure_lengths(report, args.lengths, args.clips * args.seconds, args.rounds, cpu)
    report.write(args.out)


if __name__ == "__main__":
    main()

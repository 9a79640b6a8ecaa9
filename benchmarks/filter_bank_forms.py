"""Rounding errors of possible forms of the filter bank on a GPU, simulated on the CPU without measuring time.

    python -m benchmarks.filter_bank_forms

Each form computes the same log-mel values from float32 frames. Factors of products are rounded as a GPU rounds them:
to 10 bits in TF32, and to a sum of two bfloat16 numbers in bf16x3, which adds three products. A figure is the largest
difference of the `input_values` (statistics of AudioSet) from the reference in float64.
"""

import math
from collections.abc import Callable

import torch

from modeling_sslam.feature_extraction_sslam import DATASET_PRESETS
from modeling_sslam.filter_bank_sslam import (
    LOG_FLOOR,
    PREEMPHASIS,
    device_constants,
    frame_sizes,
    log_mel_in_parts,
    log_mel_spectrogram,
    mel_filters,
    reference_log_mel,
)

RATE, NUM_MEL_BINS = 16_000, 128
FRAME_LENGTH, FRAME_SHIFT, FFT_LENGTH = frame_sizes(RATE)
Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def round_to_tf32(values: torch.Tensor) -> torch.Tensor:
    """Round to a mantissa of 10 bits after the leading one."""
    mantissas, exponents = torch.frexp(values.double())
    return torch.ldexp((mantissas * 2**11).round() / 2**11, exponents).float()


def tf32(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return round_to_tf32(left) @ round_to_tf32(right)


def bf16x3(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    (left_head, left_tail), (right_head, right_tail) = map(_head_and_tail, (left, right))
    return left_head @ right_head + (left_head @ right_tail + left_tail @ right_head)


def _head_and_tail(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    head = values.bfloat16().float()
    return head, (values - head).bfloat16().float()


def frames_to_spectrum() -> torch.Tensor:
    """Build mean removal, pre-emphasis, window and DFT as one matrix `(frame_length, fft_length)`."""
    identity = torch.eye(FRAME_LENGTH, dtype=torch.float64)
    frames = identity - 1 / FRAME_LENGTH
    frames = frames - PREEMPHASIS * torch.cat((frames[:, :1], frames[:, :-1]), 1)
    frames = frames * torch.hann_window(FRAME_LENGTH, periodic=False, dtype=torch.float64)
    return torch.view_as_real(torch.fft.rfft(frames, FFT_LENGTH)[:, :-1]).flatten(1).float()


def by_product(product: Product) -> Callable[[torch.Tensor], torch.Tensor]:
    matrix = frames_to_spectrum()
    filters = mel_filters(NUM_MEL_BINS, RATE, FFT_LENGTH).repeat_interleave(2, 0)

    def compute(waveforms: torch.Tensor) -> torch.Tensor:
        frames = waveforms.unfold(-1, FRAME_LENGTH, FRAME_SHIFT)
        squares = product(frames.reshape(-1, FRAME_LENGTH), matrix).square()
        return (squares @ filters).clamp(min=LOG_FLOOR).log().view(*frames.shape[:-1], -1)

    return compute


def by_fft(waveforms: torch.Tensor) -> torch.Tensor:
    return log_mel_in_parts(waveforms, device_constants(NUM_MEL_BINS, RATE, waveforms.device))


def forms() -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Return each form by its name."""
    return {
        "on CPUs, as published": log_mel_spectrogram,
        "FFT": by_fft,
        "product, float32": by_product(torch.matmul),
        "product, bf16x3": by_product(bf16x3),
        "product, TF32": by_product(tf32),
    }


def signals() -> dict[str, torch.Tensor]:
    """Return clips of two seconds, `(num_samples,)` in float32."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2 * RATE, generator=generator)
    seconds = torch.arange(2 * RATE, dtype=torch.float64) / RATE
    tone = torch.sin(2 * math.pi * 440 * seconds)
    spectrum, bins = torch.fft.rfft(noise), torch.arange(1, RATE + 2)
    return {
        "noise at -20 dB": 0.1 * noise,
        "noise at -80 dB": 1e-4 * noise,
        "noise, clipped": (5 * noise).clamp(-1, 1),
        "noise at -60 dB beside DC of 0.9": 0.9 + 1e-3 * noise,
        "noise falling by 6 dB an octave": 30 * torch.fft.irfft(spectrum / bins),
        "tone 60 dB above noise": (tone + 1e-3 * noise).float(),
        "tone 90 dB above noise": (tone + 10**-4.5 * noise).float(),
    }


def errors() -> dict[str, dict[str, float]]:
    """Return the largest error of each form on each signal: `{signal: {form: error}}`."""
    scale = 2 * DATASET_PRESETS["audioset"]["std"]
    table = {}
    for name, signal in signals().items():
        waveforms = (signal - signal.mean())[None]
        exact = reference_log_mel(waveforms.double(), NUM_MEL_BINS, RATE)
        table[name] = {
            form: (compute(waveforms) - exact).abs().max().item() / scale for form, compute in forms().items()
        }
    return table


def main() -> None:
    """Print the table in Markdown."""
    table = errors()
    names = list(forms())
    print(f"| signal | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", sep="\n")
    for signal, row in table.items():
        print(f"| {signal} | {' | '.join(f'{row[name]:.0e}' for name in names)} |")


if __name__ == "__main__":
    main()

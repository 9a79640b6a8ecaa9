"""The fast filter bank against the plain reference. test_feature_extraction.py compares it with the published one."""

import math

import pytest
import torch

from modeling_sslam import filter_bank_sslam
from modeling_sslam.filter_bank_sslam import (
    LogMelFilterBank,
    device_constants,
    frame_sizes,
    log_mel_in_parts,
    log_mel_spectrogram,
    mel_filters,
    reference_log_mel,
)

RATE = 16_000
UNIT_ROUNDOFF = torch.finfo(torch.float32).eps / 2


def noise(*shape: int) -> torch.Tensor:
    return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


def exact_and_tolerance(
    waveforms: torch.Tensor, num_mel_bins: int = 128, sampling_rate: int = RATE
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the reference in float64, and by how much a float32 result may differ from it.

    An FFT of length N in float32 changes each bin X_k of a frame x by about u log2(N) |x|, with u the unit roundoff.
    The steps before it add less. d is twice that, since implementations of the FFT differ.
    A mel bin has the energy E = sum_k w_k |X_k|^2. Its root is a norm of X, so it changes by at most d sqrt(W), where
    W = sum_k w_k. The logarithm 2 ln sqrt(E) therefore changes by at most -2 ln(1 - d sqrt(W / E)).
    Last, the logarithm itself is rounded: by one float32 spacing at most, which is 16 u for values below 16.
    """
    frame_length, frame_shift, fft_length = frame_sizes(sampling_rate)
    exact = reference_log_mel(waveforms.double(), num_mel_bins, sampling_rate)
    norms = waveforms.double().unfold(-1, frame_length, frame_shift).norm(dim=-1, keepdim=True)
    fft_error = 2 * UNIT_ROUNDOFF * math.log2(fft_length) * norms
    weights = mel_filters(num_mel_bins, sampling_rate, fft_length).sum(0).double()
    root_error = fft_error * (weights / exact.exp()).sqrt()
    return exact, -2 * torch.log1p(-root_error.clamp(max=1)) + 16 * UNIT_ROUNDOFF


def assert_as_exact_as_float32_allows(actual: torch.Tensor, exact: torch.Tensor, tolerance: torch.Tensor) -> None:
    assert actual.dtype == torch.float32
    assert actual.shape == exact.shape
    assert ((actual - exact).abs() <= tolerance).all()


def on_device(waveforms: torch.Tensor, num_mel_bins: int = 128, sampling_rate: int = RATE) -> torch.Tensor:
    """Compute the filter bank of devices, on the CPU."""
    return log_mel_in_parts(waveforms, device_constants(num_mel_bins, sampling_rate, waveforms.device))


@pytest.mark.parametrize("compute", [log_mel_spectrogram, on_device])
@pytest.mark.parametrize(
    ("num_mel_bins", "sampling_rate"),
    [(128, 16_000), (64, 16_000), (400, 16_000), (80, 8_000), (33, 32_000), (40, 44_100), (1, 16_000)],
)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1200), id="a few frames"),
        pytest.param((3, 20_000), id="a block of several clips"),
        pytest.param((20, 30_000), id="several blocks"),
        pytest.param((2, 700_000), id="clips of several blocks each"),
    ],
)
def test_agrees_with_the_reference(compute, num_mel_bins, sampling_rate, shape):
    waveforms = noise(*shape)
    actual = compute(waveforms, num_mel_bins, sampling_rate)
    exact, tolerance = exact_and_tolerance(waveforms, num_mel_bins, sampling_rate)
    assert tolerance.median() < 2e-5  # tight enough to tell a wrong computation
    assert_as_exact_as_float32_allows(actual, exact, tolerance)


def signals() -> dict[str, torch.Tensor]:
    seconds = torch.arange(2 * RATE, dtype=torch.float64) / RATE
    return {
        "one frame": noise(1, 400),
        "silence": torch.zeros(1, RATE),
        "near the floor": noise(1, RATE) * 1e-3,
        "tone": torch.sin(2 * math.pi * 440 * seconds).float()[None],
        "chirp": torch.sin(2 * math.pi * (50 + 1900 * seconds) * seconds).float()[None],
        "DC and whisper": 0.9 + noise(1, RATE) * 1e-4,
    }


@pytest.mark.parametrize("compute", [log_mel_spectrogram, on_device])
@pytest.mark.parametrize("name", signals())
def test_agrees_with_the_reference_on_signals_of_high_dynamic_range(compute, name):
    waveforms = signals()[name]
    assert_as_exact_as_float32_allows(compute(waveforms), *exact_and_tolerance(waveforms))


def test_parts_on_a_device_equal_the_whole(monkeypatch):
    waveforms = noise(5, 8000)
    whole = on_device(waveforms)
    for frames_at_a_time in (7, 48, 100, 10_000):
        monkeypatch.setattr(filter_bank_sslam, "FRAMES_AT_A_TIME_ON_DEVICE", frames_at_a_time)
        torch.testing.assert_close(on_device(waveforms), whole, atol=1e-6, rtol=0)


def test_a_device_keeps_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        actual = on_device(noise(2, 8000))
    torch.testing.assert_close(actual, on_device(noise(2, 8000)), atol=1e-6, rtol=0)


def test_filters_of_a_gpu_are_in_float64_where_tf32_is_allowed(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, dtype=None: tensor.type(dtype or tensor.dtype))
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision, dtype in (("ieee", torch.float32), ("tf32", torch.float64)):
            torch.backends.cuda.matmul.fp32_precision = precision
            assert device_constants(128, RATE, torch.device("cuda", 7)).filters.dtype == dtype
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_the_form_for_devices_compiles_as_a_whole_and_once():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    constants = device_constants(128, RATE, torch.device("cpu"))
    compiled = torch.compile(log_mel_in_parts, fullgraph=True, dynamic=False)
    for seed in range(3):
        waveforms = noise(3, 8000) * (1 + seed)
        assert_as_exact_as_float32_allows(compiled(waveforms, constants), *exact_and_tolerance(waveforms))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_normalises():
    frames = noise(2, RATE).unfold(-1, 400, 160)
    outputs = torch.empty(2, 98, 128)
    LogMelFilterBank(128, RATE, 200, mean=-4.0, scale=9.0)(frames, outputs)
    torch.testing.assert_close(outputs, (log_mel_spectrogram(noise(2, RATE)) + 4.0) / 9.0, atol=2e-6, rtol=0)


def test_scratch_memory_carries_nothing_from_block_to_block():
    filter_bank = LogMelFilterBank(128, RATE, 200)
    quiet, loud = noise(1, RATE), 100 * noise(2, RATE)
    alone, after = torch.empty(1, 98, 128), torch.empty(1, 98, 128)
    filter_bank(quiet.unfold(-1, 400, 160), alone)
    filter_bank(loud.unfold(-1, 400, 160), torch.empty(2, 98, 128))
    filter_bank(quiet.unfold(-1, 400, 160), after)
    assert torch.equal(alone, after)

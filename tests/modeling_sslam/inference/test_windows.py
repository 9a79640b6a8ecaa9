"""One filter-bank pass over a recording, compared with the feature extractor on separate clips."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_sslam import SSLAMFeatureExtractor
from modeling_sslam.feature_extraction_sslam import log_mel_spectrogram
from modeling_sslam.inference import ClipError
from modeling_sslam.inference.windows import cut_windows, pad_and_normalize, stand_for, stream_log_mel, window_starts

EXTRACTOR = SSLAMFeatureExtractor()


def log_mel(waveform: torch.Tensor, block: int = 16_000) -> torch.Tensor:
    return torch.cat(list(stream_log_mel(waveform.split(block), EXTRACTOR)))


@pytest.mark.parametrize(("block", "tolerance"), [(37, 2e-6), (400, 2e-6), (4001, 0), (10**6, 0)])
def test_blocks_joined_are_one_pass(recording, block, tolerance):
    """For few frames the matrix product uses another kernel, which sums in another order."""
    whole = log_mel_spectrogram(recording[None])[0]
    assert len(whole) == EXTRACTOR.num_frames(len(recording))
    torch.testing.assert_close(log_mel(recording, block), whole, rtol=0, atol=tolerance)


@pytest.mark.parametrize("offset", [0.0, 0.01, 0.3])
@pytest.mark.parametrize("seconds", [1.0, 2.0])
def test_windows_equal_separate_clips(recording, offset, seconds):
    """Window and clip differ by rounding, because the extractor also removes the mean of the clip.

    The difference is largest where a mel bin is nearly empty beside a loud sound.
    """
    waveform = recording * 0.5 + offset
    num_samples = round(seconds * 16_000)
    num_frames = EXTRACTOR.num_frames(num_samples)
    windows = list(cut_windows(log_mel(waveform).split(700), num_frames, 50))
    inputs = pad_and_normalize([frames for _, frames in windows], EXTRACTOR.max_length, EXTRACTOR)
    clips = [waveform[160 * first :][:num_samples] for first, _ in windows[:-1]]
    clips.append(waveform[160 * windows[-1][0] :])
    expected = EXTRACTOR(clips, sampling_rate=16_000, return_tensors="pt")["input_values"]
    torch.testing.assert_close(inputs, expected, rtol=0, atol=1.5e-3)
    assert (inputs - expected).abs().mean() < 2e-6


def test_two_seconds_are_198_frames():
    """A window of 2 s has as many frames as a clip of 2 s, not 200."""
    assert EXTRACTOR.num_frames(32_000) == 198
    clip = torch.randn(32_000) / 10
    (window,) = cut_windows([log_mel(clip)], 198, 50)
    expected = EXTRACTOR(clip, sampling_rate=16_000, return_tensors="pt")["input_values"][0, :198]
    torch.testing.assert_close(pad_and_normalize([window[1]], 208, EXTRACTOR)[0, :198], expected, rtol=0, atol=1e-4)


def test_log_mel_is_not_normalised_without_do_normalize():
    extractor = SSLAMFeatureExtractor(do_normalize=False, padding_value=-3.0)
    frames = torch.randn(5, 128)
    inputs = pad_and_normalize([frames, frames[:2]], 16, extractor)
    assert torch.equal(inputs[0, :5], frames)
    assert (inputs[0, 5:] == -3).all()
    assert (inputs[1, 2:] == -3).all()


@pytest.mark.parametrize(
    ("num_frames", "starts"),
    [(1, [0]), (9, [0]), (10, [0]), (11, [0, 1]), (13, [0, 3]), (15, [0, 4, 5]), (18, [0, 4, 8])],
)
def test_windows_end_with_the_recording(num_frames, starts):
    assert window_starts(num_frames, 10, 4).tolist() == starts
    windows = list(cut_windows([torch.arange(num_frames)[:, None]], 10, 4))
    assert [first for first, _ in windows] == starts
    assert all(frames[0] == first for first, frames in windows)
    assert windows[-1][1][-1] == num_frames - 1
    assert {len(frames) for _, frames in windows} == {min(num_frames, 10)}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_windows_do_not_depend_on_blocks(data):
    window = data.draw(st.integers(1, 20))
    hop = data.draw(st.integers(1, window))
    sizes = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=8).filter(any))
    frames = torch.arange(sum(sizes))[:, None]
    windows = list(cut_windows(frames.split(sizes), window, hop))
    assert [first for first, _ in windows] == window_starts(len(frames), window, hop).tolist()
    for first, part in windows:
        assert torch.equal(part, frames[first : first + window])
    assert sorted({int(x) for _, part in windows for x in part}) == list(range(len(frames)))


def test_windows_hold_no_more_than_a_block_and_themselves():
    blocks = (torch.zeros(1000, 4) for _ in range(100))
    largest = max(frames.untyped_storage().nbytes() for _, frames in cut_windows(blocks, 198, 50))
    assert largest <= (1000 + 2 * 198) * 4 * 4


def test_windows_stand_for_their_middle():
    assert stand_for(np.array([0.0]), 2.0, 1.3).tolist() == [0, 1.3]
    borders = stand_for(np.array([0.0, 0.5, 1.0, 1.3]), 2.0, 3.3)
    assert borders.tolist() == pytest.approx([0, 1.25, 1.75, 2.15, 3.3])


def test_a_recording_shorter_than_a_frame():
    with pytest.raises(ClipError, match="too_short: 399 samples at 16000 Hz, less than one frame of 400"):
        list(stream_log_mel(torch.zeros(399).split(100), EXTRACTOR))
    assert len(log_mel(torch.zeros(400))) == 1

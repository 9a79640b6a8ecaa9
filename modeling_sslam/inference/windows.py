"""One filter-bank pass over a recording, and windows cut out of its frames.

A frame of Kaldi's filter bank depends on its own 400 samples alone (at 16 kHz): its mean is removed and pre-emphasis
begins anew in it. So the frames of a recording are computed once, block by block, with the 240 samples that a frame
shares with the next carried over, and are the frames that [`SSLAMFeatureExtractor`] would compute in each window:

- Blocks joined equal the pass over the whole recording, at every border: bit for bit from 10 frames a block on.
- A window of frames k, k + 1, ... equals the extractor's result for a clip of the samples from 160 k on, up to
  rounding: the extractor removes the mean of the clip before that of each frame, which changes the last bits of its
  samples and no more. The logarithm magnifies those where a mel bin is nearly empty beside a loud sound. On the tests'
  recordings the two differ by at most 6.6e-3 and by 4e-6 on average (log-mel values, which go from -16 to 8), and each
  is as far from the same computation in float64: 3.3e-3 the one pass, 7.7e-3 the extractor. An offset of the waveform
  (up to 0.3 of full scale was tried) changes nothing about that.
- Windows start at whole frames, so at multiples of 10 ms.
- There are no other edges: no frame reaches beyond the recording, and a window has as many frames as a clip of its
  length (198 in 2 s). Resampling, however, knows what lies around a window; a clip cut out beforehand ends in silence.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch

from ..common.errors import ClipError
from ..feature_extraction_sslam import SSLAMFeatureExtractor, log_mel_spectrogram


def stream_log_mel(blocks: Iterable[torch.Tensor], extractor: SSLAMFeatureExtractor) -> Iterator[torch.Tensor]:
    """The log-mel frames of a recording that comes in blocks.

    Args:
        blocks: float32 samples `(num_samples,)` at the extractor's rate, on the device to compute on.

    Yields:
        float32 of shape `(num_frames, num_mel_bins)`, neither padded nor normalised.

    Raises:
        ClipError: If the recording ends before its first frame does.
    """
    pending, num_frames = torch.empty(0), 0
    for block in blocks:
        pending = torch.cat((pending.to(block.device), block))
        if len(pending) < extractor.frame_length:
            continue
        frames = log_mel_spectrogram(pending[None], extractor.num_mel_bins, extractor.sampling_rate)[0]
        # A copy: a view would keep the whole block alive.
        pending = pending[len(frames) * extractor.frame_shift :].clone()
        num_frames += len(frames)
        yield frames
    if not num_frames:
        raise ClipError(
            "too_short",
            f"{len(pending)} samples at {extractor.sampling_rate} Hz, less than one frame of {extractor.frame_length}",
        )


def cut_windows(log_mel: Iterable[torch.Tensor], window: int, hop: int) -> Iterator[tuple[int, torch.Tensor]]:
    """Windows over frames that come in blocks: one every `hop` frames, and one more that ends with the recording where
    the others leave a rest. A recording shorter than a window is one window.

    Yields:
        The first frame of the window and its frames `(window, num_mel_bins)`: views, not to be written to.
    """
    pending, first, start, covered = None, 0, 0, 0
    for frames in log_mel:
        pending = frames if pending is None else torch.cat((pending, frames))
        total = first + len(pending)
        while start + window <= total:
            yield start, pending[start - first : start - first + window]
            covered = start + window
            start += hop
        # Kept: what the next window needs, and the last one if the recording ends here.
        dropped = max(0, min(start, total - window) - first)
        pending, first = pending[dropped:].clone() if dropped else pending, first + dropped
    if pending is not None and covered < first + len(pending):
        start = max(0, first + len(pending) - window)
        yield start, pending[start - first :]


def window_starts(num_frames: int, window: int, hop: int) -> np.ndarray:
    """First frames of the windows that [`cut_windows`] cuts out of so many frames, int64 of shape `(num_windows,)`."""
    starts = np.arange(0, max(1, num_frames - window + 1), hop)
    if starts[-1] + window < num_frames:
        starts = np.append(starts, num_frames - window)
    return starts


def stand_for(starts: np.ndarray, window: float, duration: float) -> np.ndarray:
    """The borders between the stretches of a recording that its windows stand for, halfway between their centres: a
    window speaks of its middle, the first also of the beginning and the last of the end.

    Args:
        starts: Start of each window in seconds, of shape `(num_windows,)`.
        window: Their length in seconds.
        duration: Of the recording, in seconds.

    Returns:
        Seconds of shape `(num_windows + 1,)`; window i stands for what lies between border i and i + 1.
    """
    between = (starts[1:] + starts[:-1] + window) / 2
    return np.concatenate(([0.0], between, [duration]))


def pad_and_normalize(windows: Sequence[torch.Tensor], length: int, extractor: SSLAMFeatureExtractor) -> torch.Tensor:
    """Windows of log-mel frames as the extractor pads and normalises clips: `(len(windows), length, num_mel_bins)`."""
    features = windows[0].new_full((len(windows), length, extractor.num_mel_bins), extractor.padding_value)
    for row, window in zip(features, windows, strict=True):
        row[: len(window)] = window
    if extractor.do_normalize:
        features.sub_(extractor.mean).div_(2 * extractor.std)
    return features


def model_inputs(
    windows: Sequence[torch.Tensor], length: int, extractor: SSLAMFeatureExtractor
) -> dict[str, torch.Tensor]:
    """What the extractor would give of windows to the model: `input_values` `(len(windows), length, num_mel_bins)`,
    and `attention_mask` `(len(windows), length)` where it is set to return it."""
    inputs = {"input_values": pad_and_normalize(windows, length, extractor)}
    if extractor.return_attention_mask:
        counts = torch.tensor([len(frames) for frames in windows], device=windows[0].device)
        inputs["attention_mask"] = (torch.arange(length, device=counts.device) < counts[:, None]).long()
    return inputs

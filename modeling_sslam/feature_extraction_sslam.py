"""The front end of SSLAM: waveforms to normalised log-mel spectrograms, in torch alone.

The filter bank is Kaldi's (as in `torchaudio.compliance.kaldi.fbank`), batched over clips and computed in float32 on
any device. It follows the published computation operation by operation: the logarithm magnifies rounding differences
wherever a mel bin holds little energy.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.utils import PaddingStrategy, TensorType, logging

logger = logging.get_logger(__name__)

# Mean and standard deviation of the log-mel bins, and the clip length in frames, that the published models were
# trained with on each dataset.
DATASET_PRESETS: dict[str, dict[str, float]] = {
    "audioset": {"mean": -4.268, "std": 4.569, "max_length": 1024},
    "esc50": {"mean": -6.627, "std": 5.359, "max_length": 512},
    "speech_commands": {"mean": -6.846, "std": 5.565, "max_length": 128},
}

FRAME_LENGTH_MS, FRAME_SHIFT_MS = 25, 10
PREEMPHASIS = 0.97
LOWEST_FREQUENCY = 20.0
LOG_FLOOR = torch.finfo(torch.float32).eps
# Float audio has full scale 1; anything 20 dB above it is integer samples that were never divided by their range.
PEAK_LIMIT = 10.0
# Integer PCM: zero and full scale of each sample format that sound files hold.
PCM_ZERO_AND_SCALE = {torch.uint8: (128.0, 128.0), torch.int16: (0.0, 2.0**15), torch.int32: (0.0, 2.0**31)}
# Frames transformed at a time. On a CPU they should stay in the cache; a GPU wants few, large kernels.
FRAMES_PER_BLOCK = {"cpu": 1024, "other": 1 << 17}


@lru_cache
def mel_filters(num_mel_bins: int, sampling_rate: int, fft_length: int) -> torch.Tensor:
    """Kaldi's triangular filters, equally spaced on the mel scale 1127 ln(1 + f / 700) from 20 Hz to Nyquist.

    Returns:
        float32 of shape `(fft_length // 2 + 1, num_mel_bins)` on the CPU; the Nyquist row is zero. Computed in
        float32 as published: a filter between two FFT bins is the small difference of large numbers.
    """

    def mel(frequency: float) -> float:
        return 1127.0 * math.log(1.0 + frequency / 700.0)

    lowest, highest = mel(LOWEST_FREQUENCY), mel(sampling_rate / 2)
    spacing = (highest - lowest) / (num_mel_bins + 1)
    index = torch.arange(num_mel_bins, dtype=torch.float32, device="cpu")
    left, center, right = (lowest + (index + k) * spacing for k in range(3))
    frequencies = (sampling_rate / fft_length) * torch.arange(fft_length // 2, dtype=torch.float32, device="cpu")
    mels = (1127.0 * (1.0 + frequencies / 700.0).log())[:, None]
    rising, falling = (mels - left) / (center - left), (right - mels) / (right - center)
    return torch.nn.functional.pad(torch.minimum(rising, falling).clamp(min=0.0), (0, 0, 0, 1))


def log_mel_spectrogram(waveforms: torch.Tensor, num_mel_bins: int = 128, sampling_rate: int = 16_000) -> torch.Tensor:
    """Kaldi log-mel filter bank of zero-mean waveforms: 25 ms Hann windows every 10 ms, only where they fit whole.

    Args:
        waveforms: float32 of shape `(batch_size, num_samples)`, on any device.

    Returns:
        float32 of shape `(batch_size, num_frames, num_mel_bins)`, natural logarithm of the power, at least ln(eps).
    """
    frame_length, frame_shift = (sampling_rate * ms // 1000 for ms in (FRAME_LENGTH_MS, FRAME_SHIFT_MS))
    fft_length = 1 << (frame_length - 1).bit_length()
    factory: dict[str, Any] = {"dtype": torch.float32, "device": waveforms.device}
    window = torch.hann_window(frame_length, periodic=False, **factory)
    filters = mel_filters(num_mel_bins, sampling_rate, fft_length).to(waveforms.device)

    frames = waveforms.unfold(-1, frame_length, frame_shift)
    log_mel = torch.empty(*frames.shape[:2], num_mel_bins, **factory)
    block_size = FRAMES_PER_BLOCK.get(waveforms.device.type, FRAMES_PER_BLOCK["other"])
    step = max(1, block_size // frames.shape[0])
    for start in range(0, frames.shape[1], step):
        block = frames[:, start : start + step]
        block = block - block.mean(-1, keepdim=True)
        previous = torch.cat((block[..., :1], block[..., :-1]), dim=-1)
        block = (block - PREEMPHASIS * previous) * window
        spectrum = torch.view_as_real(torch.fft.rfft(block, n=fft_length))
        energies = spectrum.square().sum(-1) @ filters
        log_mel[:, start : start + step] = energies.clamp_(min=LOG_FLOOR).log_()
    return log_mel


class SSLAMFeatureExtractor(SequenceFeatureExtractor):
    """Turns waveforms into the `input_values` of SSLAM (SPEC of the paper's code: mean removal, Kaldi filter bank,
    zero padding, then `(x - mean) / (2 * std)`, so that the padding becomes `-mean / (2 * std)`).

    Args:
        feature_size: Channels of the waveform after mixing down; always 1.
        sampling_rate: Sampling rate in Hz that the model was trained at.
        num_mel_bins: Mel bins F.
        max_length: Frames T (10 ms each) that clips are padded or cut to; a multiple of `patch_size`.
        patch_size: Frames of one patch; lengths are padded to a multiple of it.
        mean, std: Of the log-mel bins over the training set. See [`SSLAMFeatureExtractor.for_dataset`].
        do_normalize: Whether to normalise by them.
        padding_value: Log-mel value of padding frames, before normalisation; 0 as published.
        return_attention_mask: Whether to return the mask of real frames; `None` does so just where it matters, with
            `padding="longest"`. (The published models attend to the padding of clips padded to `max_length`.)

    Example:

    ```python
    >>> import numpy as np
    >>> from modeling_sslam import SSLAMFeatureExtractor

    >>> extractor = SSLAMFeatureExtractor()
    >>> inputs = extractor(np.zeros(16000, dtype=np.float32), sampling_rate=16000, return_tensors="pt")
    >>> inputs["input_values"].shape
    torch.Size([1, 1024, 128])
    ```
    """

    model_input_names = ["input_values", "attention_mask"]

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16_000,
        num_mel_bins: int = 128,
        max_length: int = 1024,
        patch_size: int = 16,
        mean: float = DATASET_PRESETS["audioset"]["mean"],
        std: float = DATASET_PRESETS["audioset"]["std"],
        do_normalize: bool = True,
        padding_value: float = 0.0,
        return_attention_mask: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)
        if max_length <= 0 or max_length % patch_size:
            raise ValueError(f"max_length={max_length} must be a positive multiple of patch_size={patch_size}.")
        if do_normalize and not std > 0:
            raise ValueError(f"std={std} must be positive; use do_normalize=False to get plain log-mel values.")
        self.num_mel_bins = num_mel_bins
        self.max_length = max_length
        self.patch_size = patch_size
        self.mean = mean
        self.std = std
        self.do_normalize = do_normalize
        self.return_attention_mask = return_attention_mask

    @classmethod
    def for_dataset(cls, name: str, **overrides: Any) -> "SSLAMFeatureExtractor":
        """The extractor with the statistics and clip length of a dataset: "audioset", "esc50" or "speech_commands"."""
        if name not in DATASET_PRESETS:
            raise ValueError(f"No preset for dataset {name!r}; there are {', '.join(DATASET_PRESETS)}.")
        return cls(**(DATASET_PRESETS[name] | overrides))

    @property
    def min_samples(self) -> int:
        """Samples of the shortest clip that gives a frame: 400 (25 ms) at 16 kHz."""
        return self.sampling_rate * FRAME_LENGTH_MS // 1000

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of that many samples (at least `min_samples`)."""
        return 1 + (num_samples - self.min_samples) // (self.sampling_rate * FRAME_SHIFT_MS // 1000)

    def __call__(
        self,
        raw_speech: np.ndarray | torch.Tensor | Sequence,
        sampling_rate: int | None = None,
        padding: bool | str | PaddingStrategy = "max_length",
        max_length: int | None = None,
        truncation: bool = True,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
        device: str | torch.device | None = None,
    ) -> BatchFeature:
        """Features of one clip or several.

        Args:
            raw_speech: One clip: a 1-D array, tensor or list of floats in [-1, 1], or of int16, int32 or uint8 PCM.
                Several: a list of clips or a 2-D array `(batch_size, num_samples)`. A clip *inside* a list may also be
                `(channels, num_samples)`; channels are averaged.
            sampling_rate: Sampling rate of the clips; an error unless it is the extractor's.
            padding: "max_length" pads every clip to `max_length` frames; "longest" (or `True`) to the longest clip's
                frames, rounded up to a whole patch.
            max_length: Frames to pad and cut to, in place of the extractor's own; a multiple of `patch_size`.
            truncation: Whether to cut clips at `max_length`. If not, "max_length" refuses longer clips and "longest"
                takes recordings of any length.
            return_attention_mask: See the class.
            return_tensors: "pt" or "np"; `None` gives a list of numpy arrays.
            device: Where to compute; by default where the (first) clip is.

        Returns:
            `input_values`, float32 of shape `(batch_size, T, num_mel_bins)`, and if asked for `attention_mask`, int64
            of shape `(batch_size, T)`: 1 for frames of the clip, 0 for padding.

        Raises:
            ValueError: For audio that cannot give right features (another sampling rate, empty or shorter than one
                frame, NaN or infinite samples, integers that are no PCM format, floats far beyond full scale), naming
                the clip and the remedy.
        """
        if sampling_rate is None:
            logger.warning_once(
                f"Pass `sampling_rate` to {type(self).__name__}: without it, audio that is not at "
                f"{self.sampling_rate} Hz gives wrong features unnoticed."
            )
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"The audio is at {sampling_rate} Hz, but this feature extractor takes {self.sampling_rate} Hz. "
                f"Resample it first: torchaudio.functional.resample(waveform, {sampling_rate}, {self.sampling_rate})."
            )
        max_length = self.max_length if max_length is None else max_length
        if max_length <= 0 or max_length % self.patch_size:
            raise ValueError(f"max_length={max_length} must be a positive multiple of patch_size={self.patch_size}.")
        if padding not in (True, "longest", "max_length"):
            raise ValueError(f'padding={padding!r} is not supported; use "max_length" or "longest".')

        clips = [self._to_waveform(clip, i) for i, clip in enumerate(_as_clips(raw_speech))]
        num_samples = [len(clip) for clip in clips]
        frame_counts = [self.num_frames(n) for n in num_samples]
        if truncation:
            frame_counts = [min(n, max_length) for n in frame_counts]
        if padding == "max_length":
            length = max_length
            if max(frame_counts) > length:
                raise ValueError(
                    f"Clip {frame_counts.index(max(frame_counts))} has {max(frame_counts)} frames, more than "
                    f'max_length={length}. Use truncation=True to cut it, padding="longest", or a larger max_length.'
                )
        else:
            length = -(-max(frame_counts) // self.patch_size) * self.patch_size

        device = clips[0].device if device is None else torch.device(device)
        waveforms = torch.nn.utils.rnn.pad_sequence([clip.to(device) for clip in clips], batch_first=True)
        self._check_samples(waveforms)
        sample_counts = torch.tensor(num_samples, device=device)[:, None]
        # The mean is the whole clip's, also of a clip that is cut below; zeros after a clip touch none of its frames.
        waveforms = waveforms - waveforms.sum(1, keepdim=True) / sample_counts

        frame_shift = self.sampling_rate * FRAME_SHIFT_MS // 1000
        used_samples = (max(frame_counts) - 1) * frame_shift + self.min_samples
        log_mel = log_mel_spectrogram(waveforms[:, :used_samples], self.num_mel_bins, self.sampling_rate)
        features = torch.nn.functional.pad(log_mel, (0, 0, 0, length - log_mel.shape[1]))
        is_frame = torch.arange(length, device=device) < torch.tensor(frame_counts, device=device)[:, None]
        features.masked_fill_(~is_frame[..., None], self.padding_value)
        if self.do_normalize:
            features = features.sub_(self.mean).div_(2 * self.std)

        outputs = {"input_values": features}
        if return_attention_mask is None:
            return_attention_mask = self.return_attention_mask
        if return_attention_mask is None:
            return_attention_mask = padding != "max_length"
        if return_attention_mask:
            outputs["attention_mask"] = is_frame.long()
        if return_tensors is None:
            return BatchFeature({name: list(value.cpu().numpy()) for name, value in outputs.items()})
        if TensorType(return_tensors) is TensorType.NUMPY:
            return BatchFeature({name: value.cpu().numpy() for name, value in outputs.items()})
        return BatchFeature(outputs, tensor_type=return_tensors)

    def _to_waveform(self, clip: Any, index: int) -> torch.Tensor:
        """A clip of any accepted form as float32 of shape `(num_samples,)` at full scale 1."""
        try:
            clip = clip.detach() if isinstance(clip, torch.Tensor) else torch.from_numpy(np.array(clip))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Clip {index} is not an array of samples: {error}") from error
        if clip.is_floating_point():
            clip = clip.to(torch.float32)
        elif clip.dtype in PCM_ZERO_AND_SCALE:
            zero, scale = PCM_ZERO_AND_SCALE[clip.dtype]
            clip = (clip.to(torch.float32) - zero) / scale
        elif clip.numel():
            raise ValueError(
                f"Clip {index} has {clip.dtype} samples, whose full scale is unknown. Convert them to floats in "
                "[-1, 1], or keep the file's own uint8, int16 or int32."
            )
        if clip.ndim == 2 and 0 < clip.shape[0] <= clip.shape[1]:
            clip = clip.mean(0)
        if clip.ndim != 1:
            raise ValueError(
                f"Clip {index} has shape {tuple(clip.shape)}; a clip is (num_samples,) or, in a list, (channels, "
                "num_samples). Transpose audio that has its channels last."
            )
        if len(clip) < self.min_samples:
            raise ValueError(
                f"Clip {index} has {len(clip)} samples, less than one frame of {self.min_samples} "
                f"({FRAME_LENGTH_MS} ms at {self.sampling_rate} Hz). Drop it or pad it with zeros; if it is "
                "(num_samples, channels), transpose it."
            )
        return clip

    def _check_samples(self, waveforms: torch.Tensor) -> None:
        peaks = waveforms.abs().amax(1).tolist()
        for index, peak in enumerate(peaks):
            if not math.isfinite(peak):
                raise ValueError(f"Clip {index} has NaN or infinite samples; repair or drop it.")
            if peak > PEAK_LIMIT:
                raise ValueError(
                    f"Clip {index} peaks at {peak:g}, but full scale is 1: these look like integer samples kept as "
                    "floats. Divide them by their full scale (32768 for 16-bit audio)."
                )


def _as_clips(raw_speech: Any) -> list:
    """One clip or several, as a list of clips."""
    if isinstance(raw_speech, (np.ndarray, torch.Tensor)):
        if raw_speech.ndim not in (1, 2, 3):
            raise ValueError(
                f"Audio of shape {tuple(raw_speech.shape)}; pass (num_samples,), (batch_size, num_samples) or "
                "(batch_size, channels, num_samples)."
            )
        clips = [raw_speech] if raw_speech.ndim == 1 else list(raw_speech)
    elif isinstance(raw_speech, (list, tuple)):
        is_batch = len(raw_speech) > 0 and isinstance(raw_speech[0], (np.ndarray, torch.Tensor, list, tuple))
        is_batch = is_batch and np.ndim(raw_speech[0]) > 0
        clips = list(raw_speech) if is_batch else [raw_speech]
    else:
        raise ValueError(f"Audio must be an array, a tensor or a list, not {type(raw_speech).__name__}.")
    if not clips:
        raise ValueError("The batch of audio is empty.")
    return clips


SSLAMFeatureExtractor.register_for_auto_class()

__all__ = ["DATASET_PRESETS", "SSLAMFeatureExtractor", "log_mel_spectrogram", "mel_filters"]

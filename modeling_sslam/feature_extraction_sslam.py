"""The front end of SSLAM: waveforms to normalised log-mel spectrograms, in torch alone.

The filter bank is Kaldi's (as in `torchaudio.compliance.kaldi.fbank`), batched over clips and computed in float32 on
any device. It follows the published computation operation by operation: the logarithm magnifies rounding differences
wherever a mel bin holds little energy.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from types import SimpleNamespace
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
MEL_BINS_PER_BAND = 16
HUGE_PAGE_BYTES = 1 << 21


@lru_cache
@torch.inference_mode(False)  # who calls this next may want gradients through it
def mel_filters(num_mel_bins: int, sampling_rate: int, fft_length: int) -> torch.Tensor:
    """Kaldi's triangular filters, equally spaced on the mel scale 1127 ln(1 + f / 700) from 20 Hz to Nyquist.

    Returns:
        float32 of shape `(fft_length // 2, num_mel_bins)` on the CPU; without the Nyquist bin, which no filter passes.
        Computed in float32 as published: a filter between two FFT bins is the small difference of large numbers.
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
    return torch.minimum(rising, falling).clamp(min=0.0)


@lru_cache
def _filter_bands(
    num_mel_bins: int, sampling_rate: int, fft_length: int, device: torch.device
) -> list[tuple[slice, slice, torch.Tensor]]:
    """The filters as (columns, mel bins, weights) of neighbouring mel bins: these read a narrow band of the spectrum,
    so most of the whole matrix is zeros that need no multiplication. An FFT bin is two columns, the squares of its
    real and its imaginary part: they have the same weights, so that the product itself adds them up to the power."""
    filters = mel_filters(num_mel_bins, sampling_rate, fft_length)
    # Where TF32 is allowed, a GPU would round float32 factors to 10 bits.
    dtype = torch.float64 if device.type == "cuda" else torch.float32
    bands = []
    for start in range(0, num_mel_bins, MEL_BINS_PER_BAND):
        mel_bins = slice(start, start + MEL_BINS_PER_BAND)
        passed = filters[:, mel_bins].any(1).nonzero().flatten().tolist() or [0]
        first, last = passed[0], passed[-1] + 1
        weights = filters[first:last, mel_bins].repeat_interleave(2, 0)
        bands.append((slice(2 * first, 2 * last), mel_bins, weights.to(device, dtype)))
    return bands


def frames_per_block(device: torch.device) -> int:
    """Frames to transform at a time: on a CPU intermediate results should stay in its cache, with enough of them for
    several threads; elsewhere kernels should be few, and memory still small."""
    return 1024 if device.type == "cpu" else 1 << 14


def log_mel_transform(
    num_mel_bins: int,
    sampling_rate: int,
    max_frames: int,
    device: torch.device,
    mean: float = 0.0,
    scale: float = 1.0,
) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """Prepares the filter bank, with the memory that all its blocks of frames and all its calls share for what lies
    between: small enough, on a CPU, to stay in cache.

    Args:
        max_frames: Frames of a block, counted over clips.
        device: Of the waveforms and results.
        mean, scale: What the result is normalised by, as it leaves the cache.

    Returns:
        A function `(frames, outputs)` that fills float32 outputs `(batch_size, num_frames, num_mel_bins)` with
        `(log_mel - mean) / scale` of float32 frames `(batch_size, num_frames, frame_length)` of zero-mean clips: of
        several that together have no more than `max_frames`, or of one of any length.
    """
    frame_length = sampling_rate * FRAME_LENGTH_MS // 1000
    fft_length = 1 << (frame_length - 1).bit_length()
    factory: dict[str, Any] = {"dtype": torch.float32, "device": device}
    window = torch.hann_window(frame_length, periodic=False, **factory)
    # As tensors: a Python number is made one at every call.
    preemphasis, offset = torch.tensor(PREEMPHASIS, **factory), torch.tensor(-mean / scale, **factory)
    bands = _filter_bands(num_mel_bins, sampling_rate, fft_length, device)
    widths = (frame_length, frame_length, fft_length, num_mel_bins)
    scratch = _empty((max_frames * sum(widths),), device)  # in one piece, large enough for huge pages
    centered, previous, padded, mels = (
        part.view(max_frames, width)
        for part, width in zip(scratch.split([max_frames * width for width in widths]), widths, strict=True)
    )
    padded[:, frame_length:].zero_()

    @lru_cache  # nearly all blocks are of one size: their views need not be made again
    def views(batch_size: int, num_frames: int) -> SimpleNamespace:
        block, scaled, padded_block, mel = (
            buffer[: batch_size * num_frames] for buffer in (centered, previous, padded, mels)
        )
        shape = (batch_size, num_frames, -1)
        return SimpleNamespace(
            block=block.view(shape),
            scaled=scaled.view(shape),
            # Samples and those before them, in one long row: many rows of 399 are slow. A frame's first sample meets
            # another frame's last so, but the window is 0 there.
            later=block.view(-1)[1:],
            before=scaled.view(-1)[:-1],
            windowed=padded_block[:, :frame_length].view(shape),
            padded=padded_block,
            mel=mel.view(shape),
            products=[(columns, weights, mel[:, mel_bins]) for columns, mel_bins, weights in bands],
        )

    def transform_block(frames: torch.Tensor, output: torch.Tensor) -> None:
        of = views(*frames.shape[:2])
        torch.sub(frames, frames.mean(-1, keepdim=True), out=of.block)
        torch.mul(of.block, preemphasis, out=of.scaled)
        of.later.sub_(of.before)
        torch.mul(of.block, window, out=of.windowed)
        squares = torch.view_as_real(torch.fft.rfft(of.padded)).flatten(1).square_()
        for columns, weights, filtered in of.products:
            if weights.dtype == filtered.dtype:
                torch.mm(squares[:, columns], weights, out=filtered)  # autocast leaves a product with `out` as it is
            else:
                filtered.copy_(torch.mm(squares[:, columns].to(weights.dtype), weights))
        torch.add(offset, of.mel.clamp_(min=LOG_FLOOR).log_(), alpha=1 / scale, out=output)

    def transform(frames: torch.Tensor, outputs: torch.Tensor) -> None:
        if frames.shape[1] <= max_frames:  # what follows would make views, for a fortieth of the time
            transform_block(frames, outputs)
        else:
            for block, result in zip(frames.split(max_frames, 1), outputs.split(max_frames, 1), strict=True):
                transform_block(block, result)

    return transform


@torch.no_grad()
def log_mel_spectrogram(waveforms: torch.Tensor, num_mel_bins: int = 128, sampling_rate: int = 16_000) -> torch.Tensor:
    """Kaldi log-mel filter bank of zero-mean waveforms: 25 ms Hann windows every 10 ms, only where they fit whole.

    Args:
        waveforms: float32 of shape `(batch_size, num_samples)`, on any device.

    Returns:
        float32 of shape `(batch_size, num_frames, num_mel_bins)`, natural logarithm of the power, at least ln(eps).
    """
    frame_length, frame_shift = (sampling_rate * ms // 1000 for ms in (FRAME_LENGTH_MS, FRAME_SHIFT_MS))
    frames = waveforms.unfold(-1, frame_length, frame_shift)
    batch_size, num_frames, _ = frames.shape
    max_frames = min(batch_size * num_frames, frames_per_block(waveforms.device))
    log_mel = torch.empty(batch_size, num_frames, num_mel_bins, dtype=torch.float32, device=waveforms.device)
    transform = log_mel_transform(num_mel_bins, sampling_rate, max_frames, waveforms.device)
    clips_per_part = max(1, max_frames // num_frames)
    for part, result in zip(frames.split(clips_per_part), log_mel.split(clips_per_part), strict=True):
        transform(part, result)
    return log_mel


class SSLAMFeatureExtractor(SequenceFeatureExtractor):
    """Turns waveforms into the `input_values` of SSLAM as the published code does: the clip's mean removed, Kaldi's
    filter bank, padding with zeros, then `(x - mean) / (2 * std)`, which makes the padding `-mean / (2 * std)`.

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
        if feature_size != 1 or self.padding_side != "right":
            raise ValueError(
                f"feature_size={feature_size} and padding_side={self.padding_side!r} must be 1 and 'right': channels "
                "are averaged, and padding follows the clip."
            )
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
    def frame_length(self) -> int:
        """Samples of a frame, and so of the shortest clip: 400 (25 ms) at 16 kHz."""
        return self.sampling_rate * FRAME_LENGTH_MS // 1000

    @property
    def frame_shift(self) -> int:
        """Samples from one frame to the next: 160 (10 ms) at 16 kHz."""
        return self.sampling_rate * FRAME_SHIFT_MS // 1000

    def num_frames(self, num_samples: int) -> int:
        """Frames of a clip of that many samples (at least `frame_length`)."""
        return 1 + (num_samples - self.frame_length) // self.frame_shift

    def num_samples(self, num_frames: int) -> int:
        """Samples that so many frames reach over: the shortest clip that has them."""
        return (num_frames - 1) * self.frame_shift + self.frame_length

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
        clips = [clip.to(device) for clip in clips]
        features = _empty((len(clips), length, self.num_mel_bins), device)
        self._extract(clips, frame_counts, features)

        outputs = {"input_values": features}
        if return_attention_mask is None:
            return_attention_mask = self.return_attention_mask
        if return_attention_mask is None:
            return_attention_mask = padding != "max_length"
        if return_attention_mask:
            frames, num_frames = torch.arange(length, device=device), torch.tensor(frame_counts, device=device)
            outputs["attention_mask"] = (frames < num_frames[:, None]).long()
        if return_tensors is None:
            return BatchFeature({name: list(value.cpu().numpy()) for name, value in outputs.items()})
        if TensorType(return_tensors) is TensorType.NUMPY:
            return BatchFeature({name: value.cpu().numpy() for name, value in outputs.items()})
        return BatchFeature(outputs, tensor_type=return_tensors)

    @torch.inference_mode()
    def _extract(self, clips: list[torch.Tensor], frame_counts: list[int], features: torch.Tensor) -> None:
        """Fills `features` `(len(clips), T, num_mel_bins)` with the clips' first frames and padding, and checks the
        samples on the way: to read large batches once more takes time."""
        longest = max(frame_counts)
        max_frames = min(len(clips) * longest, frames_per_block(features.device))
        mean, scale = (self.mean, 2 * self.std) if self.do_normalize else (0.0, 1.0)
        padding = torch.tensor(self.padding_value, dtype=torch.float32, device="cpu").sub_(mean).div_(scale).item()
        transform = log_mel_transform(self.num_mel_bins, self.sampling_rate, max_frames, features.device, mean, scale)
        clips_per_part = max(1, max_frames // longest)
        shape = (min(len(clips), clips_per_part), self.num_samples(longest))
        buffer = torch.empty(shape, dtype=torch.float32, device=features.device)

        @lru_cache  # nearly all parts are alike
        def views(num_clips: int, num_frames: int) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
            waveforms = buffer[:num_clips, : self.num_samples(num_frames)]
            return waveforms.unbind(), waveforms.unfold(-1, self.frame_length, self.frame_shift)

        bounds: list[torch.Tensor] = []
        for start in range(0, len(clips), clips_per_part):
            part = slice(start, start + clips_per_part)
            num_frames = max(frame_counts[part])
            waveforms, frames = views(len(clips[part]), num_frames)
            for waveform, clip in zip(waveforms, clips[part], strict=True):
                bounds += torch.aminmax(clip)
                if len(clip) < len(waveform):
                    waveform[len(clip) :].zero_()  # they touch none of the clip's frames
                    waveform = waveform[: len(clip)]
                # The mean is the whole clip's, also of one that is cut.
                torch.sub(clip[: len(waveform)], clip.mean(), out=waveform)
            transform(frames, features[part, :num_frames])
        features[:, longest:].fill_(padding)
        for clip_features, count in zip(features[:, :longest], frame_counts, strict=True):
            if count < longest:
                clip_features[count:].fill_(padding)
        self._check_peaks(torch.stack(bounds).view(-1, 2).abs().amax(1).tolist())

    def _to_waveform(self, clip: Any, index: int) -> torch.Tensor:
        """A clip of any accepted form as float32 of shape `(num_samples,)` at full scale 1."""
        if isinstance(clip, torch.Tensor):
            clip = clip.detach()
        else:
            try:
                # Contiguous and writable, as torch wants arrays; copied only if it is not.
                clip = torch.from_numpy(np.require(clip, requirements=("C", "W")))
            except (TypeError, ValueError) as error:
                raise ValueError(f"Clip {index} is not an array of samples: {error}") from error
        if clip.is_floating_point():
            clip = clip.to(torch.float32)
        elif clip.dtype in PCM_ZERO_AND_SCALE:
            zero, scale = PCM_ZERO_AND_SCALE[clip.dtype]
            clip = clip.to(torch.float32).sub_(zero).div_(scale)
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
        if len(clip) < self.frame_length:
            raise ValueError(
                f"Clip {index} has {len(clip)} samples, less than one frame of {self.frame_length} "
                f"({FRAME_LENGTH_MS} ms at {self.sampling_rate} Hz). Drop it or pad it with zeros; if it is "
                "(num_samples, channels), transpose it."
            )
        return clip

    @staticmethod
    def _check_peaks(peaks: list[float]) -> None:
        for index, peak in enumerate(peaks):
            if not math.isfinite(peak):
                raise ValueError(f"Clip {index} has NaN or infinite samples; repair or drop it.")
            if peak > PEAK_LIMIT:
                raise ValueError(
                    f"Clip {index} peaks at {peak:g}, but full scale is 1: these look like integer samples kept as "
                    "floats. Divide them by their full scale (32768 for 16-bit audio)."
                )


def _empty(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """New float32 memory. On a CPU it is numpy's, which asks Linux for huge pages where it is large: the system clears
    pages before their first use, and of small ones that takes a sixth of the whole front end's time."""
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.float32, device=device)
    memory = np.empty(shape, dtype=np.float32)
    # Threads that meet in a page nobody has used yet would each clear one, and throw all but one away.
    memory.reshape(-1)[:: HUGE_PAGE_BYTES // memory.itemsize] = 0
    return torch.from_numpy(memory)


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
        first = raw_speech[0] if len(raw_speech) else 0.0
        is_batch = isinstance(first, (list, tuple)) or getattr(first, "ndim", 0) > 0
        clips = list(raw_speech) if is_batch else [raw_speech]
    else:
        raise ValueError(f"Audio must be an array, a tensor or a list, not {type(raw_speech).__name__}.")
    if not clips:
        raise ValueError("The batch of audio is empty.")
    return clips


SSLAMFeatureExtractor.register_for_auto_class()

__all__ = ["DATASET_PRESETS", "SSLAMFeatureExtractor", "log_mel_spectrogram", "mel_filters"]

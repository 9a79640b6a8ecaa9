"""The feature extractor of SSLAM: waveforms to normalised log-mel spectrograms, in torch alone."""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from os import PathLike
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, PretrainedConfig, SequenceFeatureExtractor
from transformers.utils import PaddingStrategy, TensorType, logging, to_numpy

from .configuration_sslam import published_layout
from .filter_bank_sslam import (
    FRAME_LENGTH_MS,
    FRAMES_AT_A_TIME_ON_CPU,
    DeviceConstants,
    LogMelFilterBank,
    allocate,
    device_constants,
    frame_sizes,
    is_host,
    log_mel_in_parts,
    log_mel_spectrogram,
    mel_filters,
)
from .transfers_sslam import read_later, send

logger = logging.get_logger(__name__)

# Mean and standard deviation of the log-mel bins, and the clip length in frames, that the published models were
# trained with on each dataset.
DATASET_PRESETS: dict[str, dict[str, float]] = {
    "audioset": {"mean": -4.268, "std": 4.569, "max_length": 1024},
    "esc50": {"mean": -6.627, "std": 5.359, "max_length": 512},
    "speech_commands": {"mean": -6.846, "std": 5.565, "max_length": 128},
    # The Earth Species Project's EATs (esp-aves2); the values are from their package `avex`.
    "esp_aves2": {"mean": -5.553, "std": 4.606, "max_length": 1024},
}
# Arguments of `from_pretrained` that say where a file is and who asks for it.
HUB_ARGUMENTS = (
    *("cache_dir", "force_download", "proxies", "subfolder", "token", "local_files_only", "revision"),
    *("_from_auto", "_from_pipeline"),
)

# Float audio has full scale 1. A peak 20 dB above it means integer samples that were never divided by their range.
PEAK_LIMIT = 10.0
# Zero and full scale of the integer PCM formats that sound files hold.
PCM_ZERO_AND_SCALE = {torch.uint8: (128.0, 128.0), torch.int16: (0.0, 2.0**15), torch.int32: (0.0, 2.0**31)}


class SSLAMFeatureExtractor(SequenceFeatureExtractor):
    """Feature extractor of SSLAM: waveforms to `input_values`, as in the published code.

    The steps are: subtract the clip's mean, apply Kaldi's log-mel filter bank, pad with zeros, and normalise by
    `(x - mean) / (2 * std)`. Padding is therefore `-mean / (2 * std)` in the result.

    Args:
        feature_size: Channels of the waveform after mixing down; always 1.
        sampling_rate: Sampling rate in Hz that the model was trained at.
        num_mel_bins: Mel bins F.
        max_length: Frames T (10 ms each) that clips are padded or cut to; a multiple of `patch_size`.
        patch_size: Frames of one patch; lengths are padded to a multiple of it.
        mean: Mean of the log-mel bins over the training set. See [`SSLAMFeatureExtractor.for_dataset`].
        std: Standard deviation of the same values.
        do_normalize: Whether to normalise by `mean` and `std`.
        padding_value: Log-mel value of padding frames, before normalisation; 0 as published.
        return_attention_mask: Whether to return the mask of real frames. `None` returns it with `padding="longest"`
            only. (The published models attend to the padding of clips padded to `max_length`.)

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
        _check_max_length(max_length, patch_size)
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
        """Create an extractor with the statistics and the clip length of a dataset.

        Args:
            name: "audioset", "esc50", "speech_commands" or "esp_aves2".
            overrides: Further arguments of the class, which take precedence.
        """
        if name not in DATASET_PRESETS:
            raise ValueError(f"No preset for dataset {name!r}; there are {', '.join(DATASET_PRESETS)}.")
        return cls(**(DATASET_PRESETS[name] | overrides))

    @classmethod
    def get_feature_extractor_dict(
        cls, pretrained_model_name_or_path: str | PathLike[Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a preprocessor_config.json as transformers does.

        The published layouts have no such file. Their config.json gives the arguments.
        """
        try:
            return super().get_feature_extractor_dict(pretrained_model_name_or_path, **kwargs)
        except OSError:
            found = published_front_end(pretrained_model_name_or_path, kwargs)
            if found is None:
                raise
            return found

    @property
    def frame_length(self) -> int:
        """Samples of a frame, which is also the shortest clip: 400 (25 ms) at 16 kHz."""
        return frame_sizes(self.sampling_rate)[0]

    @property
    def frame_shift(self) -> int:
        """Samples from one frame to the next: 160 (10 ms) at 16 kHz."""
        return frame_sizes(self.sampling_rate)[1]

    def num_frames(self, num_samples: int) -> int:
        """Count the frames of a clip of `num_samples` samples (at least `frame_length`)."""
        return 1 + (num_samples - self.frame_length) // self.frame_shift

    def num_samples(self, num_frames: int) -> int:
        """Count the samples of the shortest clip that has `num_frames` frames."""
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
        """Compute the features of one clip or of several.

        Args:
            raw_speech: One clip: a 1-D array, tensor or list of floats in [-1, 1], or of int16, int32 or uint8 PCM.
                Several: a list of clips or a 2-D array `(batch_size, num_samples)`. A clip *inside* a list may also be
                `(channels, num_samples)`; channels are averaged.
            sampling_rate: Sampling rate of the clips. Any other rate than the extractor's is an error.
            padding: "max_length" pads every clip to `max_length` frames. "longest" (or `True`) pads to the frames of
                the longest clip, rounded up to a whole patch.
            max_length: Frames to pad and cut to, instead of the extractor's own; a multiple of `patch_size`.
            truncation: Whether to cut clips at `max_length`. If not, "max_length" refuses longer clips and "longest"
                takes recordings of any length.
            return_attention_mask: See the class.
            return_tensors: "pt" or "np"; `None` gives a list of numpy arrays.
            device: Device to compute on; by default the (first) clip's device.

        Returns:
            `input_values`, float32 of shape `(batch_size, T, num_mel_bins)`, and if asked for `attention_mask`, int64
            of shape `(batch_size, T)`: 1 for frames of the clip, 0 for padding.

        Raises:
            ValueError: If the audio cannot give right features: another sampling rate, a clip that is empty or shorter
                than one frame, NaN or infinite samples, integers in no PCM format, floats far beyond full scale. The
                message names the clip and the remedy.
        """
        self._check_sampling_rate(sampling_rate)
        max_length = self.max_length if max_length is None else max_length
        _check_max_length(max_length, self.patch_size)
        if padding not in (True, "longest", "max_length"):
            raise ValueError(f'padding={padding!r} is not supported; use "max_length" or "longest".')

        clips = [self._to_waveform(clip, i) for i, clip in enumerate(_as_clips(raw_speech))]
        frame_counts = [self.num_frames(len(clip)) for clip in clips]
        if truncation:
            frame_counts = [min(n, max_length) for n in frame_counts]
        longest = max(frame_counts)
        if padding == "max_length":
            length = max_length
            if longest > length:
                raise ValueError(
                    f"Clip {frame_counts.index(longest)} has {longest} frames, more than max_length={length}. "
                    'Use truncation=True to cut it, padding="longest", or a larger max_length.'
                )
        else:
            length = math.ceil(longest / self.patch_size) * self.patch_size

        device = clips[0].device if device is None else torch.device(device)
        if is_host(device):
            features = allocate((len(clips), length, self.num_mel_bins))
            self._extract([clip.to(device) for clip in clips], frame_counts, features)
        else:
            features = self.extract_rows(_as_rows(clips, device), [len(clip) for clip in clips], length, device)

        outputs = {"input_values": features}
        if return_attention_mask is None:
            return_attention_mask = self.return_attention_mask
        if return_attention_mask is None:
            return_attention_mask = padding != "max_length"
        if return_attention_mask:
            num_frames = send(torch.tensor(frame_counts, device="cpu"), device)
            outputs["attention_mask"] = (torch.arange(length, device=device) < num_frames[:, None]).long()
        if return_tensors is None:
            return BatchFeature({name: list(value.cpu().numpy()) for name, value in outputs.items()})
        if TensorType(return_tensors) is TensorType.NUMPY:
            return BatchFeature({name: value.cpu().numpy() for name, value in outputs.items()})
        return BatchFeature(outputs, tensor_type=return_tensors)

    def pad(
        self,
        processed_features: BatchFeature | Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: bool | str | PaddingStrategy = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | TensorType | None = None,
    ) -> BatchFeature:
        """Pad features of different lengths to one batch. Data collators and transformers' `Trainer` call this.

        Args:
            processed_features: Results of the extractor: one mapping for each clip, or one mapping of lists or arrays.
                Other entries, such as labels, are stacked.
            padding: `True` or "longest" pads to the longest clip, "max_length" to `max_length`; `False` does not pad.
            max_length: Frames to pad or cut to, instead of the extractor's own.
            truncation: Whether to cut clips at `max_length`. If not, "max_length" refuses longer clips.
            pad_to_multiple_of: Lengths are rounded up to a multiple of it, and always of `patch_size`.
            return_attention_mask: Whether to return the mask of real frames. `None` returns it if the features have
                one, and otherwise by the rule of the class.
            return_tensors: "pt" or "np"; by default the type of the features.

        Returns:
            See `__call__`. Padding follows the clips and has the same value as there.

        Raises:
            ValueError: If there is no clip, if one is not `(T, num_mel_bins)`, or if one is too long.
        """
        if not isinstance(processed_features, Mapping):
            names = processed_features[0] if len(processed_features) else ()
            processed_features = {name: [clip[name] for clip in processed_features] for name in names}
        features = dict(processed_features)
        if not len(features.get("input_values", ())):
            raise ValueError(f"The batch has no input_values to pad; it has {', '.join(features) or 'no clips'}.")
        if return_tensors is None and isinstance(features["input_values"][0], torch.Tensor):
            return_tensors = "pt"
        features["input_values"] = [self._to_frames(clip, i) for i, clip in enumerate(features["input_values"])]
        if "attention_mask" in features:
            features["attention_mask"] = [to_numpy(mask).reshape(-1) for mask in features["attention_mask"]]
        if return_attention_mask is None:
            return_attention_mask = "attention_mask" in features or self.return_attention_mask
        if return_attention_mask is None:
            return_attention_mask = padding != "max_length"
        if not return_attention_mask:
            features.pop("attention_mask", None)
        return super().pad(
            features,
            padding=padding,
            max_length=self.max_length if max_length is None else max_length,
            truncation=truncation,
            pad_to_multiple_of=pad_to_multiple_of,
            return_attention_mask=return_attention_mask,
            return_tensors=return_tensors,
        )

    def _pad(
        self,
        processed_features: dict[str, np.ndarray] | BatchFeature,
        max_length: int | None = None,
        padding_strategy: PaddingStrategy = PaddingStrategy.DO_NOT_PAD,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
    ) -> dict[str, np.ndarray]:
        # The base class calls this for each clip, and "longest" has become the number of frames of the longest.
        padded = dict(processed_features)
        frames = padded["input_values"]
        if return_attention_mask:
            padded.setdefault("attention_mask", np.ones(len(frames), dtype=np.int64))
        if padding_strategy == PaddingStrategy.DO_NOT_PAD or max_length is None:
            return padded
        multiple = math.lcm(self.patch_size, pad_to_multiple_of or 1)
        missing = math.ceil(max_length / multiple) * multiple - len(frames)
        if missing < 0:
            raise ValueError(
                f"A clip has {len(frames)} frames, more than max_length={max_length}. Use truncation=True to cut it, "
                'padding="longest", or a larger max_length.'
            )
        padded["input_values"] = np.pad(frames, ((0, missing), (0, 0)), constant_values=self.padding_in_result())
        if return_attention_mask:
            padded["attention_mask"] = np.pad(padded["attention_mask"], (0, missing))
        return padded

    def _to_frames(self, clip: Any, index: int) -> np.ndarray:
        """Return a clip's features as an array `(T, num_mel_bins)`, without the axis of a batch of one."""
        frames = to_numpy(clip)
        if frames.ndim == 3 and len(frames) == 1:
            frames = frames[0]
        if frames.ndim != 2 or frames.shape[1] != self.num_mel_bins:
            raise ValueError(
                f"The features of clip {index} have shape {frames.shape}; `pad` takes (T, {self.num_mel_bins}) for "
                "each clip, as the extractor returns it."
            )
        return frames

    def _normalisation(self) -> tuple[float, float]:
        """Return the value to subtract from log-mel values, and the value to divide by afterwards."""
        return (self.mean, 2 * self.std) if self.do_normalize else (0.0, 1.0)

    def padding_in_result(self) -> float:
        """Return the value of padding in the result, rounded to float32 as the clips' frames are."""
        mean, scale = self._normalisation()
        return torch.tensor(self.padding_value, dtype=torch.float32, device="cpu").sub_(mean).div_(scale).item()

    @torch.inference_mode()
    def _extract(self, clips: list[torch.Tensor], frame_counts: list[int], features: torch.Tensor) -> None:
        """Fill `features` on a CPU with the first frames of the clips and with padding.

        The samples are checked on the way, because reading a large batch a second time takes time.

        Args:
            clips: Waveforms of shape `(num_samples,)`.
            frame_counts: Frames to compute of each clip.
            features: float32 of shape `(len(clips), T, num_mel_bins)`.
        """
        longest = max(frame_counts)
        max_frames = min(len(clips) * longest, FRAMES_AT_A_TIME_ON_CPU)
        mean, scale = self._normalisation()
        padding = self.padding_in_result()
        filter_bank = LogMelFilterBank(self.num_mel_bins, self.sampling_rate, max_frames, mean, scale)
        clips_per_part = max(1, max_frames // longest)
        shape = (min(len(clips), clips_per_part), self.num_samples(longest))
        buffer = torch.empty(shape, dtype=torch.float32, device=features.device)

        @lru_cache  # nearly all parts have the same size, and making views takes time
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
                    waveform[len(clip) :].zero_()  # none of the clip's own frames reads these samples
                    waveform = waveform[: len(clip)]
                # Subtract the mean of the whole clip, even if the clip is cut.
                torch.sub(clip[: len(waveform)], clip.mean(), out=waveform)
            filter_bank(frames, features[part, :num_frames])
        features[:, longest:].fill_(padding)
        for clip_features, count in zip(features[:, :longest], frame_counts, strict=True):
            if count < longest:
                clip_features[count:].fill_(padding)
        check_peaks(torch.stack(bounds).view(-1, 2).abs().amax(1).tolist())

    @torch.no_grad()  # not inference mode, whose tensors a model in training could not keep for its backward pass
    def extract_rows(
        self, waveforms: torch.Tensor, num_samples: Sequence[int], length: int, device: torch.device
    ) -> torch.Tensor:
        """Compute the features of a batch on a device that is not a CPU.

        Every step computes all clips together, because starting a kernel for each clip takes longer than the kernels.
        Nothing waits for the device, except that clips which lie there are checked there.

        Args:
            waveforms: float32 of shape `(batch_size, max(num_samples))` on any device, zero-padded.
            num_samples: Samples of each clip, at least `frame_length`.
            length: Frames T to pad and cut to.
            device: Device to compute on.

        Returns:
            float32 of shape `(batch_size, T, num_mel_bins)` on the device.

        Raises:
            ValueError: If a clip has NaN or infinite samples or lies far beyond full scale.
        """
        read_peaks = read_later(torch.linalg.vector_norm(waveforms, torch.inf, -1))
        waveforms = send(waveforms, device)
        if min(num_samples) == waveforms.shape[1]:
            waveforms = waveforms - waveforms.mean(-1, keepdim=True)
        else:
            counts = send(torch.tensor(num_samples, device="cpu"), device)
            waveforms = waveforms - (waveforms.sum(-1) / counts)[:, None]  # frames of padding are overwritten below
        frame_counts = [min(self.num_frames(count), length) for count in num_samples]
        longest, padding = max(frame_counts), self.padding_in_result()
        constants = device_constants(self.num_mel_bins, self.sampling_rate, device)
        features = self.features_of_centered(waveforms[:, : self.num_samples(longest)], length, padding, constants)
        if min(frame_counts) < longest:
            counts = send(torch.tensor(frame_counts, device="cpu"), device)
            is_padding = torch.arange(length, device=device) >= counts[:, None]
            features.masked_fill_(is_padding[..., None], padding)
        check_peaks(read_peaks().tolist())
        return features

    def features_of_centered(
        self, waveforms: torch.Tensor, length: int, padding: float, constants: DeviceConstants
    ) -> torch.Tensor:
        """Compute the normalised features of zero-mean clips of equal length by operators that torch.compile takes.

        Args:
            waveforms: float32 of shape `(batch_size, num_samples)`, of at most `length` frames.
            length: Frames T to pad to.
            padding: The value of padding in the result.
            constants: The filter bank's constants on the waveforms' device.

        Returns:
            float32 of shape `(batch_size, T, num_mel_bins)`.
        """
        mean, scale = self._normalisation()
        values = log_mel_in_parts(waveforms, constants).sub_(mean).div_(scale)
        return torch.nn.functional.pad(values, (0, 0, 0, length - values.shape[1]), value=padding)

    def _check_sampling_rate(self, sampling_rate: int | None) -> None:
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

    def _to_waveform(self, clip: Any, index: int) -> torch.Tensor:
        """Convert a clip of any accepted form to float32 of shape `(num_samples,)` at full scale 1."""
        if isinstance(clip, torch.Tensor):
            clip = clip.detach()
        else:
            try:
                # torch requires contiguous and writable arrays; numpy copies only those that are not.
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


def published_front_end(
    pretrained_model_name_or_path: str | PathLike[Any], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Derive the arguments of a feature extractor from the config.json of a checkpoint in a published layout.

    Args:
        pretrained_model_name_or_path: Folder or repository.
        kwargs: Arguments of `from_pretrained`.

    Returns:
        The feature extractor's arguments and the part of `kwargs` that does not say where a file is. None for a
        checkpoint in any other layout.
    """
    where = {name: kwargs[name] for name in HUB_ARGUMENTS if kwargs.get(name) is not None}
    try:
        settings, _ = PretrainedConfig.get_config_dict(pretrained_model_name_or_path, **where)
    except OSError:
        return None
    layout = published_layout(settings)
    if layout is None:
        return None
    return layout.front_end(settings), {name: kwargs[name] for name in kwargs.keys() - set(HUB_ARGUMENTS)}


def _check_max_length(max_length: int, patch_size: int) -> None:
    if max_length <= 0 or max_length % patch_size:
        raise ValueError(f"max_length={max_length} must be a positive multiple of patch_size={patch_size}.")


def _as_rows(clips: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Return a tensor with a clip in each row, zero-padded. Clips that lie on several devices move to `device`."""
    if len({clip.device for clip in clips}) > 1:
        clips = [clip.to(device) for clip in clips]
    if len(clips) == 1:
        return clips[0][None]
    if min(map(len, clips)) == max(map(len, clips)):
        return torch.stack(clips)
    return torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)


def check_peaks(peaks: list[float]) -> None:
    """Check the largest absolute sample of each clip.

    Raises:
        ValueError: If it is NaN or infinite or far beyond full scale.
    """
    for index, peak in enumerate(peaks):
        if not math.isfinite(peak):
            raise ValueError(f"Clip {index} has NaN or infinite samples; repair or drop it.")
        if peak > PEAK_LIMIT:
            raise ValueError(
                f"Clip {index} peaks at {peak:g}, but full scale is 1: these look like integer samples kept as "
                "floats. Divide them by their full scale (32768 for 16-bit audio)."
            )


def _as_clips(raw_speech: Any) -> list:
    """Return one clip or several as a list of clips."""
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

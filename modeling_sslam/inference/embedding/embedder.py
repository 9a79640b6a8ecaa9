"""Embeddings of sounds: recordings are cut into windows, and the encoder's states of each window are pooled.

    for clip in embed(["recordings/"], "outputs/quickstart/classifier/model"):
        clip.name, clip.start, clip.end, clip.embedding          # "recordings/a.flac", 0.0, 10.24, (hidden_size,)

A window is padded as in training. It gets the embedding that the same piece of sound gets by itself (see
[`modeling_sslam.inference.windows`]). Threads decode, resample and compute the filter bank while the model runs.
"""

import math
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ...common.audio import waveform_blocks
from ...common.errors import ClipError, InferenceError
from ...common.glibc import MemoryTrimmer
from ...feature_extraction_sslam import SSLAMFeatureExtractor, check_peaks
from ...filter_bank_sslam import DeviceConstants, device_constants
from ...modeling_sslam import SSLAMModel
from ...transfers_sslam import read_later, send
from ..compilation import check_compilable, compile_function, fill_batch
from ..devices import choose_batch_size, compute_in_parts
from ..loading import load_pretrained, speed_up
from ..packed_blocks import precision_of
from ..scores import check_finite
from ..streams import prefetch_beside
from ..windows import cut_windows, model_inputs, stream_log_mel
from . import EMBEDDING_POOLINGS
from .sounds import Sound
from .sources import find_sounds


class Window(NamedTuple):
    """A piece of a sound: log-mel frames `(num_frames, num_mel_bins)`, neither padded nor normalised."""

    sound: Sound
    number: int
    first_frame: int
    frames: torch.Tensor
    is_last: bool


class Failure(NamedTuple):
    """A sound that cannot be used, or only as far as the windows that came before."""

    sound: Sound
    error: ClipError


class ClipEmbedding(NamedTuple):
    """The embedding of one window.

    Args:
        name: Path or id of the sound.
        start, end: Limits of the window, in seconds from the beginning of the sound.
        embedding: float32. `(hidden_size,)` for pooling "cls" and "mean"; for "frame" `(time, hidden_size)`, one state
            every `patch_size` frames (160 ms); for "patch" `(time, mel bands, hidden_size)`. Layer "all" adds an axis
            in front: the embeddings' output, then one entry for each block.
        key: Unique key of the sound: its path, or its place in a data set.
        window: Number of the window within the sound.
        is_last: Whether this is the last window of the sound.
    """

    name: str
    start: float
    end: float
    embedding: np.ndarray
    key: str
    window: int
    is_last: bool


class Embedder:
    """An encoder, with the settings of windows and pooling.

    Args:
        model: The encoder, on the device and in the precision to compute in.
        feature_extractor: The model's feature extractor.
        pooling: "cls": the CLS token. "mean": the mean over the patches that hold any of the clip. "frame": one
            vector every `patch_size` frames, the mean over frequency. "patch": every patch. Frames and patches that
            are padding throughout are left out.
        layer: "last", "all", "mean" (over the blocks) or the number of a block; 0 is the embeddings' output.
        window: Length of a window in seconds; by default the feature extractor's `max_length` (10.24 s).
        hop: Step from one window to the next in seconds; by default `window`. The last window ends with the recording.
        batch_size: Windows per batch. "auto" chooses it by the device's free memory and halves it if that runs out.
        compile: Whether to compile the model, with CUDA graphs on a GPU. The last windows are then filled up to a
            whole batch, and "auto" does not halve the batch. Always call such an embedder from the same thread.

    Raises:
        InferenceError: If there is no such pooling, if the model has no such layer or takes no such window, or if it
            is to be compiled and has packed blocks.
    """

    def __init__(
        self,
        model: SSLAMModel,
        feature_extractor: SSLAMFeatureExtractor,
        pooling: str = "cls",
        layer: str | int = "last",
        window: float | None = None,
        hop: float | None = None,
        batch_size: int | str = "auto",
        compile: bool = False,
    ) -> None:
        config, extractor = model.config, feature_extractor
        if pooling not in EMBEDDING_POOLINGS:
            raise InferenceError(f"pooling={pooling!r} is not one of {', '.join(EMBEDDING_POOLINGS)}.")
        if layer not in ("last", "all", "mean", *range(config.num_hidden_layers + 1)):
            raise InferenceError(
                f"layer={layer!r} is neither last, all, mean nor a number from 0 to {config.num_hidden_layers}."
            )
        self.model = model.eval()
        self.feature_extractor = extractor
        self.frames_per_second = extractor.sampling_rate / extractor.frame_shift
        self.patch_frames = config.patch_size
        self.window = extractor.max_length if window is None else round(window * self.frames_per_second)
        self.hop = self.window if hop is None else round(hop * self.frames_per_second)
        longest = config.max_position_embeddings * self.patch_frames
        if not self.patch_frames <= self.window <= longest:
            raise InferenceError(
                f"A window of {window} s is not between one patch, {self.patch_frames / self.frames_per_second:g} s, "
                f"and the end of the model's position table, {longest / self.frames_per_second:g} s."
            )
        if not 1 <= self.hop <= self.window:
            raise InferenceError(
                f"A hop of {hop} s is not between one frame, {1 / self.frames_per_second:g} s, and the window of "
                f"{self.window / self.frames_per_second:g} s."
            )
        # A window longer than the training length is padded to whole patches.
        self.padded_length = max(extractor.max_length, self.num_time_patches(self.window) * self.patch_frames)
        self.pooling = pooling
        self.layer = layer
        self.batch_size = batch_size
        self.is_compiled = compile
        self._states_of: Callable[..., torch.Tensor] = self._compute_states
        self._states_of_waveforms: Callable[..., torch.Tensor] | None = None
        if compile:
            check_compilable(model)
            self._states_of = compile_function(self._compute_states, model.device)
            self._states_of_waveforms = compile_function(self._compute_states_of_waveforms, model.device)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        revision: str | None = None,
        **settings: Any,
    ) -> "Embedder":
        """Load an encoder, also from a classifier or a pre-training checkpoint. No code from the folder is run.

        Args:
            model: Folder or Hub repository (OWNER/NAME) that `save_pretrained` or `python -m conversion` wrote.
            device: "auto" takes the accelerator of this machine, or else the CPU.
            dtype: "auto" takes the precision of the saved weights; "int8", on a CPU, approximates float32 and cannot
                be compiled.
            revision: Branch, tag or commit on the Hub.
            settings: Other arguments of the class.

        Raises:
            InferenceError: If there is no SSLAM model or no such device, or if the class raises it.
        """
        encoder, extractor = load_pretrained(SSLAMModel, model, device, dtype, revision)
        embedder = cls(encoder, extractor, **settings)
        embedder.weights_crc32  # noqa: B018 - computed and kept now, because packing changes the weights
        embedder.model = speed_up(encoder, dtype, embedder.is_compiled)
        return embedder

    @property
    def hidden_size(self) -> int:
        """Size of a vector."""
        return self.model.config.hidden_size

    @cached_property
    def weights_crc32(self) -> str:
        """CRC-32 of the weights, in eight hexadecimal digits."""
        checksum = 0
        for _, tensor in sorted(self.model.state_dict().items()):
            checksum = zlib.crc32(tensor.detach().cpu().contiguous().view(torch.uint8).numpy(), checksum)
        return f"{checksum:08x}"

    def settings(self) -> dict[str, Any]:
        """Return everything that the embedding of a sound depends on, as JSON values."""
        extractor = self.feature_extractor
        return {
            "weights_crc32": self.weights_crc32,
            "dtype": precision_of(self.model),
            "pooling": self.pooling,
            "layer": self.layer,
            "window": self.window / self.frames_per_second,
            "hop": self.hop / self.frames_per_second,
            "padded_length": self.padded_length,
            "sampling_rate": extractor.sampling_rate,
            "mean": extractor.mean if extractor.do_normalize else None,
            "std": extractor.std if extractor.do_normalize else None,
            "attention_mask": bool(extractor.return_attention_mask),
        }

    def num_time_patches(self, num_frames: int) -> int:
        """Return the number of time steps of patches that hold any of `num_frames` frames."""
        return math.ceil(num_frames / self.patch_frames)

    def windows(self, sound: Sound) -> Iterator[Window | Failure]:
        """Read the windows of a sound in bounded memory, and its failure at the end if it cannot be used."""
        blocks = waveform_blocks(sound.audio, self.feature_extractor.sampling_rate)
        on_device = (send(block, self.model.device) for block in blocks)
        previous = None
        try:
            pieces = cut_windows(stream_log_mel(on_device, self.feature_extractor), self.window, self.hop)
            for number, (first_frame, frames) in enumerate(pieces):
                if previous is not None:
                    yield previous
                wanted = number >= sound.first_window
                previous = Window(sound, number, first_frame, frames.clone(), is_last=False) if wanted else None
            if previous is not None:
                yield previous._replace(is_last=True)
        except ClipError as error:
            if previous is not None:
                yield previous
            yield Failure(sound, error)

    @torch.inference_mode()
    def states(self, windows: Sequence[Window]) -> torch.Tensor:
        """Compute the pooled states `(num_windows, ..., hidden_size)` on the model's device, padding included."""
        inputs = model_inputs([window.frames for window in windows], self.padded_length, self.feature_extractor)
        counts = torch.tensor([self.num_time_patches(len(window.frames)) for window in windows])
        return self._states_of(inputs["input_values"], inputs.get("attention_mask"), send(counts, self.model.device))

    @torch.inference_mode()
    def embed_waveforms(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Embed clips of one length that lie in memory, each as one window, in the least time.

        The clips of each call are one batch. A compiled embedder computes everything from the samples to the
        embeddings in one graph, and compiles anew for each shape. Nothing waits for the device if the samples lie in
        the CPU's memory: they are copied from pinned memory.

        Args:
            waveforms: Samples in [-1, 1] at the model's rate, of shape `(batch_size, num_samples)`, on any device.

        Returns:
            As [`states`]: pooled states on the model's device, padding included. Reading them waits for the device.

        Raises:
            ValueError: If the clips are shorter than one frame or longer than the window, or have unusable samples.
        """
        extractor, device = self.feature_extractor, self.model.device
        num_samples = waveforms.shape[-1]
        if waveforms.ndim != 2 or num_samples < extractor.frame_length:
            raise ValueError(
                f"Waveforms of shape {tuple(waveforms.shape)}; pass (batch_size, num_samples) with at least "
                f"{extractor.frame_length} samples."
            )
        num_frames = extractor.num_frames(num_samples)
        if num_frames > self.padded_length:
            raise ValueError(
                f"Clips of {num_frames} frames are longer than {self.padded_length}; cut them, or use `embed`, which "
                "makes windows."
            )
        counts = send(torch.full((len(waveforms),), self.num_time_patches(num_frames)), device)
        if self._states_of_waveforms is None:
            inputs = extractor(
                waveforms,
                extractor.sampling_rate,
                "max_length",
                self.padded_length,
                return_tensors="pt",
                device=device,
            )
            return self._states_of(inputs["input_values"], inputs.get("attention_mask"), counts)
        read_peaks = read_later(torch.linalg.vector_norm(waveforms, torch.inf, -1))
        constants = device_constants(extractor.num_mel_bins, extractor.sampling_rate, device)
        padding = extractor.padding_in_result()
        states = self._states_of_waveforms(send(waveforms, device), counts, padding, constants)
        check_peaks(read_peaks().tolist())
        return states

    def _compute_states_of_waveforms(
        self, waveforms: torch.Tensor, counts: torch.Tensor, padding: float, constants: DeviceConstants
    ) -> torch.Tensor:
        extractor = self.feature_extractor
        centered = waveforms - waveforms.mean(-1, keepdim=True)
        input_values = extractor.features_of_centered(centered, self.padded_length, padding, constants)
        mask = None
        if extractor.return_attention_mask:
            is_frame = torch.arange(self.padded_length, device=waveforms.device) < extractor.num_frames(
                waveforms.shape[-1]
            )
            mask = is_frame.long().expand(len(waveforms), -1)
        return self._compute_states(input_values, mask, counts)

    def _compute_states(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None, counts: torch.Tensor
    ) -> torch.Tensor:
        """Compute pooled states of clips; `counts` holds the time steps of patches of each, `(batch_size,)`."""
        outputs = self.model(input_values, attention_mask, output_hidden_states=self.layer != "last")
        if self.layer == "last":
            states = outputs.last_hidden_state
        elif self.layer == "all":
            states = torch.stack(outputs.hidden_states, dim=1)
        elif self.layer == "mean":
            states = torch.stack(outputs.hidden_states[1:]).mean(0, dtype=torch.float32)
        else:
            states = outputs.hidden_states[self.layer]
        if self.pooling == "cls":
            return states[..., 0, :]
        grid = states[..., 1:, :].unflatten(-2, (-1, self.model.config.num_mel_patches))
        if self.pooling == "patch":
            return grid
        steps = grid.mean(-2, dtype=torch.float32)
        if self.pooling == "frame":
            return steps
        # All patches of a time step hold some of the clip, or none does. So the mean over steps is over patches too.
        weights = (torch.arange(steps.shape[-2], device=counts.device) < counts[:, None]) / counts[:, None]
        return (steps * weights.reshape(len(counts), *[1] * (steps.ndim - 3), -1, 1)).sum(-2)

    def clips(self, windows: Sequence[Window], states: list[torch.Tensor]) -> list[ClipEmbedding]:
        """Return the embeddings of windows.

        Args:
            windows: The windows of a batch.
            states: The results of [`states`] for the parts of the batch, in order.

        Raises:
            InferenceError: If a value is NaN or infinite.
        """
        arrays = torch.cat(states).float().cpu().numpy()
        check_finite(np.isfinite(arrays).all(), "embeddings")
        time_axis = {"frame": -2, "patch": -3}.get(self.pooling)
        clips = []
        for (sound, number, first_frame, frames, is_last), array in zip(windows, arrays, strict=True):
            if time_axis is not None:
                array = array.take(range(self.num_time_patches(len(frames))), axis=time_axis)
            start, end = first_frame / self.frames_per_second, (first_frame + len(frames)) / self.frames_per_second
            clips.append(ClipEmbedding(sound.name, start, end, array, sound.key, number, is_last))
        return clips

    def stream(
        self, sounds: Iterable[Sound], on_failure: Callable[[Sound, ClipError], Any]
    ) -> Generator[list[ClipEmbedding], None, None]:
        """Embed all windows of all sounds in their order, a batch at a time.

        Args:
            sounds: Iterated in another thread.
            on_failure: Called with each sound that cannot be used, and its error.
        """
        if isinstance(self.batch_size, str):
            size = choose_batch_size(self.model.config, self.padded_length, self.model.device, self.model.dtype)
        else:
            size = self.batch_size

        def usable(windows: Iterable[Window | Failure]) -> Iterator[Window]:
            for window in windows:
                if isinstance(window, Failure):
                    on_failure(*window)
                else:
                    yield window

        def frames_of(window: Window | Failure) -> list[torch.Tensor]:
            return [window.frames] if isinstance(window, Window) else []

        def read(batch: list[Window], parts: list[Callable[[], torch.Tensor]]) -> list[ClipEmbedding]:
            return self.clips(batch, [torch.cat([wait() for wait in parts])[: len(batch)]])

        previous, trim = None, MemoryTrimmer()
        all_windows = prefetch_beside(sounds, self.windows, 2 * size, self.model.device, frames_of)
        with closing(all_windows) as produced:
            windows = usable(produced)
            while batch := list(islice(windows, size)):
                if self.is_compiled:
                    parts = [read_later(self.states(fill_batch(batch, size)))]
                elif self.batch_size == "auto":
                    parts, size = compute_in_parts(lambda some: read_later(self.states(some)), batch, size)
                else:
                    parts = [read_later(self.states(batch))]
                # A GPU starts on the next batch before this thread waits for the result of the previous one.
                if previous is not None:
                    yield previous()
                previous = partial(read, batch, parts)
                trim()
            if previous is not None:
                yield previous()


def embed(
    sources: Any,
    model: "str | Path | Embedder",
    on_failure: Callable[[Sound, ClipError], Any] | None = None,
    **settings: Any,
) -> Iterator[ClipEmbedding]:
    """Embed sound files, a data set or recordings in memory, window by window in their order, as `sslam embed` does.

    Args:
        sources: One of these:

            - a file, a folder, a pattern, or several of these;
            - a data set: a folder of its shards, an id on the Hub, an [`AudioDataset`] for another split than "train",
              or a `Dataset` or `IterableDataset` of the library `datasets` with an audio column;
            - a recording or an iterable of them: `{"array": samples, "sampling_rate": Hz}`, samples at the model's
              rate, the bytes of a sound file, or torchcodec's AudioDecoder. An array of two axes is one recording of
              `(channels, num_samples)`. A recording without a path is named by its number.
        model: Folder or Hub id of a model, or an [`Embedder`].
        on_failure: Called with each sound that cannot be used, and its error; by default the error is raised.
        settings: Arguments of [`Embedder.from_pretrained`], unless `model` is an [`Embedder`]: `pooling`, `layer`,
            `window`, `hop`, `device`, `dtype`, `batch_size`, `revision`.

    Yields:
        The embedding of each window.

    Raises:
        InferenceError: If there are no such files, or if [`Embedder`] raises it.
        ClipError: If a sound cannot be used and `on_failure` is not given.

    Example:
    ```python
    >>> from modeling_sslam.inference import embed

    >>> clips = list(embed("tests/fixtures/audio", "outputs/quickstart/classifier/model", pooling="mean"))
    >>> clips[0].name, clips[0].embedding.shape
    ('tests/fixtures/audio/ambi_choir.flac', (96,))
    ```
    """
    if not isinstance(model, Embedder):
        model = Embedder.from_pretrained(model, **settings)
    sounds = find_sounds(sources)

    def fail(sound: Sound, error: ClipError) -> None:
        raise error

    for clips in model.stream(sounds, on_failure or fail):
        yield from clips

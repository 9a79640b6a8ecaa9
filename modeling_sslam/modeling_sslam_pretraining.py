"""Pre-training of SSLAM (Alex et al., ICLR 2025, arXiv 2506.12222): masked latent prediction against an EMA teacher.

The first stage learns from clips ("unmixed audio", EAT's objective), the second also from mixtures of two clips, with
source retention. The file follows the data: masks and mixtures, the decoder, targets, losses, the model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from os import PathLike
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_sslam import SSLAMConfig
from .modeling_sslam import (
    RecomputingModule,
    SSLAMEncoderOutput,
    SSLAMModel,
    SSLAMPreTrainedModel,
    check_input_values,
    checkpoint_activations,
    patch_mask_from_frames,
    saves_memory,
)
from .transfers_sslam import send

logger = logging.get_logger(__name__)

# The batches that each objective learns from, in the order of their concatenation: "ua" has the unmixed clips, "pma"
# their partial mixtures.
BATCHES = {"ua": ("ua",), "pma": ("pma",), "ua+pma": ("ua", "pma"), "sslam": ("ua", "pma")}
# In a clip of 64 time patches (10 s) each of the two unmixed windows has 15 of them, and the first window starts at
# patch 31 at the latest. This is published for 10 s only; other lengths use the same proportions.
MIXING_GRID, WINDOW_PATCHES, LAST_FIRST_START = 64, 15, 31
# Epsilon of the norms without weights, in the decoder and in the targets.
NORM_EPS = 1e-5
# To save memory, the decoder computes a batch in this many parts and recomputes each in the backward pass. Then the
# intermediate values of a single part are in memory at a time.
DECODER_PARTS = 8


def inverse_block_masks(
    batch_size: int, time_patches: int, config: SSLAMConfig, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draw masks that leave blocks of patches visible (paper section 3.1; data2vec 2.0's "inverse block masking").

    Block centres are drawn anywhere on the grid, and their blocks are clamped to it. Then single patches are opened or
    closed at random until exactly `int(N * (1 - mask_prob))` are visible.

    Args:
        batch_size: Number of clips; each has a mask for every clone.
        time_patches: Patches of a clip along time.
        config: The model's configuration.
        generator: Source of random numbers; torch's own CPU generator if not given.

    Returns:
        bool of shape `(batch_size, num_clones, N)`, True for masked patches, on the generator's device.
    """
    size, mel_patches = config.mask_block_size, config.num_mel_patches
    num_patches = time_patches * mel_patches
    visible_share = 1 - config.mask_prob
    num_visible = min(max(int(num_patches * visible_share), 1), num_patches - 1)
    num_blocks = int(num_patches * (visible_share + config.mask_prob_adjust) / size**2)
    device = generator.device if generator is not None else torch.device("cpu")
    masks = batch_size * config.num_clones

    centers = torch.randint(num_patches, (masks, num_blocks, 1, 1), generator=generator, device=device)
    offsets = torch.arange(size, device=device) - size // 2
    time = (centers // mel_patches + offsets[:, None]).clamp(0, time_patches - 1)
    mel = (centers % mel_patches + offsets).clamp(0, mel_patches - 1)
    in_block = torch.zeros(masks, num_patches, device=device)
    in_block.scatter_(1, (time * mel_patches + mel).flatten(1), 1.0)
    # Rank patches at random, in-block patches first, and keep the top `num_visible`.
    rank = in_block + torch.rand(masks, num_patches, generator=generator, device=device)
    visible = rank.topk(num_visible, dim=1).indices
    masked = torch.ones(masks, num_patches, dtype=torch.bool, device=device).scatter_(1, visible, False)
    return masked.view(batch_size, config.num_clones, num_patches)


def unmixed_window_width(time_patches: int) -> int:
    """Return the width of each of the two unmixed windows, in time patches."""
    return max(1, round(WINDOW_PATCHES * time_patches / MIXING_GRID))


def draw_unmixed_starts(
    time_patches: int, config: SSLAMConfig, generator: torch.Generator | None = None
) -> tuple[int, int]:
    """Draw the first frames of a batch's two unmixed windows: the first uniformly, the second uniformly after it."""
    width = unmixed_window_width(time_patches)
    last_first = min(LAST_FIRST_START * time_patches // MIXING_GRID, time_patches - 2 * width - 1)
    device = generator.device if generator is not None else torch.device("cpu")

    def draw(low: int, last: int) -> int:
        return int(torch.randint(low, last + 1, (), generator=generator, device=device))

    first = draw(0, last_first)
    second = draw(first + width, time_patches - width - 1)
    return first * config.patch_size, second * config.patch_size


def split_by_mask(
    bool_masked_pos: torch.Tensor, batch_size: int, num_patches: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check masks and turn them into indices.

    Args:
        bool_masked_pos: bool `(batch_size, num_clones, num_patches)`, True for masked patches.
        batch_size: Number of clips.
        num_patches: Patches of a clip.

    Returns:
        Indices of the visible and of the masked patches, `(batch_size, num_clones, ...)`, in ascending order.

    Raises:
        ValueError: If the masks have another shape, or if the number of masked patches differs between them, or is 0
            or `num_patches`.
    """
    if bool_masked_pos.ndim != 3 or bool_masked_pos.shape[::2] != (batch_size, num_patches):
        raise ValueError(
            f"bool_masked_pos has shape {tuple(bool_masked_pos.shape)}; these input_values need ({batch_size}, "
            f"num_clones, {num_patches})."
        )
    counts = bool_masked_pos.sum(-1)
    num_masked = int(counts.flatten()[0])
    if not bool((counts == num_masked).all()) or not 0 < num_masked < num_patches:
        raise ValueError(
            f"bool_masked_pos masks {int(counts.min())} to {int(counts.max())} of {num_patches} patches; every "
            "row must mask the same number, neither none nor all."
        )
    is_masked = bool_masked_pos.bool()
    visible, masked = (
        is_chosen.nonzero()[:, 2].view(batch_size, -1, count)
        for is_chosen, count in ((~is_masked, num_patches - num_masked), (is_masked, num_masked))
    )
    return visible, masked


def check_not_padded(attention_mask: torch.Tensor, clips: torch.Tensor, config: SSLAMConfig) -> None:
    """Check that every patch has a frame of its clip.

    Args:
        attention_mask: `(batch_size, T)`, 1 for frames of the clip and 0 for padding.
        clips: Log-mel frames `(batch_size, T, num_mel_bins)`.
        config: The model's configuration.

    Raises:
        ValueError: If the mask has another shape, or if a whole patch is padding.
    """
    if attention_mask.shape != clips.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; it masks frames, so for these input_values it "
            f"must be {tuple(clips.shape[:2])}."
        )
    is_padded = ~patch_mask_from_frames(attention_mask, config).all(1)
    if is_padded.any():
        raise ValueError(
            f"By attention_mask, {int(is_padded.sum())} of {len(clips)} clips are padded by whole patches, which the "
            "pre-training objective would predict as if they were sound. Cut the clips to one length, or leave "
            "attention_mask out: padding then counts as sound, as in the published pre-training."
        )


def check_can_be_mixed(batch_size: int, time_patches: int, config: SSLAMConfig) -> None:
    """Check that a batch has clips to mix and that two windows fit into them.

    Raises:
        ValueError: If the batch has a single clip, or clips of fewer than four time patches.
    """
    if batch_size < 2:
        raise ValueError(
            f"A batch of {batch_size} clip has no foreign clip to mix in; the objective "
            f'"{config.pretraining_objective}" needs at least 2 clips on every device. Drop the batch.'
        )
    if time_patches < 4:
        raise ValueError(
            f"Clips of {time_patches} time patches cannot be mixed; use at least {4 * config.patch_size} frames."
        )


def unmixed_time_patches(starts: tuple[int, int], time_patches: int, config: SSLAMConfig) -> torch.Tensor:
    """Mark the time patches of the two windows in which a mixture holds its own clip alone.

    Args:
        starts: First frames of the windows.
        time_patches: Patches of a clip along time.
        config: The model's configuration.

    Returns:
        bool `(time_patches,)`.

    Raises:
        ValueError: If the windows do not lie on patches, one after the other, within the clip.
    """
    width, patch_size = unmixed_window_width(time_patches), config.patch_size
    first, second = (start // patch_size for start in starts)
    if any(start % patch_size for start in starts) or not (0 <= first <= second - width <= time_patches - 2 * width):
        raise ValueError(
            f"unmixed_starts={tuple(starts)} do not fit: they must be multiples of {patch_size} and start two windows "
            f"of {width * patch_size} frames, one after the other, within the clip's {time_patches * patch_size}."
        )
    is_unmixed = torch.zeros(time_patches, dtype=torch.bool)
    is_unmixed[first : first + width] = True
    is_unmixed[second : second + width] = True
    return is_unmixed


def mix_clips(clips: torch.Tensor, is_unmixed: torch.Tensor) -> torch.Tensor:
    """Mix each clip with the previous one of the batch (the paper's partial mixing).

    A mixture is the element-wise maximum of the two clips' log-mel values. In the unmixed windows it is its own clip.

    Args:
        clips: Log-mel frames `(batch_size, T, num_mel_bins)`.
        is_unmixed: bool `(T,)`, True for frames in the windows.
    """
    return torch.where(is_unmixed[:, None], clips, torch.maximum(clips, clips.roll(1, 0)))


class Draws(NamedTuple):
    """Masks and windows of a batch, as tensors whose shapes follow from the input's shape.

    Attributes:
        visible: int64 `(batch_size, num_clones, num_visible)`, the visible patches.
        masked: int64 `(batch_size, num_clones, num_masked)`, the masked patches.
        is_unmixed: bool `(T,)`, True for the frames of the unmixed windows; None if the objective has no mixtures.
        mixed: int64 `(num_mixed,)`, the patches outside these windows; None as well.
    """

    visible: torch.Tensor
    masked: torch.Tensor
    is_unmixed: torch.Tensor | None
    mixed: torch.Tensor | None

    def to(self, device: torch.device) -> "Draws":
        """Copy to a device. The host does not wait for a GPU."""
        visible, masked = send(self.visible, device), send(self.masked, device)
        if self.is_unmixed is None or self.mixed is None:
            return Draws(visible, masked, None, None)
        return Draws(visible, masked, send(self.is_unmixed, device), send(self.mixed, device))


class SSLAMDecoderLayer(nn.Conv2d):
    """Grouped convolution over the patch grid, LayerNorm without weights and GELU, with a residual connection."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__(
            config.hidden_size,
            config.hidden_size,
            kernel_size=config.decoder_kernel_size,
            padding="same",
            groups=config.decoder_groups,
        )

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        """Map a grid `(batch_size, time_patches, mel_patches, hidden_size)` to one of the same shape."""
        update = self.convolve(grid)
        update = nn.functional.layer_norm(update, update.shape[-1:], eps=NORM_EPS)
        return grid + nn.functional.gelu(update)

    def convolve(self, grid: torch.Tensor) -> torch.Tensor:
        """Compute the convolution alone, for a grid of that shape."""
        # Channels stay innermost in memory, so the convolution gets a channels-last tensor.
        return super().forward(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class SSLAMDecoder(RecomputingModule):
    """Prediction of the teacher's targets at masked patches: convolutional layers, then a linear one."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SSLAMDecoderLayer(config) for _ in range(config.decoder_num_layers))
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, grid: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """Predict the targets of some patches.

        Args:
            grid: Visible states and noise, `(batch_size, time_patches, mel_patches, hidden_size)`.
            index: int64 `(batch_size, num_masked)`, the patches to predict.

        Returns:
            `(batch_size, num_masked, hidden_size)`.
        """
        if not saves_memory(self.memory, grid.device):
            return self._predict(grid, index)
        parts = zip(grid.chunk(DECODER_PARTS), index.chunk(DECODER_PARTS), strict=True)
        return torch.cat([checkpoint_activations(self._predict, *part) for part in parts])

    def _predict(self, grid: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            grid = layer(grid)
        return self.projection(_gather(grid.flatten(1, 2), index))


class LocalAndGlobal(NamedTuple):
    """Predictions, or targets, of a batch.

    Attributes:
        local: Of patches. Predictions `(batch_size, num_clones, num_masked, hidden_size)`, at masked patches alone;
            targets `(batch_size, N, hidden_size)`, of all patches.
        global_: Of clips. Predictions `(batch_size, num_clones, hidden_size)`; targets `(batch_size, hidden_size)`.
    """

    local: torch.Tensor
    global_: torch.Tensor

    def chunk(self, num_parts: int) -> list["LocalAndGlobal"]:
        """Split the batch into parts by `chunk`, because a slice's gradient would be as large as the whole batch."""
        pairs = zip(self.local.chunk(num_parts), self.global_.chunk(num_parts), strict=True)
        return [LocalAndGlobal(*pair) for pair in pairs]


def normalised_mean(ffn_outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Make targets out of the teacher's MLP outputs, in float32.

    Each block's output is normalised by instance norm, over the patches of a clip for each channel. The mean over
    blocks is normalised by LayerNorm. Neither norm has weights.

    Args:
        ffn_outputs: Of each block, `(batch_size, num_patches, hidden_size)`.

    Returns:
        `(batch_size, num_patches, hidden_size)`.
    """
    total: torch.Tensor | float = 0.0
    for output in ffn_outputs:
        output = output.float()
        centered = output - output.mean(1, keepdim=True)  # torch.var_mean is several times as slow along tokens
        total = total + centered * torch.rsqrt(centered.square().mean(1, keepdim=True) + NORM_EPS)
    mean_over_blocks = torch.as_tensor(total / len(ffn_outputs))
    return nn.functional.layer_norm(mean_over_blocks, mean_over_blocks.shape[-1:], eps=NORM_EPS)


def _gather(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Gather tokens `(batch_size, N, D)` at `index` `(batch_size, M)` into `(batch_size, M, D)`."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def local_error(
    predictions: torch.Tensor, targets: torch.Tensor, masked: torch.Tensor, num_parts: int = 1
) -> torch.Tensor:
    """Sum squared errors / sqrt(hidden_size) over all masked patches, in float32.

    Args:
        predictions: `(batch_size, num_clones, num_masked, hidden_size)`.
        targets: `(batch_size, N, hidden_size)`, the same for all clones of a clip.
        masked: int64 `(batch_size, num_clones, num_masked)`, the patches that are predicted.
        num_parts: Parts of the clones that are computed one after the other. In memory are copies of the targets for
            the clones of one part.
    """
    error = torch.zeros((), device=predictions.device)
    for prediction, index in zip(predictions.chunk(num_parts, 1), masked.chunk(num_parts, 1), strict=True):
        copies = _gather(targets, index.flatten(1)).view(prediction.shape)
        error = error + (prediction.float() - copies).square().sum()
    return error / math.sqrt(targets.shape[-1])


def global_error(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum squared errors / sqrt(hidden_size) over all clips and clones, in float32.

    Args:
        predictions: `(batch_size, num_clones, hidden_size)`.
        targets: `(batch_size, hidden_size)`, the same for all clones of a clip.
    """
    return (predictions.float() - targets[:, None]).square().sum() / math.sqrt(targets.shape[-1])


def pretraining_losses(
    predictions: LocalAndGlobal,
    targets: LocalAndGlobal,
    retention_targets: torch.Tensor | None,
    masked: torch.Tensor,
    config: SSLAMConfig,
    num_parts: int = 1,
) -> dict[str, torch.Tensor]:
    """Compute the terms of the objective, weighted as in the published code, which add up to the loss.

    Args:
        predictions: Of the batches that `BATCHES` lists for the objective, one after the other.
        targets: Of the same batches.
        retention_targets: Targets of the mixtures' source retention, `(batch_size, N, hidden_size)`, if the objective
            has it.
        masked: int64 `(batch_size, num_clones, num_masked)`, the masked patches, the same in each batch.
        config: The model's configuration.
        num_parts: See [`local_error`].
    """
    batches = BATCHES[config.pretraining_objective]
    predicted = dict(zip(batches, predictions.chunk(len(batches)), strict=True))
    target = dict(zip(batches, targets.chunk(len(batches)), strict=True))
    per_token = 1.0 / (len(batches) * masked.numel())
    weight = config.global_loss_weight
    losses = {}
    if "ua" in batches:
        ua, ua_target = predicted["ua"], target["ua"]
        losses["ua_local_loss"] = local_error(ua.local, ua_target.local, masked, num_parts) * per_token
        losses["ua_global_loss"] = weight * global_error(ua.global_, ua_target.global_)
    if "pma" in batches:
        pma, pma_target = predicted["pma"], target["pma"]
        losses["pma_local_loss"] = local_error(pma.local, pma_target.local, masked, num_parts) * per_token
        losses["pma_global_loss"] = weight * global_error(pma.global_, pma_target.global_)
    if retention_targets is not None:
        error = local_error(predicted["pma"].local, retention_targets, masked, num_parts)
        losses["srl_loss"] = config.retention_loss_weight * error * per_token
    return losses


class Moments(NamedTuple):
    """Sums over a rank's tokens, for the deviation over the tokens of all ranks.

    Attributes:
        num_tokens: Number of tokens.
        mean: Their mean, float32 `(hidden_size,)`.
        squares: Sum of their squared distances from the mean, float32 `(hidden_size,)`. From squared distances to 0
            the variance would be a difference of two large sums. If all tokens are alike, the case to detect, that
            difference is mere rounding of either sign.
    """

    num_tokens: int
    mean: torch.Tensor
    squares: torch.Tensor


@torch.no_grad()
def mean_deviations(*moments: Moments) -> list[torch.Tensor]:
    """Compute, for each of several sets of tokens, the mean over channels of the standard deviation over all ranks."""
    rows = []
    for count, mean, squares in moments:
        mean, squares = mean.double(), squares.double()
        rows.append(torch.stack((torch.full_like(mean, count), count * mean, squares + count * mean.square())))
    sums = torch.stack(rows)
    # One exchange for all sets. It is outside the objective, whose graph is then that of a single process.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(sums)
    total_count, total, total_squares = sums.unbind(1)
    variance = (total_squares - total.square() / total_count) / (total_count - 1)
    return list((variance + 1e-6).sqrt().mean(1).float().unbind())


@torch.no_grad()
def prediction_moments(predictions: torch.Tensor, num_parts: int = 1) -> Moments:
    """Compute the moments of predictions `(batch_size, num_clones, num_masked, hidden_size)`.

    Args:
        predictions: The predictions.
        num_parts: Parts of the clones. The float32 copy is of one part at a time.
    """
    mean = predictions.mean((0, 1, 2), dtype=torch.float32)
    squares = torch.zeros_like(mean)
    for part in predictions.chunk(num_parts, 1):
        squares = squares + (part.float() - mean).square().sum((0, 1, 2))
    return Moments(predictions[..., 0].numel(), mean, squares)


@torch.no_grad()
def target_moments(targets: torch.Tensor, masked: torch.Tensor) -> Moments:
    """Compute the moments of targets `(batch_size, N, hidden_size)`, each counted once per clone that masks it."""
    index = masked.flatten(1)
    counts = torch.zeros(targets.shape[:2], device=targets.device)
    counts = counts.scatter_add_(1, index, torch.ones_like(index, dtype=counts.dtype)).flatten()
    tokens = targets.flatten(0, 1)
    mean = counts @ tokens / index.numel()
    return Moments(index.numel(), mean, counts @ (tokens - mean).square())


@dataclass
class SSLAMForPreTrainingOutput(ModelOutput):
    """Output of [`SSLAMForPreTraining`].

    All tensors are scalars, except in the last two entries. The five terms are weighted and divided as the objective
    says, so they add up to `loss`. A term that the objective leaves out is None.

    Attributes:
        loss: The objective.
        ua_local_loss: Patches of unmixed clips; a mean over masked tokens.
        ua_global_loss: CLS tokens of unmixed clips; a sum over the clips and clones of the batch, as published.
        pma_local_loss: Patches of partial mixtures.
        pma_global_loss: CLS tokens of partial mixtures.
        srl_loss: Source retention.
        pred_var: Mean over channels of the standard deviation of predictions at masked patches, over all ranks.
        target_var: The same number for the targets. Collapse shows as either of the two going to 0.
        masked_fraction: Share of patches that is masked.
        num_masked_tokens: Number of masked tokens of the batch, over all clips, mixtures and clones.
        hidden_states: The student's states, if asked for, each `(num_inputs * num_clones, 1 + num_visible,
            hidden_size)`. The inputs are the unmixed clips, then the mixtures, as far as the objective has them.
        attentions: The student's attention probabilities, if asked for.
    """

    loss: torch.Tensor | None = None
    ua_local_loss: torch.Tensor | None = None
    ua_global_loss: torch.Tensor | None = None
    pma_local_loss: torch.Tensor | None = None
    pma_global_loss: torch.Tensor | None = None
    srl_loss: torch.Tensor | None = None
    pred_var: torch.Tensor | None = None
    target_var: torch.Tensor | None = None
    masked_fraction: torch.Tensor | None = None
    num_masked_tokens: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor | None, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class SSLAMForPreTraining(SSLAMPreTrainedModel):
    """Student, decoder and teacher, with the objective that `config.pretraining_objective` names.

    A training step is: forward, backward, optimiser step n (counted from 1), `update_teacher(ema_decay(n))`. A saved
    folder holds all three. [`SSLAMModel`] and [`SSLAMForAudioClassification`] load the student from it;
    `SSLAMForPreTraining.from_pretrained(folder).teacher` is an [`SSLAMModel`] too. The teacher stays in float32 and in
    evaluation mode, even if `half` or `train` is called on the model.
    """

    _keep_in_fp32_modules_strict = ["teacher"]
    _auto_map = SSLAMPreTrainedModel._auto_map | {
        "AutoModelForPreTraining": "modeling_sslam_pretraining.SSLAMForPreTraining"
    }

    _compiled_objective: Callable[..., Any] | None = None

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__(config)
        self.sslam = SSLAMModel(config)
        self.decoder = SSLAMDecoder(config)
        self.teacher = SSLAMModel(config).float().eval().requires_grad_(False)
        self.post_init()
        self.update_teacher(0.0)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[Any] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Load as transformers does.

        If the checkpoint holds no teacher (it can be an encoder's), the teacher becomes a copy of the student.

        Returns:
            A [`SSLAMForPreTraining`]; with `output_loading_info=True` a tuple of it and a dictionary.
        """
        output_loading_info = kwargs.pop("output_loading_info", False)
        loaded: Any = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        model, info = loaded
        if any(name.startswith("teacher.") for name in info["missing_keys"]):
            logger.warning(f"{pretrained_model_name_or_path} holds no teacher: it starts as a copy of the student.")
            model.update_teacher(0.0)
        model.teacher.requires_grad_(False)  # transformers 5 replaces parameters by new, trainable ones
        return (model, info) if output_loading_info else model

    def train(self, mode: bool = True) -> "SSLAMForPreTraining":
        """Set the mode of student and decoder; the teacher stays in evaluation mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the objective in place: all of `forward` but drawing and checking, whose values no graph can hold.

        Args:
            *args: Arguments of `torch.compile`. `fullgraph=True` holds, and shapes do not vary between batches.
            **kwargs: Arguments of `torch.compile`.
        """
        self._compiled_objective = torch.compile(SSLAMForPreTraining._objective, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        # As with any compiled module, copies and pickles are not compiled.
        state = super().__getstate__()
        state.pop("_compiled_objective", None)
        return state

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SSLAMForPreTraining":
        # `to`, `half` and the like call this. In half precision an average with these decays would never move.
        teacher_ids = {id(tensor) for tensor in (*self.teacher.parameters(), *self.teacher.buffers())}

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if id(tensor) in teacher_ids and moved.dtype != torch.float32:
                return tensor.to(moved.device, torch.float32)
            return moved

        return super()._apply(apply, recurse)

    def ema_decay(self, update: int) -> float:
        """Return the teacher's decay after an optimiser update, counted from 1: linear in it, then constant."""
        config = self.config
        progress = min(update / config.ema_anneal_end_step, 1.0)
        return config.ema_decay + progress * (config.ema_end_decay - config.ema_decay)

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """Set teacher = decay * teacher + (1 - decay) * student, in float32. A decay of 0 copies the student."""
        student = [parameter.detach().float() for parameter in self.sslam.parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), student, 1.0 - decay)

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        unmixed_starts: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> SSLAMForPreTrainingOutput:
        """Compute the loss of a batch (paper sections 3.1 to 3.3).

        Args:
            input_values: Normalised log-mel frames `(batch_size, T, num_mel_bins)`. Objectives with mixtures need at
                least two clips of at least four time patches.
            bool_masked_pos: bool `(batch_size, num_clones, N)`, True for masked patches, the same number in every row.
                A mixture has the masks of its own clip. Drawn by [`inverse_block_masks`] if not given.
            unmixed_starts: First frames of the mixtures' two unmixed windows, multiples of `patch_size`. Drawn by
                [`draw_unmixed_starts`] if not given.
            generator: Source of masks and windows; torch's own CPU generator if not given. The noise at the decoder's
                masked patches comes from the device's own generator, as dropout does.
            attention_mask: The feature extractor's mask, which changes nothing. The published objective has no padded
                clips, so a mask that marks a whole patch as padding is an error.
            output_attentions: Whether to return the student's attention probabilities.
            output_hidden_states: Whether to return the student's hidden states, or which; see [`SSLAMModel.forward`].
            **kwargs: Further arguments of the student's attention function; see [`SSLAMModel.forward`].

        Returns:
            [`SSLAMForPreTrainingOutput`].

        Raises:
            ValueError: If the batch is padded or cannot be mixed, or if masks or windows do not fit it.
            RuntimeError: If the model is traced.
        """
        if torch.jit.is_tracing():
            raise RuntimeError(
                "SSLAMForPreTraining draws masks and mixtures anew for every batch, which a trace would freeze. Trace "
                "its encoder, `model.sslam`, instead."
            )
        config = self.config
        clips = check_input_values(input_values, config)
        batch_size, time_patches = len(clips), clips.shape[1] // config.patch_size
        if attention_mask is not None:
            check_not_padded(attention_mask, clips, config)
        draws = self._draw(batch_size, time_patches, bool_masked_pos, unmixed_starts, generator)
        if output_attentions is None:
            output_attentions = config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states
        objective = self._compiled_objective or SSLAMForPreTraining._objective
        terms, moments, encoded = objective(
            self,
            clips,
            draws.to(clips.device),
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            **kwargs,
        )
        pred_var, target_var = mean_deviations(*moments)
        num_masked = draws.masked.shape[2]
        return SSLAMForPreTrainingOutput(
            **terms,
            pred_var=pred_var,
            target_var=target_var,
            masked_fraction=torch.tensor(num_masked / (num_masked + draws.visible.shape[2])),
            num_masked_tokens=torch.tensor(len(BATCHES[config.pretraining_objective]) * draws.masked.numel()),
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )

    def _draw(
        self,
        batch_size: int,
        time_patches: int,
        bool_masked_pos: torch.Tensor | None,
        unmixed_starts: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> Draws:
        """Draw masks and windows that are not given, and check those that are. See [`forward`]."""
        config = self.config
        # Draw and check on the CPU: a check on an accelerator would wait for it.
        if bool_masked_pos is None:
            bool_masked_pos = inverse_block_masks(batch_size, time_patches, config, generator)
        visible, masked = split_by_mask(bool_masked_pos, batch_size, time_patches * config.num_mel_patches)
        if "pma" not in BATCHES[config.pretraining_objective]:
            return Draws(visible, masked, None, None)
        check_can_be_mixed(batch_size, time_patches, config)
        if unmixed_starts is None:
            unmixed_starts = draw_unmixed_starts(time_patches, config, generator)
        is_unmixed = unmixed_time_patches(unmixed_starts, time_patches, config)
        mixed = (~is_unmixed).repeat_interleave(config.num_mel_patches).nonzero().squeeze(1)
        return Draws(visible, masked, is_unmixed.repeat_interleave(config.patch_size), mixed)

    def _objective(
        self, clips: torch.Tensor, draws: Draws, **encoder_options: Any
    ) -> tuple[dict[str, torch.Tensor], tuple[Moments, Moments], SSLAMEncoderOutput]:
        """Compute the loss for given masks and windows. All shapes follow from those of the arguments.

        Args:
            clips: Log-mel frames `(batch_size, T, num_mel_bins)`.
            draws: Masks and windows, on the clips' device.
            **encoder_options: Further arguments of the student's encoder.

        Returns:
            The loss and its terms, the moments of predictions and of targets, and the student's output.
        """
        config, batch_size = self.config, len(clips)
        batches = BATCHES[config.pretraining_objective]
        inputs = clips
        if draws.is_unmixed is not None:
            mixtures = mix_clips(clips, draws.is_unmixed)
            inputs = torch.cat((clips, mixtures)) if "ua" in batches else mixtures
        # A mixture has the masks of its own clip.
        visible, masked = (index.repeat(len(batches), 1, 1) for index in (draws.visible, draws.masked))

        with torch.no_grad():
            teacher_patches = self.teacher.patch_embeddings(inputs)
            targets = self._targets(teacher_patches)
            retention_targets = None
            if config.pretraining_objective == "sslam" and draws.mixed is not None:
                # Compute these before the student's pass, whose intermediate values stay in memory.
                retention_targets = self._retention_targets(
                    teacher_patches[:batch_size], targets.local[:batch_size], draws.mixed
                )
        encoded = self._encode_visible(inputs, visible, **encoder_options)
        predictions = self._predict(encoded.last_hidden_state, visible, masked)
        num_parts = masked.shape[1] if saves_memory(self.decoder.memory, clips.device) else 1
        losses = pretraining_losses(predictions, targets, retention_targets, draws.masked, config, num_parts)
        terms = {"loss": reduce(torch.add, losses.values()), **losses}
        moments = prediction_moments(predictions.local, num_parts), target_moments(targets.local, masked)
        return terms, moments, encoded

    def _ffn_outputs(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Compute the outputs of the teacher's MLPs, block by block, without the CLS token."""
        outputs = self.teacher.encoder(patches, output_ffn=True).ffn_outputs
        return tuple(output[:, 1:] for output in outputs)

    def _targets(self, patches: torch.Tensor) -> LocalAndGlobal:
        """Make targets, in float32, from the teacher's patches `(batch_size, N, hidden_size)`."""
        ffn_outputs = self._ffn_outputs(patches)
        num_layers = self.config.num_target_layers or len(ffn_outputs)
        num_global_layers = self.config.num_global_target_layers
        if num_global_layers is None:
            num_global_layers = len(ffn_outputs) if self.config.pretraining_objective == "ua" else 1
        local = normalised_mean(ffn_outputs[-num_layers:])
        if num_global_layers == num_layers:
            return LocalAndGlobal(local, local.mean(1))
        return LocalAndGlobal(local, normalised_mean(ffn_outputs[-num_global_layers:]).mean(1))

    def _retention_targets(
        self, patches: torch.Tensor, own_targets: torch.Tensor, mixed: torch.Tensor
    ) -> torch.Tensor:
        """Make the targets of source retention, from both clips of each mixture.

        At mixed patches they are the mean of both clips' targets; the foreign clip's are made from its mixed patches
        alone. At unmixed patches they are the own clip's targets.

        Args:
            patches: The teacher's patches of the unmixed clips, `(batch_size, N, hidden_size)`.
            own_targets: Local targets of the unmixed clips, of the same shape.
            mixed: int64 `(num_mixed,)`, the mixed patches.
        """
        ffn_outputs = self._ffn_outputs(patches[:, mixed])
        foreign_targets = normalised_mean(ffn_outputs[-(self.config.num_target_layers or len(ffn_outputs)) :])
        retention = own_targets.clone()
        retention[:, mixed] = (own_targets[:, mixed] + foreign_targets.roll(1, 0)) / 2
        return retention

    def _encode_visible(self, inputs: torch.Tensor, visible: torch.Tensor, **options: Any) -> SSLAMEncoderOutput:
        """Run the student on the visible patches of every clone."""
        patches = self.sslam.patch_embeddings(inputs)
        clones = _gather(patches, visible.flatten(1)).view(-1, visible.shape[2], self.config.hidden_size)
        return self.sslam.encoder(clones, **options)

    def _predict(self, states: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor) -> LocalAndGlobal:
        """Make predictions from the student's states of every clone; local predictions at masked patches alone."""
        config = self.config
        num_patches = visible.shape[2] + masked.shape[2]
        grid = torch.empty(len(states), num_patches, config.hidden_size, device=states.device, dtype=states.dtype)
        grid.normal_(std=config.mask_noise_std)
        index = visible.flatten(0, 1)[..., None].expand(-1, -1, config.hidden_size)
        grid = grid.scatter_(1, index, states[:, 1:]).unflatten(1, (-1, config.num_mel_patches))
        local = self.decoder(grid, masked.flatten(0, 1))
        clips_and_clones = visible.shape[:2]
        return LocalAndGlobal(local.unflatten(0, clips_and_clones), states[:, 0].unflatten(0, clips_and_clones))


SSLAMForPreTraining.register_for_auto_class("AutoModelForPreTraining")

__all__ = ["SSLAMForPreTraining", "SSLAMForPreTrainingOutput"]

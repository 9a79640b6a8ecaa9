"""Pre-training of SSLAM (Alex et al., ICLR 2025, arXiv 2506.12222): masked latent prediction against an EMA teacher,
on clips ("unmixed audio", EAT's objective and SSLAM's first stage) and on mixtures of them with source retention (the
second stage).

In the order of the data: masks and mixtures, the decoder, the teacher and its targets, the losses.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import ModelOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .configuration_sslam import SSLAMConfig
from .modeling_sslam import SSLAMLinear, SSLAMModel, SSLAMPreTrainedModel, check_input_values, recomputing

logger = logging.get_logger(__name__)

# Of the 64 time patches of a 10 s clip, each of the two unmixed windows takes 15, and the first starts within the
# first 31 (published at this length only; other lengths take the same proportions).
MIXING_GRID, WINDOW_PATCHES, LAST_FIRST_START = 64, 15, 31
# Of the norms that have no weights: the decoder's and those of the targets.
NORM_EPS = 1e-5
# The decoder takes a batch in this many parts and computes each again for the backward pass, so that the values
# between its layers are in memory for one part at a time.
DECODER_PARTS = 8


def inverse_block_masks(
    batch_size: int, time_patches: int, config: SSLAMConfig, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Draws masks that leave blocks of patches visible, one for each clip and clone (paper section 3.1; "inverse block
    masking" of data2vec 2.0): block centres anywhere on the grid, their blocks clamped to it, then single patches
    opened or closed at random until exactly `int(N * (1 - mask_prob))` are visible.

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
    # Ranked by a random number, patches in blocks before all others: the first ones are as the text above says.
    rank = in_block + torch.rand(masks, num_patches, generator=generator, device=device)
    visible = rank.topk(num_visible, dim=1).indices
    masked = torch.ones(masks, num_patches, dtype=torch.bool, device=device).scatter_(1, visible, False)
    return masked.view(batch_size, config.num_clones, num_patches)


def unmixed_window_width(time_patches: int) -> int:
    """Width of each of the two unmixed windows, in time patches."""
    return max(1, round(WINDOW_PATCHES * time_patches / MIXING_GRID))


def draw_unmixed_starts(
    time_patches: int, config: SSLAMConfig, generator: torch.Generator | None = None
) -> tuple[int, int]:
    """Draws where a batch's two unmixed windows start, in frames: the first uniformly, then the second after it."""
    width = unmixed_window_width(time_patches)
    last_first = min(LAST_FIRST_START * time_patches // MIXING_GRID, time_patches - 2 * width - 1)
    device = generator.device if generator is not None else torch.device("cpu")

    def draw(low: int, last: int) -> int:
        return int(torch.randint(low, last + 1, (), generator=generator, device=device))

    first = draw(0, last_first)
    second = draw(first + width, time_patches - width - 1)
    return first * config.patch_size, second * config.patch_size


class SSLAMDecoderLayer(nn.Conv2d):
    """A grouped convolution over the patch grid `(batch_size, time_patches, mel_patches, hidden_size)`, followed by
    LayerNorm (no weights) and GELU and with a residual."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__(
            config.hidden_size,
            config.hidden_size,
            kernel_size=config.decoder_kernel_size,
            padding="same",
            groups=config.decoder_groups,
        )

    def forward(self, grid: torch.Tensor) -> torch.Tensor:
        # Channels stay innermost in memory: what the convolution sees is a channels-last tensor.
        update = super().forward(grid.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        update = nn.functional.layer_norm(update, update.shape[-1:], eps=NORM_EPS)
        return grid + nn.functional.gelu(update)


class SSLAMDecoder(nn.Module):
    """Predicts the teacher's targets at masked patches: layers of convolutions, then a linear one."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SSLAMDecoderLayer(config) for _ in range(config.decoder_num_layers))
        self.projection = SSLAMLinear(config.hidden_size, config.hidden_size)

    def forward(self, grid: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """
        Args:
            grid: `(batch_size, time_patches, mel_patches, hidden_size)`.
            index: int64 `(batch_size, num_masked)`, the patches to predict.

        Returns:
            `(batch_size, num_masked, hidden_size)`.
        """
        parts = zip(grid.chunk(DECODER_PARTS), index.chunk(DECODER_PARTS), strict=True)
        return torch.cat([recomputing(self._predict, *part) for part in parts])

    def _predict(self, grid: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            grid = layer(grid)
        return self.projection(_gather(grid.flatten(1, 2), index))


def _normalised_mean(ffn_outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Targets out of MLP outputs `(batch_size, num_patches, hidden_size)`: instance norm (each channel over the clip's
    patches), mean over the blocks, layer norm, all in float32."""
    total: torch.Tensor | float = 0.0
    for output in ffn_outputs:
        output = output.float()
        centered = output - output.mean(1, keepdim=True)  # torch.var_mean is several times as slow along tokens
        total = total + centered * torch.rsqrt(centered.square().mean(1, keepdim=True) + NORM_EPS)
    mean_over_blocks = total / len(ffn_outputs)
    return nn.functional.layer_norm(mean_over_blocks, mean_over_blocks.shape[-1:], eps=NORM_EPS)


def _gather(tokens: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Tokens `(batch_size, N, D)` at `index` `(batch_size, M)`: `(batch_size, M, D)`."""
    return tokens.gather(1, index[..., None].expand(-1, -1, tokens.shape[-1]))


def _local_loss(predictions: torch.Tensor, targets: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """Sum over all masked places of squared error / sqrt(D), in float32.

    Args:
        predictions: `(batch_size, num_clones, num_masked, hidden_size)`.
        targets: `(batch_size, N, hidden_size)`, the same for all clones of a clip.
        masked: int64 `(batch_size, num_clones, num_masked)`.
    """
    # Clone by clone, so that no more than one copy of the targets is ever in memory.
    errors = (
        (prediction.float() - _gather(targets, index)).square().sum()
        for prediction, index in zip(predictions.unbind(1), masked.unbind(1), strict=True)
    )
    return sum(errors) / math.sqrt(targets.shape[-1])


def _global_loss(predictions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same for clips: `(batch_size, num_clones, hidden_size)` against `(batch_size, hidden_size)`."""
    return (predictions.float() - targets[:, None]).square().sum() / math.sqrt(targets.shape[-1])


def _mean_deviation(count: int, mean: torch.Tensor, squares: torch.Tensor) -> torch.Tensor:
    """Mean over channels of the standard deviation of all ranks' tokens, given this rank's number of tokens, their
    mean and the sum of squares around it, both float32 `(hidden_size,)`.

    Around the mean, not around 0: when all tokens become alike, which is what this is watched for, the difference of
    two large sums would be rounding, of either sign.
    """
    mean, squares = mean.double(), squares.double()
    moments = torch.stack((torch.full_like(mean, count), count * mean, squares + count * mean.square()))
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(moments)
    count, total, total_squares = moments
    variance = (total_squares - total.square() / count) / (count - 1)
    return (variance + 1e-6).sqrt().mean().float()


@torch.no_grad()
def prediction_deviation(predictions: torch.Tensor) -> torch.Tensor:
    """pred_var of predictions `(batch_size, num_clones, num_masked, hidden_size)`."""
    mean = predictions.mean((0, 1, 2), dtype=torch.float32)
    # Clone by clone, so that there is never a float32 copy of all.
    squares = sum((clone.float() - mean).square().sum((0, 1)) for clone in predictions.unbind(1))
    return _mean_deviation(predictions[..., 0].numel(), mean, squares)


@torch.no_grad()
def target_deviation(targets: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """target_var of targets `(batch_size, N, hidden_size)`, each counted once for every clone that masks it."""
    index = masked.flatten(1)
    counts = torch.zeros(targets.shape[:2], device=targets.device)
    counts = counts.scatter_add_(1, index, torch.ones_like(index, dtype=counts.dtype)).flatten()
    tokens = targets.flatten(0, 1)
    mean = counts @ tokens / index.numel()
    return _mean_deviation(index.numel(), mean, counts @ (tokens - mean).square())


@dataclass
class SSLAMForPreTrainingOutput(ModelOutput):
    """Output of [`SSLAMForPreTraining`]. Terms that the objective leaves out are `None`; each of the others is already
    divided by the number of masked tokens, so that they add up to `loss`.

    Attributes:
        loss: Scalar, the objective.
        ua_local_loss: Patches of unmixed clips. (Scalar, like all that follow.)
        ua_global_loss: CLS of unmixed clips; a sum over the clips and clones of the batch, as published.
        pma_local_loss: Patches of partial mixtures.
        pma_global_loss: CLS of partial mixtures.
        srl_loss: Source retention.
        pred_var: Mean over channels of the standard deviation of the predictions at masked places, over all ranks.
        target_var: The same of the targets. Either going to 0 means collapse.
        masked_fraction: Share of patches that is masked.
        num_masked_tokens: Masked tokens S of the batch over all clips, mixtures and clones: what sums are divided by.
    """

    loss: torch.FloatTensor | None = None
    ua_local_loss: torch.FloatTensor | None = None
    ua_global_loss: torch.FloatTensor | None = None
    pma_local_loss: torch.FloatTensor | None = None
    pma_global_loss: torch.FloatTensor | None = None
    srl_loss: torch.FloatTensor | None = None
    pred_var: torch.FloatTensor | None = None
    target_var: torch.FloatTensor | None = None
    masked_fraction: torch.FloatTensor | None = None
    num_masked_tokens: torch.LongTensor | None = None


class SSLAMForPreTraining(SSLAMPreTrainedModel):
    """Student, decoder and teacher, with the objective that `config.pretraining_objective` names.

    A training step is: forward, backward, optimiser step n (counted from 1), `update_teacher(ema_decay(n))`. The
    folder it saves is a checkpoint of all three; [`SSLAMModel`] and [`SSLAMForAudioClassification`] read the student
    from it, and `SSLAMForPreTraining.from_pretrained(folder).teacher` is an [`SSLAMModel`] too. Whatever is done to
    the model, its teacher stays in float32 and in evaluation mode.
    """

    _keep_in_fp32_modules_strict = ["teacher"]
    _auto_map = SSLAMPreTrainedModel._auto_map | {
        "AutoModelForPreTraining": "modeling_sslam_pretraining.SSLAMForPreTraining"
    }

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__(config)
        self.sslam = SSLAMModel(config)
        self.decoder = SSLAMDecoder(config)
        self.teacher = SSLAMModel(config).float().eval().requires_grad_(False)
        self.post_init()
        self.update_teacher(0.0)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, output_loading_info: bool = False, **kwargs: Any
    ) -> "SSLAMForPreTraining | tuple[SSLAMForPreTraining, dict[str, Any]]":
        """As in transformers. From a checkpoint without a teacher, such as an encoder's, it becomes a copy of the
        student."""
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if any(name.startswith("teacher.") for name in info["missing_keys"]):
            logger.warning(f"{pretrained_model_name_or_path} holds no teacher: it starts as a copy of the student.")
            model.update_teacher(0.0)
        model.teacher.requires_grad_(False)  # transformers 5 loads weights as new, trainable parameters
        return (model, info) if output_loading_info else model

    def train(self, mode: bool = True) -> "SSLAMForPreTraining":
        super().train(mode)
        self.teacher.eval()
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "SSLAMForPreTraining":
        # `to`, `half` and the like come through here. At the decays in use a half-precision average would never move.
        teacher_ids = {id(tensor) for tensor in (*self.teacher.parameters(), *self.teacher.buffers())}

        def apply(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            if id(tensor) in teacher_ids and moved.dtype != torch.float32:
                return tensor.to(moved.device, torch.float32)
            return moved

        return super()._apply(apply, recurse)

    def ema_decay(self, update: int) -> float:
        """The teacher's decay after optimiser update `update` (counted from 1): linear, then constant."""
        config = self.config
        progress = min(update / config.ema_anneal_end_step, 1.0)
        return config.ema_decay + progress * (config.ema_end_decay - config.ema_decay)

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        """teacher = decay * teacher + (1 - decay) * student, in float32; 0 makes it a copy of the student."""
        student = [parameter.detach().float() for parameter in self.sslam.parameters()]
        torch._foreach_lerp_(list(self.teacher.parameters()), student, 1.0 - decay)

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        bool_masked_pos: torch.Tensor | None = None,
        unmixed_starts: tuple[int, int] | None = None,
        generator: torch.Generator | None = None,
    ) -> SSLAMForPreTrainingOutput:
        """
        Args:
            input_values: Normalised log-mel frames `(batch_size, T, num_mel_bins)`; for objectives with mixtures at
                least two clips of at least four time patches.
            bool_masked_pos: bool `(batch_size, num_clones, N)`, True for masked patches, as many in every row; a
                mixture has the masks of the clip it is made of. Drawn by [`inverse_block_masks`] if not given.
            unmixed_starts: First frames of the two unmixed windows of the mixtures, multiples of `patch_size`. Drawn
                by [`draw_unmixed_starts`] if not given.
            generator: What masks and windows are drawn from; torch's own CPU generator if not given. (The noise at the
                decoder's masked places comes from torch's own generator of the device, as dropout does.)

        Returns:
            [`SSLAMForPreTrainingOutput`].

        Raises:
            ValueError: If the batch cannot be mixed, or masks or windows do not fit it.

        Source: paper sections 3.1 to 3.3; the weighting of the terms is the published code's.
        """
        input_values = check_input_values(input_values, self.config)
        config, objective = self.config, self.config.pretraining_objective
        batch_size, time_patches = len(input_values), input_values.shape[1] // config.patch_size
        has_ua, has_pma, has_srl = objective != "pma", objective != "ua", objective == "sslam"

        # Masks and windows are made on the CPU, where checking them does not wait for an accelerator.
        if bool_masked_pos is None:
            bool_masked_pos = inverse_block_masks(batch_size, time_patches, config, generator)
        visible, masked = self._split_patches(bool_masked_pos, batch_size, time_patches * config.num_mel_patches)
        inputs = input_values
        if has_pma:
            is_unmixed = self._unmixed_patches(batch_size, time_patches, unmixed_starts, generator)
            own_alone = is_unmixed.repeat_interleave(config.patch_size)[:, None].to(input_values.device)
            mixtures = torch.where(own_alone, input_values, torch.maximum(input_values, input_values.roll(1, 0)))
            inputs = torch.cat((input_values, mixtures)) if has_ua else mixtures
        num_passes = len(inputs) // batch_size
        visible, masked = (index.to(inputs.device).repeat(num_passes, 1, 1) for index in (visible, masked))

        with torch.no_grad():
            teacher_patches = self.teacher.patch_embeddings(inputs)
            local_targets, global_targets = self._targets(teacher_patches)
            if has_srl:
                # Before the student's pass, whose intermediate values stay in memory.
                mixed = (~is_unmixed).repeat_interleave(config.num_mel_patches).nonzero().squeeze(1).to(inputs.device)
                retention = self._retention_targets(teacher_patches[:batch_size], local_targets[:batch_size], mixed)
        global_predictions, predictions = self._predict(inputs, visible, masked)

        # Clips and mixtures in chunks, since the gradient of a slice is as large as what it was cut from.
        local_parts, global_parts = (
            tuple(zip(*(tensor.chunk(num_passes) for tensor in tensors), strict=True))
            for tensors in ((predictions, local_targets, masked), (global_predictions, global_targets))
        )
        names = [name for name, is_used in (("ua", has_ua), ("pma", has_pma)) if is_used]
        scale = 1.0 / masked.numel()
        terms: dict[str, torch.Tensor] = {}
        for name, local_part, global_part in zip(names, local_parts, global_parts, strict=True):
            terms[f"{name}_local_loss"] = _local_loss(*local_part) * scale
            terms[f"{name}_global_loss"] = config.global_loss_weight * _global_loss(*global_part)
        if has_srl:
            of_mixtures, _, masked_of_mixtures = local_parts[-1]
            error = _local_loss(of_mixtures, retention, masked_of_mixtures)
            terms["srl_loss"] = config.retention_loss_weight * error * scale

        return SSLAMForPreTrainingOutput(
            loss=sum(terms.values()),
            **terms,
            pred_var=prediction_deviation(predictions),
            target_var=target_deviation(local_targets, masked),
            masked_fraction=torch.tensor(masked.shape[2] / local_targets.shape[1]),
            num_masked_tokens=torch.tensor(masked.numel()),
        )

    def _split_patches(
        self, bool_masked_pos: torch.Tensor, batch_size: int, num_patches: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Indices of visible and masked patches, each `(batch_size, num_clones, ...)` and in the patches' order."""
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
        order = bool_masked_pos.to(torch.uint8).argsort(dim=-1, stable=True)
        return order.split((num_patches - num_masked, num_masked), dim=-1)

    def _unmixed_patches(
        self,
        batch_size: int,
        time_patches: int,
        unmixed_starts: tuple[int, int] | None,
        generator: torch.Generator | None,
    ) -> torch.Tensor:
        """bool `(time_patches,)`, True inside the two windows where the mixtures hold their own clip alone."""
        if batch_size < 2:
            raise ValueError(
                f"A batch of {batch_size} clip has no foreign clip to mix in; the objective "
                f'"{self.config.pretraining_objective}" needs at least 2 clips on every device. Drop the batch.'
            )
        if time_patches < 4:
            raise ValueError(
                f"Clips of {time_patches} time patches cannot be mixed; use at least "
                f"{4 * self.config.patch_size} frames."
            )
        if unmixed_starts is None:
            unmixed_starts = draw_unmixed_starts(time_patches, self.config, generator)
        width, patch_size = unmixed_window_width(time_patches), self.config.patch_size
        first, second = (start // patch_size for start in unmixed_starts)
        if any(start % patch_size for start in unmixed_starts) or not (
            0 <= first <= second - width <= time_patches - 2 * width
        ):
            raise ValueError(
                f"unmixed_starts={tuple(unmixed_starts)} do not fit: they must be multiples of {patch_size} and start "
                f"two windows of {width * patch_size} frames, one after the other, within the clip's "
                f"{time_patches * patch_size}."
            )
        is_unmixed = torch.zeros(time_patches, dtype=torch.bool)
        is_unmixed[first : first + width] = True
        is_unmixed[second : second + width] = True
        return is_unmixed

    def _ffn_outputs(self, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What the teacher's MLPs make of the patches, block by block, without the CLS token."""
        return tuple(output[:, 1:] for output in self.teacher.encoder(patches, output_ffn=True).ffn_outputs)

    def _targets(self, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Local `(batch_size, num_patches, D)` and global `(batch_size, D)` targets, in float32."""
        ffn_outputs = self._ffn_outputs(patches)
        num_layers = self.config.num_target_layers or len(ffn_outputs)
        num_global_layers = self.config.num_global_target_layers
        if num_global_layers is None:
            num_global_layers = len(ffn_outputs) if self.config.pretraining_objective == "ua" else 1
        local = _normalised_mean(ffn_outputs[-num_layers:])
        if num_global_layers == num_layers:
            return local, local.mean(1)
        return local, _normalised_mean(ffn_outputs[-num_global_layers:]).mean(1)

    def _retention_targets(
        self, patches: torch.Tensor, own_targets: torch.Tensor, mixed: torch.Tensor
    ) -> torch.Tensor:
        """What a mixture should still tell of both its sources: at the patches `mixed`, the mean of the two clips'
        targets, the foreign clip's made from these patches alone; elsewhere the own clip's target."""
        ffn_outputs = self._ffn_outputs(patches[:, mixed])
        foreign_targets = _normalised_mean(ffn_outputs[-(self.config.num_target_layers or len(ffn_outputs)) :])
        retention = own_targets.clone()
        retention[:, mixed] = (own_targets[:, mixed] + foreign_targets.roll(1, 0)) / 2
        return retention

    def _predict(
        self, inputs: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The student's global `(batch_size, num_clones, D)` and local `(batch_size, num_clones, num_masked, D)`
        predictions, the latter at masked places only."""
        config = self.config
        num_patches = visible.shape[2] + masked.shape[2]
        patches = self.sslam.patch_embeddings(inputs)
        clones = _gather(patches, visible.flatten(1)).view(-1, visible.shape[2], config.hidden_size)
        states = self.sslam.encoder(clones).last_hidden_state

        grid = torch.empty(len(states), num_patches, config.hidden_size, device=states.device, dtype=states.dtype)
        grid.normal_(std=config.mask_noise_std)
        index = visible.flatten(0, 1)[..., None].expand(-1, -1, config.hidden_size)
        grid = grid.scatter_(1, index, states[:, 1:]).unflatten(1, (-1, config.num_mel_patches))
        local = self.decoder(grid, masked.flatten(0, 1))
        return states[:, 0].unflatten(0, visible.shape[:2]), local.unflatten(0, visible.shape[:2])


SSLAMForPreTraining.register_for_auto_class("AutoModelForPreTraining")

__all__ = ["SSLAMForPreTraining", "SSLAMForPreTrainingOutput"]

"""Plain transcription of the encoder and objectives, a rival of the benchmarks.

It stands in for the published code, which needs fairseq. It shares only the configuration and the drawing of masks and
windows with `modeling_sslam`. Attention is computed step by step with its softmax in float32; targets are repeated for
every clone; the decoder works on `(batch, channels, time, mel)` and predicts all patches, and the masked patches are
selected afterwards. [`load_weights`] copies the weights of an `SSLAMForPreTraining`, so that both compute the same
numbers.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from modeling_sslam import SSLAMConfig, SSLAMForPreTraining
from modeling_sslam.modeling_sslam import sincos_position_table
from modeling_sslam.modeling_sslam_pretraining import draw_unmixed_starts, inverse_block_masks, unmixed_window_width

# Substrings of names in `SSLAMForPreTraining`, and what replaces them here.
RENAMED = {
    "sslam.": "student.",
    "patch_embeddings.": "",
    "encoder.": "",
    "attention_layernorm.": "norm1.",
    "mlp_layernorm.": "norm2.",
    "attention.qkv.": "attention.qkv.",
    "attention.output.": "attention.proj.",
    "layers.": "blocks.",
}


class Attention(nn.Module):
    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.scale = (config.hidden_size // config.num_attention_heads) ** -0.5
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, width // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = (q * self.scale) @ k.transpose(-2, -1)
        probabilities = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
        return self.proj((probabilities @ v).transpose(1, 2).reshape(batch, length, width))


class MLP(nn.Module):
    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x + self.attention(x)
        r = x = self.norm1(x)
        m = self.mlp(x)
        return self.norm2(r + m), m


class Encoder(nn.Module):
    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.projection = nn.Conv2d(1, config.hidden_size, config.patch_size, config.patch_size)
        self.register_buffer("positions", sincos_position_table(config), persistent=False)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    def embed(self, clips: torch.Tensor) -> torch.Tensor:
        patches = self.projection(clips[:, None]).flatten(2).transpose(1, 2)
        return patches + self.positions[: patches.shape[1]]

    def forward(self, patches: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the last block's output and all blocks' FFN outputs, the CLS token first."""
        x = self.layernorm(torch.cat((self.cls_token.expand(len(patches), -1, -1), patches), dim=1))
        ffn_outputs = []
        for block in self.blocks:
            x, ffn_output = block(x)
            ffn_outputs.append(ffn_output)
        return x, ffn_outputs


class DecoderLayer(nn.Module):
    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        width, kernel_size = config.hidden_size, config.decoder_kernel_size
        self.conv = nn.Conv2d(width, width, kernel_size, padding=kernel_size // 2, groups=config.decoder_groups)
        self.norm = nn.LayerNorm(width, eps=1e-5, elementwise_affine=False)
        self.act = nn.GELU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        update = self.conv(x)
        update = self.norm(update.transpose(-3, -1)).transpose(-3, -1)
        return x + self.act(update)


class Decoder(nn.Module):
    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.mel_patches = config.num_mel_patches
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_num_layers))
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        x = x.transpose(1, 2).reshape(batch, width, length // self.mel_patches, self.mel_patches)
        for layer in self.layers:
            x = layer(x)
        return self.proj(x.flatten(2).transpose(1, 2))


class PlainPreTraining(nn.Module):
    """Student, decoder, teacher and the objectives "ua" (stage 1) and "sslam" (stage 2)."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.config = config
        self.student = Encoder(config)
        self.decoder = Decoder(config)
        self.teacher = Encoder(config).eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "PlainPreTraining":
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def update_teacher(self, decay: float) -> None:
        for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            teacher.mul_(decay).add_(student.float(), alpha=1 - decay)

    def forward(
        self,
        clips: torch.Tensor,
        masks: torch.Tensor | None = None,
        unmixed_starts: tuple[int, int] | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the objective.

        Args:
            clips: Normalised log-mel frames `(batch_size, T, num_mel_bins)`.
            masks: bool `(batch_size, num_clones, N)`, True for masked patches; drawn if not given.
            unmixed_starts: First frames of the two unmixed windows; drawn if not given.

        Returns:
            The loss, its terms, pred_var and target_var, under the names of `SSLAMForPreTrainingOutput`.
        """
        config = self.config
        batch_size, num_frames, _ = clips.shape
        time_patches, mel_patches = num_frames // config.patch_size, config.num_mel_patches
        if masks is None:
            masks = inverse_block_masks(batch_size, time_patches, config)
        masks = masks.flatten(0, 1).to(clips.device)  # the clones of a clip one after the other
        num_clones = len(masks) // batch_size
        is_second_stage = config.pretraining_objective == "sslam"
        inputs = clips
        if is_second_stage:
            starts = unmixed_starts or draw_unmixed_starts(time_patches, config)
            window = unmixed_window_width(time_patches) * config.patch_size
            is_unmixed = torch.zeros(num_frames, dtype=torch.bool, device=clips.device)
            for start in starts:
                is_unmixed[start : start + window] = True
            mixtures = torch.where(is_unmixed[:, None], clips, torch.maximum(clips, clips.roll(1, 0)))
            inputs = torch.cat((clips, mixtures))
            masks = torch.cat((masks, masks))

        cls, predictions = self.predict(inputs, masks, num_clones)
        with torch.no_grad():
            patches = self.teacher.embed(inputs)
            ffn_outputs = self.teacher_outputs(patches)
            local = self.targets(ffn_outputs, config.num_target_layers or len(ffn_outputs))
            default = 1 if is_second_stage else len(ffn_outputs)
            clip_targets = self.targets(ffn_outputs, config.num_global_target_layers or default).mean(1)
            repeated = local.repeat_interleave(num_clones, 0)
            repeated_clips = clip_targets.repeat_interleave(num_clones, 0)

        per_sqrt_width = 1 / math.sqrt(config.hidden_size)
        num_masked = masks.sum()
        errors = F.mse_loss(predictions[masks].float(), repeated[masks], reduction="none") * per_sqrt_width
        clip_errors = F.mse_loss(cls.float(), repeated_clips, reduction="none") * per_sqrt_width
        own, own_clips = len(errors) * batch_size // len(inputs), batch_size * num_clones
        terms = {
            "ua_local_loss": errors[:own].sum() / num_masked,
            "ua_global_loss": config.global_loss_weight * clip_errors[:own_clips].sum(),
        }
        if is_second_stage:
            terms["pma_local_loss"] = errors[own:].sum() / num_masked
            terms["pma_global_loss"] = config.global_loss_weight * clip_errors[own_clips:].sum()
            with torch.no_grad():
                is_mixed = ~is_unmixed[:: config.patch_size].repeat_interleave(mel_patches)
                dropped_outputs = self.teacher_outputs(patches[:batch_size][:, is_mixed])
                foreign = self.targets(dropped_outputs, config.num_target_layers or len(dropped_outputs))
                composed = local[:batch_size].clone()
                composed[:, is_mixed] = foreign.roll(1, 0)
                retention = ((local[:batch_size] + composed) / 2).repeat_interleave(num_clones, 0)
            mixture_masks = masks[own_clips:]
            retention_errors = F.mse_loss(
                predictions[own_clips:][mixture_masks].float(), retention[mixture_masks], reduction="none"
            )
            terms["srl_loss"] = config.retention_loss_weight * (retention_errors * per_sqrt_width).sum() / num_masked
        with torch.no_grad():
            deviations = {
                "pred_var": self.deviation(predictions[masks].float()),
                "target_var": self.deviation(repeated[masks]),
            }
        return {"loss": sum(terms.values()), **terms, **deviations}

    def predict(self, inputs: torch.Tensor, masks: torch.Tensor, num_clones: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the student's CLS outputs and its predictions of all patches, for every clone."""
        patches = self.student.embed(inputs).repeat_interleave(num_clones, 0)
        visible = patches[~masks].view(len(patches), -1, patches.shape[-1])
        states, _ = self.student(visible)
        grid = torch.randn_like(patches, dtype=states.dtype) * self.config.mask_noise_std
        grid[~masks] = states[:, 1:].flatten(0, 1)
        return states[:, 0], self.decoder(grid)

    def teacher_outputs(self, patches: torch.Tensor) -> list[torch.Tensor]:
        _, ffn_outputs = self.teacher(patches)
        return [output[:, 1:] for output in ffn_outputs]

    @staticmethod
    def targets(ffn_outputs: list[torch.Tensor], num_layers: int) -> torch.Tensor:
        normed = [F.instance_norm(y.float().transpose(1, 2)).transpose(1, 2) for y in ffn_outputs[-num_layers:]]
        y = sum(normed) / num_layers
        return F.layer_norm(y, y.shape[-1:])

    @staticmethod
    def deviation(tokens: torch.Tensor) -> torch.Tensor:
        return (tokens.var(0) + 1e-6).sqrt().mean()


def load_weights(plain: PlainPreTraining, model: SSLAMForPreTraining) -> None:
    """Copy the weights of `model` to `plain`."""
    plain.load_state_dict(rename(model.state_dict()))


def rename(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename tensors (weights, gradients) of `SSLAMForPreTraining` as [`PlainPreTraining`] names them."""
    renamed = {}
    for name, tensor in named.items():
        if name.startswith("decoder."):
            name = name.replace("projection.", "proj.")
            if name.startswith("decoder.layers."):
                index, rest = name.removeprefix("decoder.layers.").split(".", 1)
                name = f"decoder.layers.{index}.conv.{rest}"
        else:
            for old, new in RENAMED.items():
                name = name.replace(old, new)
        renamed[name] = tensor
    return renamed

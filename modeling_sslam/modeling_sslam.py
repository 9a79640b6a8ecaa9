"""The SSLAM encoder and its audio classifier (Alex et al., ICLR 2025, arXiv 2506.12222), which are EAT's too.

In the order of the data: patches with fixed positions, CLS token and LayerNorm, post-norm transformer blocks, head.
A clip of T frames has N = (T / patch_size) * (F / patch_size) patches, time-major: patch t * (F / patch_size) + f.
"""

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from torch.utils.checkpoint import checkpoint
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling, SequenceClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils.generic import can_return_tuple

from .configuration_sslam import SSLAMConfig

IS_X86_WITH_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in (
    "AVX2",
    "AVX512",
)


def _is_intels(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    # Only Linux says who made the processor in a file; elsewhere `platform` does.
    vendor = cpuinfo.read_text()[:1000] if cpuinfo.exists() else platform.processor()
    return "GenuineIntel" in vendor


# Torch leaves float32 products on x86 CPUs to MKL and convolutions to oneDNN. On the Intel processor measured, MKL is
# the faster of the two; on the AMD one, oneDNN is twice as fast (benchmarks/NOTES.md).
ONEDNN_IS_FASTER = IS_X86_WITH_ONEDNN and not _is_intels()
# Tokens of a clip that have their attention computed by convolutions where that is faster, and how many of its scores
# at a time (benchmarks/NOTES.md).
CONVOLVED_LENGTHS, SCORES_AT_A_TIME = range(200, 2100), 1 << 20


def sincos_position_table(config: SSLAMConfig) -> torch.Tensor:
    """Fixed 2-D positions: the first half of the channels encodes the mel coordinate, the second half time, each as
    [sin(p w), cos(p w)] with w_k = 10000^(-k / (hidden_size / 4)).

    Returns:
        float32 of shape `(max_position_embeddings * num_mel_patches, hidden_size)`, time-major.
    """
    # Every step in float32, as the published table was made: at late positions the angles' rounding shows.
    quarter = config.hidden_size // 4
    frequencies = 1 / np.float32(10_000) ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))

    def encode(length: int) -> torch.Tensor:
        angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
        return torch.from_numpy(np.concatenate((np.sin(angles), np.cos(angles)), axis=1))

    mel, time = encode(config.num_mel_patches), encode(config.max_position_embeddings)
    return torch.cat((mel.repeat(len(time), 1), time.repeat_interleave(len(mel), dim=0)), dim=1)


def check_input_values(input_values: torch.Tensor, config: SSLAMConfig) -> torch.Tensor:
    """The input as `(batch_size, T, num_mel_bins)`, without the channel axis of the published interface.

    Raises:
        ValueError: If the model takes no input of this shape.
    """
    patch_size, num_mel_bins = config.patch_size, config.num_mel_bins
    if input_values.ndim == 4 and input_values.shape[1] == 1:
        input_values = input_values.squeeze(1)
    if input_values.ndim != 3 or input_values.shape[2] != num_mel_bins:
        raise ValueError(
            f"input_values has shape {tuple(input_values.shape)}; this model takes (batch_size, T, "
            f"{num_mel_bins}) or (batch_size, 1, T, {num_mel_bins})."
        )
    length, longest = input_values.shape[1], config.max_position_embeddings * patch_size
    if length == 0 or length % patch_size or length > longest:
        raise ValueError(
            f"input_values has T={length} frames; T must be a multiple of {patch_size}, at most {longest}. The "
            "feature extractor pads to such a length; cut longer recordings into windows."
        )
    return input_values


class SSLAMPatchEmbeddings(nn.Module):
    """Projects the patches of `(batch_size, T, F)` and adds their positions: `(batch_size, N, hidden_size)`."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.config = config
        self.projection = nn.Conv2d(1, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.register_buffer("position_embeddings", sincos_position_table(config), persistent=False)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        input_values = check_input_values(input_values, self.config)
        dtype = self.projection.weight.dtype
        patches = self.projection(input_values[:, None].to(dtype)).flatten(2).transpose(1, 2)
        return patches + self.position_embeddings[: patches.shape[1]].to(dtype)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2), probabilities


def recomputing(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """`function(*inputs)`, of which the backward pass keeps the inputs alone: what lies between is computed again.
    That ends where the last value that it needs is known, so a linear layer at the end of it is not."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class SSLAMLinear(nn.Linear):
    """A linear layer that asks for its product as a 1x1 convolution where that is faster, forward and backward: on x86
    CPUs that are not Intel's, in float32."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not _is_faster_as_convolution(input, self.weight):
            return super().forward(input)
        return _convolve_tokens(input.reshape(-1, self.in_features), self.weight, self.bias).view(
            *input.shape[:-1], self.out_features
        )


def _convolve_tokens(
    tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int = 1
) -> torch.Tensor:
    """Tokens `(length, in_features)` times the transposed weight, each group of features with its rows of it."""
    # Tokens lie along the height of one image whose channels are innermost in memory, so nothing is copied.
    image = tokens[None, :, None].permute(0, 3, 1, 2)
    output = nn.functional.conv2d(image, weight[..., None, None], bias, groups=groups)
    return output.permute(0, 2, 3, 1).view(len(tokens), len(weight))


def _is_faster_as_convolution(input: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        input.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and type(weight) is nn.Parameter  # others, such as quantised ones, bring products of their own
        and ONEDNN_IS_FASTER
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()  # what others run need not have oneDNN
        and input.numel() > 0  # a convolution refuses an empty image
    )


def convolution_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as 1x1 convolutions of which a head is a group, clip by clip and some heads at a time; faster for the
    reason that [`SSLAMLinear`] gives. Its backward pass would keep all scores.

    Args:
        query, key, value: Of shape `(batch_size, num_heads, length, head_dim)`.
        attention_mask: Additive, of shape `(batch_size, 1, length, length)`, all rows of a clip alike.

    Returns:
        `(batch_size, length, num_heads, head_dim)`, and no probabilities.
    """
    batch_size, num_heads, length, head_dim = query.shape
    heads_at_a_time = max(1, SCORES_AT_A_TIME // length**2)
    attended = query.new_empty(batch_size, length, num_heads, head_dim)
    for clip in range(batch_size):
        for head in range(0, num_heads, heads_at_a_time):
            heads = slice(head, head + heads_at_a_time)
            queries = (query[clip, heads] * scaling).transpose(0, 1).flatten(1)
            keys, values = key[clip, heads].flatten(0, 1), value[clip, heads].mT.flatten(0, 1)
            groups = len(keys) // length
            # The mask, which is the same for all queries, is the bias of the channels: each holds the scores of a key.
            bias = None if attention_mask is None else attention_mask[clip, 0, 0].repeat(groups)
            scores = _convolve_tokens(queries, keys, bias, groups).unflatten(1, (groups, length))
            mixed = _convolve_tokens(scores.softmax(-1).flatten(1), values, None, groups)
            attended[clip, :, heads] = mixed.unflatten(1, (groups, head_dim))
    return attended, None


class SSLAMAttention(nn.Module):
    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # read by transformers' attention functions
        self.qkv = SSLAMLinear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.output = SSLAMLinear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | BlockMask | None, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        qkv = self.qkv(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        implementation = _attention_implementation(self.config, output_attentions)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        attend: Callable = (
            eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        )
        if implementation == "sdpa" and dropout == 0.0 and self._is_faster_by_convolution(hidden_states):
            attend = convolution_attention_forward
        attended, probabilities = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling
        )
        return self.output(attended.flatten(2)), probabilities if output_attentions else None

    def _is_faster_by_convolution(self, hidden_states: torch.Tensor) -> bool:
        return (
            not torch.compiler.is_compiling()  # the graph would have every clip and head in it
            and not torch.is_grad_enabled()
            and hidden_states.shape[1] in CONVOLVED_LENGTHS
            and _is_faster_as_convolution(hidden_states, self.qkv.weight)
        )


class SSLAMMLP(nn.Module):
    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.fc1 = SSLAMLinear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = SSLAMLinear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return recomputing(self._activate_and_project, self.fc1(hidden_states))

    def _activate_and_project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(hidden_states))


def drop_path(branch: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Stochastic depth (Huang et al., 2016): drops a residual branch for whole clips and rescales the others."""
    if rate == 0.0 or not training:
        return branch
    kept = torch.rand(branch.shape[0], 1, 1, device=branch.device) >= rate
    return branch * (kept / max(1.0 - rate, torch.finfo(torch.float32).tiny)).to(branch.dtype)


class SSLAMLayer(GradientCheckpointingLayer):
    """A post-norm block: x = LN(x + attention(x)), then x = LN(x + m) with m = MLP(x)."""

    def __init__(self, config: SSLAMConfig, drop_path_rate: float) -> None:
        super().__init__()
        self.attention = SSLAMAttention(config)
        self.attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SSLAMMLP(config)
        self.mlp_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.drop_path_rate = drop_path_rate

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | BlockMask | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Returns the block's output, its MLP's output m (which the teacher's targets are made of) and, if asked for,
        the attention probabilities."""
        attended, attentions = self.attention(hidden_states, attention_mask, output_attentions)
        attended = drop_path(self.dropout(attended), self.drop_path_rate, self.training)
        hidden_states = self.attention_layernorm(hidden_states + attended)
        ffn_output = self.mlp(hidden_states)
        update = drop_path(self.dropout(ffn_output), self.drop_path_rate, self.training)
        return self.mlp_layernorm(hidden_states + update), ffn_output, attentions


class SSLAMEncoderOutput(NamedTuple):
    """What the blocks computed, all with the CLS token at index 0; the tuples are None unless they were asked for."""

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None
    attentions: tuple[torch.Tensor, ...] | None
    ffn_outputs: tuple[torch.Tensor, ...] | None


class SSLAMEncoder(nn.Module):
    """Puts the CLS token before the patches (any subset of a clip's), normalises and runs the blocks."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        last = max(config.num_hidden_layers - 1, 1)
        self.layers = nn.ModuleList(
            SSLAMLayer(config, config.drop_path_rate * i / last) for i in range(config.num_hidden_layers)
        )

    def forward(
        self,
        patches: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        output_ffn: bool = False,
    ) -> SSLAMEncoderOutput:
        """
        Args:
            patches: Of shape `(batch_size, num_patches, hidden_size)`, positions already added.
            patch_mask: bool of shape `(batch_size, num_patches)`, False for patches that nothing may attend to.
        """
        hidden_states, attention_mask = self.prepare(patches, patch_mask, output_attentions)
        all_hidden_states, all_attentions, all_ffn_outputs = [hidden_states], [], []
        for layer in self.layers:
            hidden_states, ffn_output, attentions = layer(hidden_states, attention_mask, output_attentions)
            if output_hidden_states:
                all_hidden_states.append(hidden_states)
            if output_attentions:
                all_attentions.append(attentions)
            if output_ffn:
                all_ffn_outputs.append(ffn_output)
        return SSLAMEncoderOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=tuple(all_attentions) if output_attentions else None,
            ffn_outputs=tuple(all_ffn_outputs) if output_ffn else None,
        )

    def prepare(
        self, patches: torch.Tensor, patch_mask: torch.Tensor | None, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | BlockMask | None]:
        """The first block's input `(batch_size, 1 + num_patches, hidden_size)`, and the mask that all blocks take."""
        cls_tokens = self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype)
        hidden_states = self.layernorm(torch.cat((cls_tokens, patches), dim=1))
        if patch_mask is None:
            return hidden_states, None
        token_mask = nn.functional.pad(patch_mask, (1, 0), value=True)
        implementation = _attention_implementation(self.config, output_attentions)
        return hidden_states, _attention_mask(token_mask, hidden_states.dtype, implementation)


def _attention_implementation(config: SSLAMConfig, output_attentions: bool) -> str:
    # Only the eager implementation has the probabilities at hand.
    return "eager" if output_attentions else config._attn_implementation or "eager"


def _attention_mask(
    token_mask: torch.Tensor, dtype: torch.dtype, implementation: str
) -> torch.Tensor | BlockMask | None:
    """The mask as the attention function wants it: flash attention takes the tokens' own `(batch_size, length)`, flex
    attention a block mask, the others a bias that is added to the scores."""
    # Attention is faster without a mask. A compiled graph cannot depend on what the mask holds.
    if not torch.compiler.is_compiling() and token_mask.all():
        return None
    if "flash" in implementation:
        return token_mask
    batch_size, length = token_mask.shape
    if implementation == "flex_attention":
        # Flex attention reads the mask up to the end of its last block of 128 keys.
        whole_blocks = nn.functional.pad(token_mask, (0, -length % 128))
        return create_block_mask(
            lambda batch, head, query, key: whole_blocks[batch, key],
            batch_size,
            None,
            length,
            length,
            device=token_mask.device,
        )
    bias = torch.zeros(token_mask.shape, dtype=dtype, device=token_mask.device)
    bias = bias.masked_fill(~token_mask, torch.finfo(dtype).min)
    return bias[:, None, None, :].expand(-1, 1, length, -1)


def patch_mask_from_frames(attention_mask: torch.Tensor, config: SSLAMConfig) -> torch.Tensor:
    """bool `(batch_size, N)` from a mask of frames `(batch_size, T)`: a patch counts if any of its frames does."""
    time_mask = attention_mask.bool().unflatten(1, (-1, config.patch_size)).any(-1)
    return time_mask.repeat_interleave(config.num_mel_patches, dim=1)


class SSLAMPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving for all SSLAM models."""

    config_class = SSLAMConfig
    base_model_prefix = "sslam"
    main_input_name = "input_values"
    input_modalities = ("audio",)
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SSLAMPatchEmbeddings", "SSLAMLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # A pre-training checkpoint holds the student under the name of the base model; encoder and classifier read that.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [r"^decoder\.", r"^teacher\."]
    # The classes that the source files beside saved weights define.
    _auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_sslam.SSLAMConfig",
        "AutoModel": "modeling_sslam.SSLAMModel",
        "AutoModelForAudioClassification": "modeling_sslam.SSLAMForAudioClassification",
    }

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__(config)
        config.validate_architecture()

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Transformers would guess this from the wording of the source, and each major version seeks another.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # By torch.nn.init: transformers 5 makes those functions spare weights that were loaded.
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            if module.elementwise_affine:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        elif isinstance(module, SSLAMEncoder):
            nn.init.normal_(module.cls_token, std=self.config.initializer_range)
        elif isinstance(module, SSLAMPatchEmbeddings):
            # A buffer that is not saved has no values after loading through the meta device.
            module.position_embeddings.copy_(sincos_position_table(self.config))

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """As in transformers; beside the weights it writes the source files that a machine without this package needs
        for `from_pretrained(..., trust_remote_code=True)`."""
        self.config.auto_map = dict(self._auto_map)
        super().save_pretrained(save_directory, **kwargs)


class SSLAMModel(SSLAMPreTrainedModel):
    """The encoder: `input_values` to one state for each patch and one, the CLS token's, for the clip."""

    # Nor does it miss a classifier's head.
    _keys_to_ignore_on_load_unexpected: ClassVar[list[str]] = [
        *SSLAMPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^classifier\.",
    ]

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__(config)
        self.patch_embeddings = SSLAMPatchEmbeddings(config)
        self.encoder = SSLAMEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> SSLAMPatchEmbeddings:
        return self.patch_embeddings

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> BaseModelOutputWithPooling:
        """
        Args:
            input_values: Normalised log-mel frames of shape `(batch_size, T, num_mel_bins)` or `(batch_size, 1, T,
                num_mel_bins)`, as [`SSLAMFeatureExtractor`] makes them; T a multiple of `patch_size`.
            attention_mask: Of shape `(batch_size, T)`, 1 for frames of the clip and 0 for padding. Patches that are
                padding throughout are attended to by none, so a clip gets the result it gets alone. Without it the
                padding counts as sound, as in the published models.
            output_attentions: Whether to return the attention probabilities (computed eagerly).
            output_hidden_states: Whether to return the output of the embeddings and of every block.

        Returns:
            `last_hidden_state` of shape `(batch_size, 1 + N, hidden_size)`, the CLS token first ([`patch_grid`] and
            [`frame_features`] rearrange the rest); `pooler_output` of shape `(batch_size, hidden_size)`, the CLS
            token's state; `hidden_states` and `attentions` if asked for.

        Raises:
            ValueError: If T or the number of mel bins does not fit the model, or the mask the input.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        patches = self.patch_embeddings(input_values)
        patch_mask = None
        if attention_mask is not None:
            if attention_mask.shape != (input_values.shape[0], input_values.shape[-2]):
                raise ValueError(
                    f"attention_mask has shape {tuple(attention_mask.shape)}; it masks frames, so for these "
                    f"input_values it must be {(input_values.shape[0], input_values.shape[-2])}."
                )
            patch_mask = patch_mask_from_frames(attention_mask, self.config)
        outputs = self.encoder(patches, patch_mask, output_hidden_states, output_attentions)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.last_hidden_state[:, 0],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def patch_grid(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Patch states on their grid: `(batch_size, 1 + N, D)` to `(batch_size, T / 16, F / 16, D)` (for patches of
        16): axis 1 is time in steps of 160 ms, axis 2 goes from low to high frequency."""
        return hidden_states[:, 1:].unflatten(1, (-1, self.config.num_mel_patches))

    def frame_features(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """A sequence in time: the mean of the patch states over frequency, `(batch_size, T / 16, D)`."""
        return self.patch_grid(hidden_states).mean(2)


class SSLAMClassifier(nn.Module):
    """LayerNorm and linear layer on the pooled tokens, `(batch_size, 1 + N, hidden_size)` to logits."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.pooling = config.classifier_pooling
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.classifier_norm_eps)
        self.dense = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_states: torch.Tensor, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.pooling == "cls":
            pooled = hidden_states[:, 0]
        elif self.pooling == "mean":
            pooled = _masked_mean(hidden_states[:, 1:], patch_mask)
        else:
            pooled = linear_softmax_pooling(hidden_states[:, 1:], patch_mask)
        return self.dense(self.layernorm(pooled))


def _masked_mean(patches: torch.Tensor, patch_mask: torch.Tensor | None) -> torch.Tensor:
    if patch_mask is None:
        return patches.mean(1)
    # The sum and the count in float32, as `mean` does: bfloat16 cannot even count to 512 exactly.
    total = patches.masked_fill(~patch_mask[..., None], 0.0).sum(1, dtype=torch.float32)
    return (total / patch_mask.sum(1, keepdim=True)).to(patches.dtype)


def linear_softmax_pooling(states: torch.Tensor, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
    """The logits of sum(p^2) / sum(p) over the patches, p the sigmoid of their states (Wang et al., ICASSP 2019):
    `(batch_size, N, hidden_size)` to `(batch_size, hidden_size)`, computed in the log domain in float32."""
    log_p = nn.functional.logsigmoid(states.float())
    if patch_mask is not None:
        log_p = log_p.masked_fill(~patch_mask[..., None], -torch.inf)
    # The published code's margin from a probability of 1, whose logit is infinite.
    log_pooled = torch.logsumexp(2 * log_p, dim=1) - torch.logsumexp(log_p, dim=1) - 1e-6
    log_pooled = log_pooled.clamp(max=-torch.finfo(torch.float32).eps)
    return (log_pooled - torch.log(-torch.expm1(log_pooled))).to(states.dtype)


class SSLAMForAudioClassification(SSLAMPreTrainedModel):
    """The encoder with the published classifier: LayerNorm and a linear layer on the pooled clip."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.sslam = SSLAMModel(config)
        self.classifier = SSLAMClassifier(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
    ) -> SequenceClassifierOutput:
        """
        Args:
            input_values, attention_mask, output_attentions, output_hidden_states: See [`SSLAMModel.forward`].
            labels: Targets, by `config.problem_type`: "single_label_classification", class indices of shape
                `(batch_size,)`; "multi_label_classification", 0 or 1 (or mixed targets between) of shape `(batch_size,
                num_labels)`; "regression", values of shape `(batch_size, num_labels)`. If it is not set, transformers'
                rule decides from `num_labels` and the labels' dtype.

        Returns:
            `loss` if labels are given, `logits` of shape `(batch_size, num_labels)`, `hidden_states`, `attentions`.
        """
        outputs = self.sslam(
            input_values,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        patch_mask = None if attention_mask is None else patch_mask_from_frames(attention_mask, self.config)
        logits = self.classifier(outputs.last_hidden_state, patch_mask)
        loss = None
        if labels is not None:
            problem_type = self.config.problem_type
            if problem_type is None and self.num_labels > 1 and labels.dtype in (torch.long, torch.int):
                problem_type = "single_label_classification"
            if problem_type != "single_label_classification":
                # Gradients of the other losses need targets of the logits' own dtype.
                labels = labels.to(logits.dtype)
            loss = self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


SSLAMModel.register_for_auto_class("AutoModel")
SSLAMForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")

__all__ = ["SSLAMForAudioClassification", "SSLAMModel", "SSLAMPreTrainedModel"]

"""The SSLAM encoder and its audio classifier (Alex et al., ICLR 2025, arXiv 2506.12222), with EAT's architecture.

The file follows the data: patches with fixed positions, transformer blocks (post-norm) with attention and MLP, the
encoder, which adds the CLS token, then the heads. A clip of T frames and F mel bins has N = (T / patch_size) *
(F / patch_size) patches in time-major order: patch t * (F / patch_size) + f lies at time t and frequency f.
"""

import re
from collections.abc import Callable
from os import PathLike
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

from .configuration_sslam import PUBLISHED_LAYOUTS, SSLAMConfig


def sincos_position_table(config: SSLAMConfig) -> torch.Tensor:
    """Compute the fixed 2-D positions.

    The first half of the channels encodes the mel coordinate, the second half the time coordinate, each position p as
    [sin(p w), cos(p w)] with w_k = 10000^(-k / (hidden_size / 4)).

    Returns:
        float32 of shape `(max_position_embeddings * num_mel_patches, hidden_size)`, time-major.
    """
    # Every step is in float32, as in the published table: at late positions the rounding of the angles shows.
    quarter = config.hidden_size // 4
    frequencies = 1 / np.float32(10_000) ** (np.arange(quarter, dtype=np.float32) / np.float32(quarter))

    def encode(length: int) -> torch.Tensor:
        angles = np.arange(length, dtype=np.float32)[:, None] * frequencies
        return torch.from_numpy(np.concatenate((np.sin(angles), np.cos(angles)), axis=1))

    mel, time = encode(config.num_mel_patches), encode(config.max_position_embeddings)
    return torch.cat((mel.repeat(len(time), 1), time.repeat_interleave(len(mel), dim=0)), dim=1)


def check_input_values(input_values: torch.Tensor, config: SSLAMConfig) -> torch.Tensor:
    """Check the shape of the input and drop the channel axis that the published interface has.

    Args:
        input_values: Of shape `(batch_size, T, num_mel_bins)` or `(batch_size, 1, T, num_mel_bins)`.
        config: The model's configuration.

    Returns:
        The input as `(batch_size, T, num_mel_bins)`.

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
    """Projection of the patches, plus their positions."""

    position_embeddings: torch.Tensor

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.config = config
        self.projection = nn.Conv2d(1, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)
        self.register_buffer("position_embeddings", sincos_position_table(config), persistent=False)

    def forward(self, input_values: torch.Tensor) -> torch.Tensor:
        """Turn frames `(batch_size, T, num_mel_bins)` into patches `(batch_size, N, hidden_size)`."""
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
    """Attention written out, with the softmax in float32.

    Args:
        module: The attention layer.
        query: Of shape `(batch_size, num_heads, length, head_dim)`.
        key: Of the same shape.
        value: Of the same shape.
        attention_mask: Added to the scores; of shape `(batch_size, 1, length, length)`.
        scaling: Factor of the scores.
        dropout: Rate at which probabilities are dropped in training.
        **kwargs: Ignored; other attention functions take more arguments.

    Returns:
        `(batch_size, length, num_heads, head_dim)`, and the probabilities `(batch_size, num_heads, length, length)`.
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2), probabilities


def _attention_implementation(config: SSLAMConfig, output_attentions: bool) -> str:
    # Only the eager implementation returns the probabilities.
    return "eager" if output_attentions else config._attn_implementation or "eager"


def _attention_mask(
    token_mask: torch.Tensor, dtype: torch.dtype, implementation: str
) -> torch.Tensor | BlockMask | None:
    """Turn a mask of tokens `(batch_size, length)`, False for padding, into the attention function's mask.

    Flash attention takes the mask of tokens, flex attention a block mask. The others take a bias of shape
    `(batch_size, 1, length, length)` that is added to the scores.
    """
    # Attention is faster without a mask. A compiled or traced graph cannot depend on the values of the mask.
    if not (torch.compiler.is_compiling() or torch.jit.is_tracing()) and token_mask.all():
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


class SSLAMAttention(nn.Module):
    """Multi-head self-attention with one projection for queries, keys and values."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False  # read by transformers' attention functions
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.output = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | BlockMask | None,
        output_attentions: bool,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the attended states `(batch_size, length, hidden_size)` and, if asked for, the probabilities."""
        qkv = self.qkv(hidden_states).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        implementation = _attention_implementation(self.config, output_attentions)
        dropout = self.config.attention_probs_dropout_prob if self.training else 0.0
        attend: Callable = (
            eager_attention_forward if implementation == "eager" else ALL_ATTENTION_FUNCTIONS[implementation]
        )
        attended, probabilities = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.output(attended.flatten(2)), probabilities if output_attentions else None


# Choices of what the backward pass finds in memory and what it recomputes; see [`SSLAMPreTrainedModel.set_memory`].
MEMORY_CHOICES = ("auto", "fast", "small")


def saves_memory(memory: str, device: torch.device) -> bool:
    """Whether a choice of `MEMORY_CHOICES` recomputes on a device: "small" does, and "auto" does on CPUs."""
    return memory == "small" or (memory == "auto" and device.type == "cpu")


def checkpoint_activations(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> torch.Tensor:
    """Activation checkpointing: keep only `inputs` and recompute the rest in the backward pass.

    Recomputation stops at the last tensor that the backward pass needs, so a final linear layer is not evaluated
    twice. `function` must not draw random numbers: their state is not restored.
    """
    # A trace holds the forward pass alone, and cannot record checkpointing.
    if not torch.is_grad_enabled() or torch.jit.is_tracing():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class RecomputingModule(nn.Module):
    """A module that can recompute values in the backward pass to save memory.

    Attributes:
        memory: One of `MEMORY_CHOICES`.
    """

    memory: str = "auto"


class SSLAMMLP(RecomputingModule):
    """Linear layer, activation, linear layer.

    To save memory, the backward pass recomputes the activation from its input: one tensor of `intermediate_size` less
    for each token and block.
    """

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map states `(batch_size, length, hidden_size)` to states of the same shape."""
        expanded = self.fc1(hidden_states)
        if saves_memory(self.memory, expanded.device):
            return checkpoint_activations(self._activate_and_project, expanded)
        return self._activate_and_project(expanded)

    def _activate_and_project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(hidden_states))


def drop_path(branch: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Stochastic depth (Huang et al., 2016): drop a residual branch of whole clips and rescale the other clips'."""
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
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run the block on states `(batch_size, length, hidden_size)`. Attention functions get `kwargs`.

        Returns:
            The block's output; the MLP's output m, from which pre-training makes the teacher's targets; and, if asked
            for, the attention probabilities.
        """
        attended, attentions = self.attention(hidden_states, attention_mask, output_attentions, **kwargs)
        attended = drop_path(self.dropout(attended), self.drop_path_rate, self.training)
        hidden_states = self.attention_layernorm(hidden_states + attended)
        ffn_output = self.mlp(hidden_states)
        update = drop_path(self.dropout(ffn_output), self.drop_path_rate, self.training)
        return self.mlp_layernorm(hidden_states + update), ffn_output, attentions


class SSLAMEncoderOutput(NamedTuple):
    """Results of the blocks. Every tensor has the CLS token at index 0 of its token axis.

    Attributes:
        last_hidden_state: Output of the last block, `(batch_size, 1 + num_patches, hidden_size)`.
        hidden_states: Input of the first block and output of each, if asked for. None in place of those that were not
            selected.
        attentions: Attention probabilities of each block, if asked for.
        ffn_outputs: MLP output of each block before its residual connection, if asked for.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor | None, ...] | None
    attentions: tuple[torch.Tensor, ...] | None
    ffn_outputs: tuple[torch.Tensor, ...] | None


def selected_hidden_states(output_hidden_states: bool | int | list[int], num_hidden_states: int) -> set[int]:
    """Turn `output_hidden_states` into the indices to return, as transformers 5 does.

    Args:
        output_hidden_states: True selects all. An index or a list of them selects these; negative ones count from the
            end, and those out of range select nothing.
        num_hidden_states: Number of blocks, plus one for the first block's input.
    """
    if isinstance(output_hidden_states, bool):
        return set(range(num_hidden_states)) if output_hidden_states else set()
    indices = [output_hidden_states] if isinstance(output_hidden_states, int) else output_hidden_states
    return {index % num_hidden_states for index in indices if -num_hidden_states <= index < num_hidden_states}


class SSLAMEncoder(nn.Module):
    """CLS token before the patches (any subset of a clip's), LayerNorm, transformer blocks."""

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
        output_hidden_states: bool | int | list[int] = False,
        output_attentions: bool = False,
        output_ffn: bool = False,
        **kwargs: Any,
    ) -> SSLAMEncoderOutput:
        """Encode patches.

        Args:
            patches: Of shape `(batch_size, num_patches, hidden_size)`, with their positions added.
            patch_mask: bool of shape `(batch_size, num_patches)`, False for patches that nothing may attend to.
            output_hidden_states: Whether to return the input of the first block and the output of every block, or
                which of them; see [`selected_hidden_states`].
            output_attentions: Whether to return the attention probabilities of every block.
            output_ffn: Whether to return the MLP output of every block.
            **kwargs: Further arguments of the attention function.
        """
        hidden_states, attention_mask = self.prepare(patches, patch_mask, output_attentions)
        # The hooks of `_can_record_outputs` are no substitute: they get no attentions unless the implementation is
        # eager, and transformers 4 runs them inside checkpointed layers, where states have no gradients.
        selected = selected_hidden_states(output_hidden_states, 1 + len(self.layers))
        all_hidden_states: list[torch.Tensor | None] = [hidden_states if 0 in selected else None]
        all_attentions, all_ffn_outputs = [], []
        for index, layer in enumerate(self.layers, start=1):
            hidden_states, ffn_output, attentions = layer(hidden_states, attention_mask, output_attentions, **kwargs)
            all_hidden_states.append(hidden_states if index in selected else None)
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
        """Compute the first block's input `(batch_size, 1 + num_patches, hidden_size)` and the mask of all blocks."""
        cls_tokens = self.cls_token.expand(patches.shape[0], -1, -1).to(patches.dtype)
        hidden_states = self.layernorm(torch.cat((cls_tokens, patches), dim=1))
        if patch_mask is None:
            return hidden_states, None
        token_mask = nn.functional.pad(patch_mask, (1, 0), value=True)
        implementation = _attention_implementation(self.config, output_attentions)
        return hidden_states, _attention_mask(token_mask, hidden_states.dtype, implementation)


class SSLAMPreTrainedModel(PreTrainedModel):
    """Weight initialisation, loading and saving of all SSLAM models."""

    config: SSLAMConfig
    config_class = SSLAMConfig
    base_model_prefix = "sslam"
    main_input_name = "input_values"
    input_modalities = ["audio"]
    # Transformers' Trainer must divide the loss by its gradient accumulation steps. From `**kwargs` in `forward` it
    # would infer that the loss divides by `num_items_in_batch`, but only the single-label loss does.
    accepts_loss_kwargs = False
    supports_gradient_checkpointing = True
    _no_split_modules = ["SSLAMPatchEmbeddings", "SSLAMLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # A pre-training checkpoint holds the student under the base model's name. Encoder and classifier load that part.
    # Published checkpoints hold the table of positions, which this model computes.
    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^teacher\.", r"patch_embeddings\.position_embeddings$"]
    # Classes in the source files that `save_pretrained` writes beside the weights.
    _auto_map: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_sslam.SSLAMConfig",
        "AutoModel": "modeling_sslam.SSLAMModel",
        "AutoModelForAudioClassification": "modeling_sslam.SSLAMForAudioClassification",
    }

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__(config)
        config.validate_architecture()

    def set_memory(self, memory: str) -> None:
        """Choose between memory and speed in training.

        The choice holds for this object: it is no part of the configuration, since it changes results by rounding
        alone. `gradient_checkpointing_enable` recomputes whole blocks besides, with any choice.

        Args:
            memory: "fast" keeps the values between operators for the backward pass. "small" recomputes the activation
                of every MLP, and computes the decoder and the losses of pre-training in parts. "auto", the default, is
                "small" on CPUs and "fast" on other devices.

        Raises:
            ValueError: If there is no such choice.
        """
        if memory not in MEMORY_CHOICES:
            raise ValueError(f"memory={memory!r} is not one of {', '.join(MEMORY_CHOICES)}.")
        for module in self.modules():
            if isinstance(module, RecomputingModule):
                module.memory = memory

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[Any] | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """Load as transformers does, also from the published layouts, and never leave an encoder at random.

        Weights under published names are renamed while they are read.

        Returns:
            The model; with `output_loading_info=True` a tuple of it and a dictionary.

        Raises:
            OSError: If there is no file that can be read.
            ValueError: If the checkpoint lacks weights of the encoder. A head that it lacks is new, with transformers'
                warning.
        """
        name = pretrained_model_name_or_path
        if name is not None and Path(name).suffix in (".pt", ".pth", ".ckpt"):
            raise OSError(f"{name} is a checkpoint of a training program, not a folder or repository. {_advice(name)}")
        if kwargs.get("key_mapping") is None:
            kwargs["key_mapping"] = _published_key_mapping()
        output_loading_info = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(name, *model_args, output_loading_info=True, **kwargs)
        except OSError as error:
            if "file named" not in str(error):
                raise
            raise OSError(f"{error} {_advice(name)}") from error
        model, info = loaded
        _check_encoder(model, info, name)
        # With these, transformers 5 would save under the published names again.
        model._weight_conversions = [
            conversion
            for conversion in getattr(model, "_weight_conversions", None) or ()
            if kwargs["key_mapping"].keys().isdisjoint(conversion._original_source_patterns)
        ]
        return (model, info) if output_loading_info else model

    def _get_key_renaming_mapping(
        self,
        checkpoint_keys: list[str],
        key_mapping: dict[str, str] | None = None,
        loading_base_model_from_task_state_dict: bool = False,
        loading_task_model_from_base_state_dict: bool = False,
    ) -> dict[str, str]:
        # Only transformers 4 calls this. It looks for `base_model_prefix` in the names before it renames them, but the
        # prefix comes with the renaming.
        if any(re.match(pattern, key) for pattern in key_mapping or () for key in checkpoint_keys):
            loading_base_model_from_task_state_dict = not hasattr(self, self.base_model_prefix)
            loading_task_model_from_base_state_dict = False
        return super()._get_key_renaming_mapping(  # type: ignore[misc]  # transformers 5 has no such method
            checkpoint_keys,
            key_mapping,
            loading_base_model_from_task_state_dict,
            loading_task_model_from_base_state_dict,
        )

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        # Transformers searches the source for a certain line, and for another one in each major version.
        return True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Use functions of torch.nn.init: transformers 5 makes them skip weights that were loaded.
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
            # This buffer is not saved, so after loading through the meta device it has no values.
            module.position_embeddings.copy_(sincos_position_table(self.config))

    def save_pretrained(self, save_directory: str | PathLike[Any], *args: Any, **kwargs: Any) -> None:
        """Save as transformers does, with the source files of the model.

        A machine without this package loads the folder by `from_pretrained(..., trust_remote_code=True)`.
        """
        self.config.auto_map = dict(self._auto_map)
        super().save_pretrained(save_directory, *args, **kwargs)


def _published_key_mapping() -> dict[str, str]:
    return {pattern: ours for layout in PUBLISHED_LAYOUTS.values() for pattern, ours in layout.key_mapping.items()}


def _check_encoder(model: SSLAMPreTrainedModel, info: dict[str, Any], name: str | PathLike[Any] | None) -> None:
    """Check that a checkpoint held all weights of the encoder.

    Args:
        model: The loaded model.
        info: Transformers' information about the loading.
        name: Folder or repository, for the message.

    Raises:
        ValueError: If weights are missing. The message describes the checkpoint's content.
    """
    prefix = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    missing = sorted(key for key in info["missing_keys"] if key.startswith(prefix))
    if not missing:
        return
    held = sorted(info["unexpected_keys"])
    holds = f"It holds {_some(held)}, which this model does not have. " if held else ""
    raise ValueError(
        f"{'The state_dict' if name is None else name} lacks {len(missing)} weights of the encoder: {_some(missing)}. "
        f"{holds}{_advice(name)}"
    )


def _some(names: list[str], at_most: int = 4) -> str:
    rest = len(names) - at_most
    return ", ".join(names[:at_most]) + (f" and {rest} more" if rest > 0 else "")


def _advice(name: str | PathLike[Any] | None) -> str:
    source = "SOURCE" if name is None else name
    return (
        f"`sslam convert {source} OUT` reads checkpoints of fairseq, bare state dicts and those of the Earth Species "
        "Project, and writes a folder for from_pretrained."
    )


def patch_mask_from_frames(attention_mask: torch.Tensor, config: SSLAMConfig) -> torch.Tensor:
    """Turn a mask of frames `(batch_size, T)` into one of patches, bool `(batch_size, N)`.

    A patch that has any frame of the clip is part of the clip.
    """
    time_mask = attention_mask.bool().unflatten(1, (-1, config.patch_size)).any(-1)
    return time_mask.repeat_interleave(config.num_mel_patches, dim=1)


class SSLAMModel(SSLAMPreTrainedModel):
    """The encoder: one state for each patch, and the CLS token's state for the clip."""

    # An encoder loaded from a classifier's checkpoint leaves the head out.
    _keys_to_ignore_on_load_unexpected = [
        *SSLAMPreTrainedModel._keys_to_ignore_on_load_unexpected,
        r"^classifier\.",
    ]

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__(config)
        self.patch_embeddings: nn.Module = SSLAMPatchEmbeddings(config)
        self.encoder = SSLAMEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the patch embeddings."""
        return self.patch_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the patch embeddings by a module that maps frames to patches."""
        self.patch_embeddings = value

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """Encode clips.

        Args:
            input_values: Normalised log-mel frames of shape `(batch_size, T, num_mel_bins)` or `(batch_size, 1, T,
                num_mel_bins)`, as [`SSLAMFeatureExtractor`] makes them. T is a multiple of `patch_size`.
            attention_mask: Of shape `(batch_size, T)`, 1 for frames of the clip and 0 for padding. No token attends
                to patches that hold nothing but padding, so a clip gets the result that it gets alone. Without a mask
                padding counts as sound, as in the published models. In a clip whose mask is all 0 every token attends
                to the CLS token alone.
            output_attentions: Whether to return the attention probabilities. They are computed by the eager
                implementation.
            output_hidden_states: Whether to return the input of the first block and the output of every block. An
                index or a list of indices, also negative ones, returns only these, with None for the others.
            **kwargs: Further arguments of the attention function. As in transformers' models, it ignores those that it
                does not know.

        Returns:
            `last_hidden_state` of shape `(batch_size, 1 + N, hidden_size)`, the CLS token first ([`patch_grid`] and
            [`frame_features`] rearrange the others); `pooler_output` of shape `(batch_size, hidden_size)`, the CLS
            token's state; `hidden_states` and `attentions` if asked for.

        Raises:
            ValueError: If the model does not take T frames or this number of mel bins, or if the mask does not have
                the input's shape.
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
        outputs = self.encoder(patches, patch_mask, output_hidden_states, output_attentions, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.last_hidden_state[:, 0],
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def patch_grid(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Arrange patch states on their grid.

        Args:
            hidden_states: Of shape `(batch_size, 1 + N, hidden_size)`, the CLS token first.

        Returns:
            `(batch_size, T / patch_size, F / patch_size, hidden_size)`. Axis 1 is time, in steps of 160 ms for patches
            of 16 frames; axis 2 goes from low to high frequency.
        """
        return hidden_states[:, 1:].unflatten(1, (-1, self.config.num_mel_patches))

    def frame_features(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Average patch states over frequency: a sequence in time, `(batch_size, T / patch_size, hidden_size)`."""
        return self.patch_grid(hidden_states).mean(2)


class SSLAMClassifier(nn.Module):
    """Pooling of the tokens, LayerNorm and a linear layer."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__()
        self.pooling = config.classifier_pooling
        eps = config.classifier_norm_eps
        self.layernorm = nn.Identity() if eps is None else nn.LayerNorm(config.hidden_size, eps=eps)
        assert config.num_labels is not None  # the configuration has two labels by default
        self.dense = nn.Linear(config.hidden_size, config.num_labels)

    def forward(self, hidden_states: torch.Tensor, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Turn states `(batch_size, 1 + N, hidden_size)` into logits `(batch_size, num_labels)`.

        Pooling over the patches of a clip whose mask has none gives 0.
        """
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
    # Sum and count in float32, as `mean` does: bfloat16 cannot count to 512 exactly.
    total = patches.masked_fill(~patch_mask[..., None], 0.0).sum(1, dtype=torch.float32)
    return (total / patch_mask.sum(1, keepdim=True).clamp(min=1)).to(patches.dtype)


def linear_softmax_pooling(states: torch.Tensor, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
    """Pool states by linear softmax (Wang et al., ICASSP 2019).

    With p the sigmoid of a patch's state, the result is the logit of sum(p^2) / sum(p) over the patches, computed in
    the log domain in float32.

    Args:
        states: Of shape `(batch_size, N, hidden_size)`.
        patch_mask: bool of shape `(batch_size, N)`, False for patches to leave out.

    Returns:
        `(batch_size, hidden_size)`; 0 for clips whose patches are all left out.
    """
    log_p = nn.functional.logsigmoid(states.float())
    if patch_mask is not None:
        is_empty = ~patch_mask.any(1, keepdim=True)
        # A sum over no patches would make the gradients NaN, also where its result is replaced.
        log_p = log_p.masked_fill(~(patch_mask | is_empty)[..., None], -torch.inf)
    # The published code keeps this distance from a probability of 1, whose logit is infinite.
    log_pooled = torch.logsumexp(2 * log_p, dim=1) - torch.logsumexp(log_p, dim=1) - 1e-6
    log_pooled = log_pooled.clamp(max=-torch.finfo(torch.float32).eps)
    pooled = (log_pooled - torch.log(-torch.expm1(log_pooled))).to(states.dtype)
    return pooled if patch_mask is None else pooled.masked_fill(is_empty, 0.0)


def check_labels(labels: torch.Tensor, logits: torch.Tensor, problem_type: str) -> None:
    """Check that labels have the shape that the loss of a problem type takes.

    Args:
        labels: See [`SSLAMForAudioClassification.forward`].
        logits: Of shape `(batch_size, num_labels)`.
        problem_type: One of transformers' three.

    Raises:
        ValueError: If the shape differs. The message says which `problem_type` to set for labels of the other kind.
    """
    batch_size, num_labels = logits.shape
    expected: tuple[int, ...]
    if problem_type == "single_label_classification" or (problem_type == "regression" and num_labels == 1):
        expected, fits = (batch_size,), labels.numel() == batch_size
        other, kind = "multi_label_classification", "several labels a clip"
    else:
        expected, fits = (batch_size, num_labels), labels.shape == logits.shape
        other, kind = "single_label_classification", "one label a clip"
    if not fits:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}; problem_type={problem_type!r} with {num_labels} labels needs "
            f'{expected}. For {kind} set problem_type="{other}" in `from_pretrained` or in `model.config`.'
        )


class SSLAMForAudioClassification(SSLAMPreTrainedModel):
    """The encoder with the published classifier: LayerNorm and a linear layer on the pooled clip."""

    def __init__(self, config: SSLAMConfig) -> None:
        super().__init__(config)
        self.sslam = SSLAMModel(config)
        self.classifier = SSLAMClassifier(config)
        self.num_labels = self.classifier.dense.out_features
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | int | list[int] | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        """Classify clips.

        Args:
            input_values: See [`SSLAMModel.forward`].
            attention_mask: See [`SSLAMModel.forward`].
            labels: Targets, by `config.problem_type`. "single_label_classification": class indices of shape
                `(batch_size,)`. "multi_label_classification": 0, 1 or mixed targets between them, of shape
                `(batch_size, num_labels)`. "regression": values of shape `(batch_size, num_labels)`. If it is not set,
                transformers' rule infers it from `num_labels` and the labels' dtype.
            output_attentions: See [`SSLAMModel.forward`].
            output_hidden_states: See [`SSLAMModel.forward`].
            **kwargs: Further arguments of the attention function and of the loss, such as `num_items_in_batch`, by
                which the loss of single labels is divided instead of by the batch size.

        Returns:
            `loss` if labels are given, `logits` of shape `(batch_size, num_labels)`, `hidden_states` and `attentions`
            if asked for.

        Raises:
            ValueError: If the encoder refuses the input, or if the labels' shape does not fit `config.problem_type`.
        """
        outputs = self.sslam(
            input_values,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
            **kwargs,
        )
        patch_mask = None if attention_mask is None else patch_mask_from_frames(attention_mask, self.config)
        logits = self.classifier(outputs.last_hidden_state, patch_mask)
        loss = None
        if labels is not None:
            problem_type = self.config.problem_type
            if problem_type is None:
                is_integer = labels.dtype in (torch.long, torch.int)
                problem_type = "single_label_classification" if is_integer else "multi_label_classification"
                problem_type = "regression" if self.num_labels == 1 else problem_type
            check_labels(labels, logits, problem_type)
            if problem_type != "single_label_classification":
                # The other losses have gradients only if targets have the logits' dtype.
                labels = labels.to(logits.dtype)
            loss = self.loss_function(labels, logits, self.config, **kwargs)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


SSLAMModel.register_for_auto_class("AutoModel")
SSLAMForAudioClassification.register_for_auto_class("AutoModelForAudioClassification")

__all__ = ["SSLAMForAudioClassification", "SSLAMModel", "SSLAMPreTrainedModel"]

"""The encoder's blocks for inference on CPUs, in float32, bfloat16 or int8.

    model = optimize_for_cpu(SSLAMModel.from_pretrained(folder))               # the same numbers, up to rounding
    model = optimize_for_cpu(SSLAMModel.from_pretrained(folder), "int8")       # an approximation of them

- Linear layers call oneDNN's operators on packed weights, as the graphs compiled by inductor do. These operators are
  not a public interface of torch. ([`use_onednn`] reaches oneDNN through a public one, also in training.)
- On Intel processors attention is sdpa; on others oneDNN computes its products one by one.
- Weights are brought into the kernels' own layout once. GELU is applied to a product while it is in cache.
- A block computes a few clips at a time. A tensor of more than 32 MB (glibc's largest mmap threshold) is new memory in
  every layer, and the kernel takes longer to clear its pages than the arithmetic takes.
- int8: torchao rounds weights per output channel, once. Activations are rounded per token in every layer, so a clip's
  result does not depend on the other clips of its batch. Attention, norms and residuals stay in floating point.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.activations import ACT2FN

from ..common.errors import InferenceError
from ..configuration_sslam import SSLAMConfig
from ..modeling_sslam import (
    SSLAMEncoder,
    SSLAMEncoderOutput,
    SSLAMForAudioClassification,
    SSLAMLayer,
    SSLAMModel,
    selected_hidden_states,
)
from ..onednn_sslam import IS_X86_WITH_ONEDNN, ONEDNN_IS_FASTER

Model = TypeVar("Model", SSLAMModel, SSLAMForAudioClassification)
Product = Callable[[torch.Tensor], torch.Tensor]

PRECISIONS = ("float32", "bfloat16", "int8")
# Tokens that a block computes together: four clips of 10 s, whose largest intermediate result is below 32 MB. int8 has
# more intermediate results, and those of one clip stay in cache.
TOKENS_AT_A_TIME = {"float32": 2100, "bfloat16": 2100, "int8": 512}
# Bytes of attention scores that are computed together.
SCORE_BYTES_AT_A_TIME = 1 << 21
# oneDNN's fast kernels take activations as unsigned codes. ZERO_CODE stands for 0, and codes differ from it by at most
# LARGEST_CODE.
ZERO_CODE, LARGEST_CODE = 128, 127
# A token's largest activation is taken to be at least this, so that the reciprocal of its scale does not overflow.
SMALLEST_PEAK = 1e-30


def can_optimize(precision: str) -> bool:
    """Whether this processor and this build of torch have the kernels of a precision."""
    return IS_X86_WITH_ONEDNN and (precision != "bfloat16" or torch.ops.mkldnn._is_mkldnn_bf16_supported())


def optimize_for_cpu(model: Model, precision: str = "float32") -> Model:
    """Replace the encoder's blocks by faster ones, for inference only.

    The result gives no gradients and no attention probabilities, and cannot be saved. Everything else works as before.
    `python -m benchmarks.inference` measures its speed and how close its CLS embeddings come to the float32 ones.

    Args:
        model: Encoder or classifier, on the CPU. It is changed in place.
        precision: "float32" or "bfloat16", or "int8" for linear layers in int8 and the rest in float32 (attention in
            bfloat16 where the processor has it).

    Returns:
        The same model.

    Raises:
        ValueError: If the model is not on the CPU, is not an encoder or classifier, or has been optimised already.
        InferenceError: If the processor or torch lacks the kernels, or if torchao is missing for "int8".
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(PRECISIONS)}.")
    if not isinstance(model, (SSLAMModel, SSLAMForAudioClassification)) or model.device.type != "cpu":
        raise ValueError(
            f"{type(model).__name__} on {model.device} cannot be optimised for CPUs: take a SSLAMModel or a "
            "SSLAMForAudioClassification, and move it to the CPU."
        )
    if not can_optimize(precision):
        raise InferenceError(
            f"This processor, or this build of torch, has no {precision} kernels of oneDNN. Use the model as it is."
        )
    body = model if isinstance(model, SSLAMModel) else model.sslam
    if isinstance(body.encoder, PackedEncoder):
        raise ValueError("This model has been optimised already; load it anew for another precision.")
    if precision == "int8":
        _torchao_quantization()  # fail before the model is changed
    model.eval().to(torch.bfloat16 if precision == "bfloat16" else torch.float32)
    model.set_attn_implementation("sdpa")  # PackedLayer takes sdpa's mask
    body.encoder = PackedEncoder(body.encoder, precision)
    return model


def precision_of(model: SSLAMModel) -> str:
    """Name the precision of a model's blocks: one of `PRECISIONS`, or another dtype of torch."""
    if isinstance(model.encoder, PackedEncoder):
        return model.encoder.precision
    return str(model.dtype).removeprefix("torch.")


class PackedEncoder(SSLAMEncoder):
    """[`SSLAMEncoder`] in evaluation mode, made of packed blocks."""

    def __init__(self, encoder: SSLAMEncoder, precision: str) -> None:
        nn.Module.__init__(self)
        self.config = encoder.config
        self.precision = precision
        self.cls_token, self.layernorm = encoder.cls_token, encoder.layernorm
        self.layers = nn.ModuleList()
        for layer in encoder.layers:
            assert isinstance(layer, SSLAMLayer)
            self.layers.append(PackedLayer(layer, encoder.config, precision))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(
        self,
        patches: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        output_hidden_states: bool | int | list[int] = False,
        output_attentions: bool = False,
        output_ffn: bool = False,
        **kwargs: Any,
    ) -> SSLAMEncoderOutput:
        """See [`SSLAMEncoder.forward`]."""
        if output_attentions or output_ffn:
            raise ValueError(
                "A model that is optimised for CPUs gives no attention probabilities and no outputs of its MLPs; load "
                "it anew."
            )
        hidden_states, attention_mask = self.prepare(patches, patch_mask)
        selected = selected_hidden_states(output_hidden_states, 1 + len(self.layers))
        all_hidden_states = [hidden_states.clone() if 0 in selected else None]
        for index, layer in enumerate(self.layers, start=1):
            layer(hidden_states, attention_mask)
            all_hidden_states.append(hidden_states.clone() if index in selected else None)
        return SSLAMEncoderOutput(
            last_hidden_state=hidden_states,
            hidden_states=tuple(all_hidden_states) if output_hidden_states else None,
            attentions=None,
            ffn_outputs=None,
        )


class PackedLayer(nn.Module):
    """[`SSLAMLayer`] in evaluation mode, with packed weights."""

    def __init__(self, layer: SSLAMLayer, config: SSLAMConfig, precision: str) -> None:
        super().__init__()
        self.precision = precision
        pack = pack_linear_int8 if precision == "int8" else pack_linear
        self.num_heads = config.num_attention_heads
        self.attention_dtype = torch.float32
        if precision == "bfloat16" or (precision == "int8" and can_optimize("bfloat16")):
            self.attention_dtype = torch.bfloat16
        self.qkv = pack(_with_scaled_queries(layer.attention.qkv, layer.attention.scaling))
        self.attention_output = pack(layer.attention.output)
        self.attention_layernorm = layer.attention_layernorm
        self.fc1 = pack(layer.mlp.fc1, config.hidden_act)
        self.fc2 = pack(layer.mlp.fc2)
        self.mlp_layernorm = layer.mlp_layernorm

    def forward(self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        """Overwrite the block's input `(batch_size, length, hidden_size)` with its output.

        New memory for the output of every block would cost more time than some of the arithmetic.
        """
        clips_at_a_time = max(1, TOKENS_AT_A_TIME[self.precision] // hidden_states.shape[1])
        for start in range(0, len(hidden_states), clips_at_a_time):
            part = slice(start, start + clips_at_a_time)
            states = hidden_states[part]
            mask = None if attention_mask is None else attention_mask[part, :, :1].to(self.attention_dtype)
            attended = self._attend(self.qkv(states), mask)
            attended = self.attention_layernorm(states + self.attention_output(attended))
            states.copy_(self.mlp_layernorm(attended + self.fc2(self.fc1(attended))))

    def _attend(self, qkv: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Compute attention: by sdpa, or by oneDNN some heads or queries at a time, so that scores stay in cache.

        Args:
            qkv: Scaled queries, keys and values, `(clips, tokens, 3 * hidden_size)`.
            mask: Additive, `(clips, 1, 1, tokens)`.

        Returns:
            `(clips, tokens, hidden_size)`.
        """
        clips, tokens, _ = qkv.shape
        by_head = qkv.view(clips, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        if not ONEDNN_IS_FASTER:
            query, key, value = by_head.to(self.attention_dtype).unbind(0)
            attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=1.0)
            return attended.transpose(1, 2).flatten(2).to(qkv.dtype)
        scores_at_a_time = SCORE_BYTES_AT_A_TIME // self.attention_dtype.itemsize
        if self.attention_dtype == torch.float32:
            # torch.bmm would call MKL. For operands in another order oneDNN has only a slow reference kernel.
            queries, keys, values = by_head[0].contiguous(), by_head[1].contiguous(), by_head[2].mT.contiguous()
            multiply, heads_at_a_time = _product_of_one, 1
        else:
            queries, keys, values = by_head.new_empty(by_head.shape, dtype=self.attention_dtype).copy_(by_head)
            multiply, values, heads_at_a_time = _products, values.mT, max(1, scores_at_a_time // tokens**2)
        queries_at_a_time = max(1, scores_at_a_time // tokens)
        attended = qkv.new_empty(clips, tokens, self.num_heads, queries.shape[-1])
        for clip in range(clips):
            for head in range(0, self.num_heads, heads_at_a_time):
                heads = slice(head, head + heads_at_a_time)
                for start in range(0, tokens, queries_at_a_time):
                    some = slice(start, start + queries_at_a_time)
                    scores = multiply(queries[clip, heads, some], keys[clip, heads])
                    if mask is not None:
                        scores += mask[clip]
                    attended[clip, some, heads] = multiply(scores.softmax(-1), values[clip, heads]).transpose(0, 1)
        return attended.flatten(2)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PackedLayer":
        weight = self.mlp_layernorm.weight
        moved = fn(weight)
        if moved.device != weight.device or moved.dtype != weight.dtype:
            raise ValueError(
                f"A model that is optimised for CPUs stays in {weight.dtype} on the CPU; load it anew for "
                f"{moved.dtype} on {moved.device}."
            )
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, *args: Any) -> None:
        raise ValueError("A model that is optimised for CPUs cannot be saved; save the one it was made from.")


def pack_linear(linear: nn.Linear, activation: str | None = None) -> Product:
    """Return a function of x that computes `activation(linear(x))` by oneDNN, in the dtype of the weights."""
    fused = "gelu" if activation == "gelu" else "none"
    rest = nn.Identity() if activation in (None, "gelu") else ACT2FN[activation]
    weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
    bias = None if linear.bias is None else linear.bias.detach()
    return lambda x: rest(_onednn_linear(x, weight, bias, fused))


def pack_linear_int8(linear: nn.Linear, activation: str | None = None) -> Product:
    """Return a function of x that computes `activation(linear(x))`, with weights and x rounded to 8 bits.

    Its results are in float32.
    """
    quantization = _torchao_quantization()
    weight, act = linear.weight.detach(), nn.Identity() if activation is None else ACT2FN[activation]
    block = (1, weight.shape[1])  # one scale for each output channel
    limits = {"quant_min": -LARGEST_CODE, "quant_max": LARGEST_CODE}
    symmetric = quantization.MappingType.SYMMETRIC
    scales, zeros = quantization.choose_qparams_affine(weight, symmetric, block, torch.int8, **limits)
    codes = quantization.quantize_affine(weight, block, scales, zeros, torch.int8, **limits)
    packed = torch.ops.onednn.qlinear_prepack(codes, None)
    scales, zeros = scales.float().flatten(), zeros.int().flatten()
    bias = torch.zeros(len(weight)) if linear.bias is None else linear.bias.detach()

    def product(x: torch.Tensor) -> torch.Tensor:
        peaks = torch.maximum(x.amax(-1, keepdim=True), -x.amin(-1, keepdim=True)).float()
        token_scales = peaks.clamp_(min=SMALLEST_PEAK).div_(LARGEST_CODE)
        # Convert to signed codes, then flip the highest bit: conversion to unsigned codes is four times as slow.
        codes = (x * token_scales.reciprocal()).round_().to(torch.int8).view(torch.uint8).bitwise_xor_(ZERO_CODE)
        # The operator takes one scale for all tokens: give it 1, and multiply by each token's own scale below.
        sums = torch.ops.onednn.qlinear_pointwise(
            codes, 1.0, ZERO_CODE, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        return act(torch.addcmul(bias, sums, token_scales, out=sums))

    return product


def _torchao_quantization() -> ModuleType:
    try:
        import torchao.quantization
    except ModuleNotFoundError as error:
        raise InferenceError('int8 needs torchao: pip install "modeling-sslam[int8]"') from error
    return torchao.quantization


def _products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return torch.bmm(left, right.mT)


def _product_of_one(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return _onednn_linear(left[0], right[0])[None]


def _onednn_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, activation: str = "none"
) -> torch.Tensor:
    # The last argument selects the exact GELU rather than its approximation by tanh.
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, activation, [], "none")


def _with_scaled_queries(qkv: nn.Linear, scaling: float) -> nn.Linear:
    """Copy the projection with the scaling of attention's scores in the queries' weights, which saves a pass."""
    scaled = nn.Linear(qkv.in_features, qkv.out_features, bias=qkv.bias is not None, dtype=qkv.weight.dtype)
    with torch.no_grad():
        scaled.weight.copy_(qkv.weight)
        scaled.weight[: qkv.in_features] *= scaling
        if qkv.bias is not None:
            scaled.bias.copy_(qkv.bias)
            scaled.bias[: qkv.in_features] *= scaling
    return scaled

"""Compute a model's float32 matrix products and attention by oneDNN, where that is faster than torch's own way.

On x86 CPUs torch hands float32 matrix products to MKL and convolutions to oneDNN. On the Intel processor that was
measured MKL is faster. On the AMD processors oneDNN is up to twice as fast (benchmarks/NOTES.md). A linear
layer is a 1x1 convolution and attention is two grouped ones, so asking for convolutions reaches oneDNN through torch's
public interface. (Torch runs small convolutions, and on a single thread all 1x1 convolutions, by MKL after all.)

    model = use_onednn(SSLAMModel.from_pretrained(folder))

Results differ from torch's own in the last bits. Set the environment variable `SSLAM_ONEDNN=0` to forbid this.
"""

import os
import platform
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

Model = TypeVar("Model", bound=PreTrainedModel)

IS_X86_WITH_ONEDNN = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() in (
    "AVX2",
    "AVX512",
)
# The name of the attention below among transformers' implementations.
ATTENTION = "sslam_onednn"
# Attention is faster by convolutions for clips of this many tokens: 0.9 times sdpa's speed from 2305 tokens on, and
# about the same below 200.
CONVOLVED_LENGTHS = range(200, 2100)
# Heads that are computed together have at most this many scores, 4 MB, which stay in cache.
SCORES_AT_A_TIME = 1 << 20


def _is_intels(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    # Only Linux names the processor's vendor in a file; elsewhere `platform` does.
    vendor = cpuinfo.read_text()[:1000] if cpuinfo.exists() else platform.processor()
    return "GenuineIntel" in vendor


ONEDNN_IS_FASTER = IS_X86_WITH_ONEDNN and not _is_intels()


def is_allowed() -> bool:
    """Whether the environment allows kernels other than torch's own choice: false if `SSLAM_ONEDNN` is 0."""
    return os.environ.get("SSLAM_ONEDNN") != "0"


def use_onednn(model: Model) -> Model:
    """Let a model on the CPU compute float32 linear layers and attention by oneDNN, in training and inference.

    Nothing changes on Intel processors, off x86, for models on other devices, or where `SSLAM_ONEDNN` is 0. Names and
    values of weights, saved files, copies and pickles stay as they are, and linear layers remain `nn.Linear`. Calling
    this twice is the same as calling it once. To undo the change, load the model anew. Do so before
    `torch.ao.quantization`, which refuses a changed model.

    Args:
        model: Any SSLAM model. It is changed in place. An attention implementation other than sdpa is kept.

    Returns:
        The same model.
    """
    if not (ONEDNN_IS_FASTER and is_allowed() and model.device.type == "cpu"):
        return model
    for layer in model.modules():
        if type(layer) is nn.Linear:  # subclasses, such as quantised layers, bring products of their own
            layer.__class__ = OnednnLinear
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)
    return model


class OnednnLinear(nn.Linear):
    """A linear layer that computes its float32 product as a 1x1 convolution, forward and backward."""

    @property
    def qconfig(self) -> None:
        """Refuse torch.ao's quantisation, which finds layers by their exact class and would miss this one."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: object) -> None:
        raise TypeError(
            "torch.ao.quantization replaces layers whose class is exactly nn.Linear, but `use_onednn` has made these "
            "OnednnLinear. Quantise a model that was just loaded, without `use_onednn` (SSLAM_ONEDNN=0 forbids it)."
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Project `(..., in_features)` to `(..., out_features)`."""
        # A weight of another class, such as a quantised or a distributed one, brings a product of its own.
        if not _can_convolve(input) or self.weight.dtype != torch.float32 or type(self.weight) is not nn.Parameter:
            return super().forward(input)
        tokens = input.reshape(-1, self.in_features)
        return _convolve(tokens, self.weight, self.bias).view(*input.shape[:-1], self.out_features)


def onednn_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention by convolutions in inference, by sdpa in training and where convolutions are slower.

    Args:
        module: The attention layer.
        query: Of shape `(batch_size, num_heads, length, head_dim)`.
        key: Of the same shape.
        value: Of the same shape.
        attention_mask: Additive, of shape `(batch_size, 1, length, length)`, the same for all queries of a clip.
        scaling: Factor of the scores.
        dropout: Rate at which probabilities are dropped.
        **kwargs: Further arguments of sdpa.

    Returns:
        `(batch_size, length, num_heads, head_dim)`, and None for the probabilities.
    """
    if (
        _can_convolve(query)
        and query.shape[2] in CONVOLVED_LENGTHS
        and dropout == 0.0
        and not kwargs.get("is_causal")  # a convolution has no causal form
        and not torch.is_grad_enabled()  # the backward pass would keep all scores
    ):
        return _convolve_attention(query, key, value, attention_mask, scaling), None
    sdpa = AttentionInterface()["sdpa"]
    return sdpa(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)


AttentionInterface.register(ATTENTION, onednn_attention_forward)


def _convolve_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Compute attention clip by clip and some heads at a time; each head is a group of a grouped convolution."""
    batch_size, num_heads, length, head_dim = query.shape
    heads_at_a_time = max(1, SCORES_AT_A_TIME // length**2)
    attended = query.new_empty(batch_size, length, num_heads, head_dim)
    for clip in range(batch_size):
        for head in range(0, num_heads, heads_at_a_time):
            heads = slice(head, head + heads_at_a_time)
            queries = (query[clip, heads] * scaling).transpose(0, 1).flatten(1)
            keys, values = key[clip, heads].flatten(0, 1), value[clip, heads].mT.flatten(0, 1)
            groups = len(keys) // length
            # An output channel holds the scores of one key, so the mask of the keys is the channels' bias.
            bias = None if attention_mask is None else attention_mask[clip, 0, 0].repeat(groups)
            scores = _convolve(queries, keys, bias, groups).unflatten(1, (groups, length))
            mixed = _convolve(scores.softmax(-1).flatten(1), values, None, groups)
            attended[clip, :, heads] = mixed.unflatten(1, (groups, head_dim))
    return attended


def _convolve(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int = 1) -> torch.Tensor:
    """Multiply tokens `(length, in_features)` by the transposed weight; each group of features has rows of its own."""
    # The tokens become the height of one image whose channels are innermost in memory, so nothing is copied.
    image = tokens[None, :, None].permute(0, 3, 1, 2)
    output = nn.functional.conv2d(image, weight[..., None, None], bias, groups=groups)
    return output.permute(0, 2, 3, 1).view(len(tokens), len(weight))


def _can_convolve(input: torch.Tensor) -> bool:
    return (
        input.device.type == "cpu"
        and input.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        # An exported or traced graph runs elsewhere, and has other lengths and batch sizes. A compiled graph copies
        # a convolution's arguments into another layout, which takes longer than oneDNN saves (benchmarks/NOTES.md).
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
        and input.numel() > 0  # a convolution refuses an empty image
    )

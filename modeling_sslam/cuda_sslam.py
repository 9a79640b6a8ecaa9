"""Compute a model's slow operations on CUDA devices in a form that suits them, with one switch.

    model = use_cuda(SSLAMForPreTraining(config).to("cuda"))

The one operation so far is the grouped convolution of the pre-training decoder. With `conv2d` it took two thirds of
the kernels' time of a step on an H200, for 2.7 % of the FLOPs, because a group's 48 channels are too few for tensor
cores. `banded_convolution` computes it as one batched product. A layer chooses that form by itself if three conditions
hold:

- The layer is being compiled, alone or as part of a larger graph. In eager mode the copies that the product needs cost
  as much as it saves.
- Its products are in bfloat16 or float16, by autocast or by the model's dtype. Others were not measured.
- The grid is narrow for its kernel; see `WIDEST_BAND_PER_TAP`.

Otherwise the layer computes `conv2d`. The two forms differ by rounding.

Nothing here changes torch's own settings. TF32 for float32 products, for example, remains the user's choice
(`torch.set_float32_matmul_precision("high")`).

Set the environment variable `SSLAM_CUDA=0` to forbid all this.
"""

import os
from typing import TypeVar

import torch
from transformers.modeling_utils import PreTrainedModel

from .banded_convolution import banded_convolution
from .modeling_sslam_pretraining import SSLAMDecoderLayer

Model = TypeVar("Model", bound=PreTrainedModel)

# Derived from times on an H200, forward and backward in bfloat16. With 48, 96 and 192 channels in a group `conv2d` ran
# at about 0.8 TFLOP/s for each of these channels. The banded form ran at 284 TFLOP/s, and it has
# mel_patches / kernel_size times the FLOPs. It is therefore faster up to a width (mel_patches * channels) of
# 284 / 0.8 = 355 for each tap of the kernel. The limit leaves a margin.
WIDEST_BAND_PER_TAP = 256
# Products of narrower rows are too small for tensor cores as well.
NARROWEST_BAND = 64


def is_allowed() -> bool:
    """Whether the environment allows kernels other than torch's own choice: false if `SSLAM_CUDA` is 0."""
    return os.environ.get("SSLAM_CUDA") != "0"


def is_on_cuda(model: PreTrainedModel) -> bool:
    """Whether a model is on a CUDA device."""
    return model.device.type == "cuda"


def use_cuda(model: Model) -> Model:
    """Let a model on a CUDA device compute its decoder in the faster form, in training and inference.

    Nothing changes for models on other devices, for models without a decoder, or where `SSLAM_CUDA` is 0. Call this
    before or after `compile`, but before a wrapper such as DistributedDataParallel. Names and values of weights, saved
    files, copies and pickles stay as they are. Calling this twice is the same as calling it once. To undo the change,
    load the model anew.

    Args:
        model: Any SSLAM model. It is changed in place.

    Returns:
        The same model.
    """
    if is_allowed() and is_on_cuda(model):
        for layer in model.modules():
            if type(layer) is SSLAMDecoderLayer:
                layer.__class__ = BandedDecoderLayer
    return model


class BandedDecoderLayer(SSLAMDecoderLayer):
    """A decoder layer that computes its convolution as a banded product where that is faster."""

    def convolve(self, grid: torch.Tensor) -> torch.Tensor:
        """Convolve a grid `(batch_size, time_patches, mel_patches, hidden_size)` to one of the same shape."""
        dtype = _product_dtype(grid)
        width = grid.shape[2] * self.in_channels // self.groups
        if not is_faster(width, self.kernel_size[1], dtype):
            return super().convolve(grid)
        weight, bias = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
        return banded_convolution(grid.to(dtype), weight, bias, self.groups)


def is_faster(width: int, kernel_size: int, dtype: torch.dtype) -> bool:
    """Whether the banded form is faster than `conv2d` on a CUDA device.

    Args:
        width: Mel patches times channels of a group.
        kernel_size: Taps of the kernel along mel.
        dtype: The products' dtype.
    """
    return (
        torch.compiler.is_compiling()
        and dtype in (torch.bfloat16, torch.float16)
        and NARROWEST_BAND <= width <= WIDEST_BAND_PER_TAP * kernel_size
    )


def _product_dtype(tensor: torch.Tensor) -> torch.dtype:
    """Return the dtype in which a matrix product of the tensor is computed: autocast's, or its own."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype

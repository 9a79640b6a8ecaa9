"""`banded_convolution` equals `conv2d` with `padding="same"`, forward and backward."""

import warnings

import pytest
import torch
from torch import nn

from modeling_sslam.banded_convolution import banded_convolution, banded_weight

BATCH, TIME, CHANNELS = 2, 5, 8
KERNEL_SIZES = [1, 2, 3, 4, 5, 7, 11]  # 11 covers the whole grid from any patch
NAMES = ("output", "gradient of the grid", "gradient of the weight", "gradient of the bias")


def plain_convolution(
    grid: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, groups: int
) -> torch.Tensor:
    return nn.functional.conv2d(grid.permute(0, 3, 1, 2), weight, bias, padding="same", groups=groups).permute(
        0, 2, 3, 1
    )


def draw(kernel: tuple[int, int], groups: int, mel: int, channels: int = CHANNELS) -> list[torch.Tensor]:
    """Draw a grid, a weight and a bias."""
    weight = torch.randn(channels, channels // groups, *kernel)
    return [torch.randn(BATCH, TIME, mel, channels), weight, torch.randn(channels)]


def forward_and_backward(convolution, arguments: list[torch.Tensor], groups: int, dtype: torch.dtype):
    """Return the output, then the gradients of the arguments."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in arguments]
    output = convolution(*leaves, groups)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.backward(gradient.to(dtype))
    return [output.detach(), *(x.grad for x in leaves)]


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def assert_equals_plain(arguments: list[torch.Tensor], groups: int) -> None:
    """Compare in float64 to its rounding and in float32 to 1e-6."""
    exact = forward_and_backward(plain_convolution, arguments, groups, torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        found = forward_and_backward(banded_convolution, arguments, groups, dtype)
        for name, value, exact_value in zip(NAMES, found, exact, strict=True):
            assert value.dtype == dtype
            assert value.shape == exact_value.shape
            assert relative_error(value, exact_value) < tolerance, name


@pytest.fixture(autouse=True)
def _even_kernels():
    """Hide torch's warning that it pads the input of even kernels by a copy."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same' with even kernel lengths")
        yield


@pytest.mark.parametrize("kernel_size", KERNEL_SIZES)
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("mel", [1, 2, 3, 8])
def test_equals_conv2d(kernel_size, groups, mel):
    assert_equals_plain(draw((kernel_size, kernel_size), groups, mel), groups)


@pytest.mark.parametrize("kernel", [(3, 5), (4, 1), (1, 4)])
def test_kernel_of_two_sizes(kernel):
    assert_equals_plain(draw(kernel, 2, 6), 2)


def test_other_number_of_output_channels():
    grid, _, _ = draw((3, 3), 2, 4)
    assert_equals_plain([grid, torch.randn(12, CHANNELS // 2, 3, 3), torch.randn(12)], 2)


def test_without_bias():
    grid, weight, _ = draw((3, 3), 2, 4)
    expected = plain_convolution(grid, weight, None, 2)
    assert relative_error(banded_convolution(grid, weight, None, 2), expected.double()) < 1e-6


@pytest.mark.parametrize("kernel_size", [3, 5, 7])
@pytest.mark.parametrize("groups", [1, 2, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_like_conv2d_in_half_precision(kernel_size, groups, dtype):
    """The error may be twice that of `conv2d`, which rounds its arguments and results to the same dtype."""
    arguments = draw((kernel_size, kernel_size), groups, 8, channels=64)
    exact = forward_and_backward(plain_convolution, arguments, groups, torch.float64)
    plain = forward_and_backward(plain_convolution, arguments, groups, dtype)
    found = forward_and_backward(banded_convolution, arguments, groups, dtype)
    for name, value, plain_value, exact_value in zip(NAMES, found, plain, exact, strict=True):
        assert relative_error(value, exact_value) <= 2 * relative_error(plain_value, exact_value), name


@pytest.mark.slow
@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_graph_is_whole(groups):
    """A single graph holds the convolutions of all kernel sizes."""
    torch.compiler.reset()
    drawn = [draw((kernel_size, kernel_size), groups, 3) for kernel_size in KERNEL_SIZES]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def convolve_all(arguments: list[list[torch.Tensor]]) -> list[torch.Tensor]:
        return [banded_convolution(*each, groups) for each in arguments]

    leaves = [[x.clone().requires_grad_() for x in arguments] for arguments in drawn]
    outputs = convolve_all(leaves)
    # The gradients that `forward_and_backward` draws.
    drawn_gradients = [torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for x in outputs]
    torch.autograd.backward(outputs, drawn_gradients)
    for arguments, output, inputs in zip(drawn, outputs, leaves, strict=True):
        exact = forward_and_backward(plain_convolution, arguments, groups, torch.float64)
        for name, value, exact_value in zip(NAMES, [output, *(x.grad for x in inputs)], exact, strict=True):
            assert relative_error(value, exact_value) < 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize(("kernel_size", "groups", "mel"), [(3, 2, 4), (4, 8, 3)])
def test_compiled_kernels(kernel_size, groups, mel):
    torch.compiler.reset()
    arguments = draw((kernel_size, kernel_size), groups, mel)
    exact = forward_and_backward(plain_convolution, arguments, groups, torch.float64)
    found = forward_and_backward(torch.compile(banded_convolution, fullgraph=True), arguments, groups, torch.float32)
    for name, value, exact_value in zip(NAMES, found, exact, strict=True):
        assert relative_error(value, exact_value) < 1e-6, name


def test_matrix_holds_each_weight_at_its_taps():
    weight = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
    # Column j has the weights by which output j reads the inputs.
    expected = [[2.0, 1.0, 0.0, 0.0], [3.0, 2.0, 1.0, 0.0], [0.0, 3.0, 2.0, 1.0], [0.0, 0.0, 3.0, 2.0]]
    assert banded_weight(weight, 1, 4).tolist() == [expected]

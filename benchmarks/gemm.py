"""The GEMM limit: the time of the model's matrix products alone.

The products of a run of the *eager* model are recorded: linear layers, convolutions as matrix products, the two
products of attention, and the products of the gradients in a backward pass. Each product is then computed at its own
shape and dtype, with ready and contiguous operands, by the fastest kernel on this machine. oneDNN's kernel computes
some rows at a time. The FLOPs of a product are 2 * batch * rows * inner * columns. The limit excludes everything else,
such as normalisation, activation, softmax and copies. It also excludes products that are recomputed to save memory, as
in the backward passes of attention and of the decoder.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.measurement import time_in_turn

aten = torch.ops.aten

# oneDNN computes this many rows at a time, so that results are in memory that has been used before.
ROWS_AT_A_TIME = 1024


class MatrixProduct(NamedTuple):
    """`batch` products of (rows, inner) with (inner, columns)."""

    batch: int
    rows: int
    inner: int
    columns: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.rows * self.inner * self.columns


def matrix_products(run: Callable[[], object]) -> Counter[MatrixProduct]:
    """Count the products that `run` asks torch for, backward passes included."""
    with _Recorder() as recorder:
        run()
    return recorder.products


def total_flops(products: Counter[MatrixProduct]) -> int:
    return sum(product.flops * count for product, count in products.items())


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[MatrixProduct] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.products.update(_products_of(func.overloadpacket, args, out))
        return out


def _products_of(op: Any, args: tuple, out: Any) -> Iterator[MatrixProduct]:
    if op in (aten.mm, aten.bmm):
        yield _product(*args[:2])
    elif op in (aten.addmm, aten.baddbmm):
        yield _product(*args[1:3])
    elif op is aten.linear:  # under inference_mode, this operator and the next are not decomposed
        yield _product(args[0].flatten(0, -2), args[1].t())
    elif op is aten.conv2d:
        yield _convolution(args[0], args[1], out, groups=args[6] if len(args) > 6 else 1)
    elif op is aten.convolution:
        yield _convolution(args[0], args[1], out, groups=args[8])
    elif op is aten.convolution_backward:
        forward = _convolution(args[1], args[2], args[0], groups=args[9])
        if args[10][0]:  # gradient of the input
            yield forward._replace(inner=forward.columns, columns=forward.inner)
        if args[10][1]:  # gradient of the weight
            yield forward._replace(rows=forward.inner, inner=forward.rows)
    elif "scaled_dot_product" in op.__name__:
        is_backward = op.__name__.endswith("_backward")
        query, key, value = args[1:4] if is_backward else args[:3]
        *batch, length, head_dim = query.shape
        scores = MatrixProduct(math.prod(batch), length, head_dim, key.shape[-2], query.dtype)
        attended = scores._replace(inner=key.shape[-2], columns=value.shape[-1])
        # Backward: the gradients of probabilities, values, queries and keys.
        yield from (scores, attended, attended, attended) if is_backward else (scores, attended)


def _product(left: torch.Tensor, right: torch.Tensor) -> MatrixProduct:
    *batch, rows, inner = left.shape
    return MatrixProduct(math.prod(batch), rows, inner, right.shape[-1], left.dtype)


def _convolution(image: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, groups: int) -> MatrixProduct:
    places = out.numel() // out.shape[1]
    return MatrixProduct(groups, places, weight[0].numel(), len(weight) // groups, image.dtype)


def gemm_runner(
    products: Counter[MatrixProduct], device: torch.device, kernels: tuple[str, ...] = ("torch", "onednn")
) -> Callable[[], None]:
    """Return a function that computes all products, each as often as counted, by its fastest kernel.

    Args:
        products: Products and their counts.
        device: Device to compute on.
        kernels: Kernels to choose from. "torch" is `torch.bmm`. "onednn" is oneDNN's linear layer, which torch offers
            on CPUs in addition to the library that `torch.mm` calls there in float32. "packed" is the same with the
            second factor in oneDNN's own layout, in which inference may hold its weights.
    """
    fastest = []
    for product, count in products.items():
        candidates = dict(_kernels(product, device, kernels))
        timings = time_in_turn(candidates, rounds=7, device=device)
        # Compare the best times, because other load on the machine may disturb single calls of some milliseconds.
        fastest.append((candidates[min(timings, key=lambda name: min(timings[name].repeats))], count))

    @torch.no_grad()
    def run() -> None:
        for compute, count in fastest:
            for _ in range(count):
                compute()

    return run


def _kernels(
    product: MatrixProduct, device: torch.device, kernels: tuple[str, ...]
) -> Iterator[tuple[str, Callable[[], object]]]:
    factory: dict[str, Any] = {"dtype": product.dtype, "device": device}
    batch, rows, inner, columns, _ = product
    left, right = torch.randn(batch, rows, inner, **factory), torch.randn(batch, columns, inner, **factory)
    if "torch" in kernels:
        out = torch.empty(batch, rows, columns, **factory)
        if batch == 1:
            yield "torch", lambda: torch.mm(left[0], right[0].t(), out=out[0])
        else:
            yield "torch", lambda: torch.bmm(left, right.transpose(1, 2), out=out)
    if "onednn" in kernels and device.type == "cpu":
        yield "onednn", partial(_multiply_by_onednn, left, right)
    if "packed" in kernels and device.type == "cpu" and batch == 1:
        packed = torch.ops.mkldnn._reorder_linear_weight(right[0], min(rows, ROWS_AT_A_TIME))
        yield "packed", partial(_multiply_by_onednn, left, [packed])


def _multiply_by_onednn(left: Iterable[torch.Tensor], right: Iterable[torch.Tensor]) -> None:
    """Compute products some rows at a time and drop them.

    A large result would be new memory. Clearing its pages can take a fifth of the product's own time or more.
    """
    for rows, weight in zip(left, right, strict=True):
        for part in rows.split(ROWS_AT_A_TIME):
            torch.ops.mkldnn._linear_pointwise(part, weight, None, "none", [], "")

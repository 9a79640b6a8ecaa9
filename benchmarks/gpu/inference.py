"""The rate of large products, the filter bank, and inference from waveforms."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import front_end
from benchmarks.gemm import matrix_products, total_flops
from benchmarks.gpu.bench import CLIPS, LIMIT, MS, Bench, Figure, Sizes, Stage, milliseconds, per_second
from benchmarks.gpu.trace import trace
from benchmarks.gpu.variants import compile_encoder, start_compile_workers
from benchmarks.inference import SECONDS, make_ast
from benchmarks.measurement import Measurement, ratio, read_peak, reset_peak, scaled
from benchmarks.report import Row, base_config
from modeling_sslam import SSLAMFeatureExtractor, SSLAMModel
from modeling_sslam.inference import Embedder

DTYPE = torch.bfloat16


def products_stage(sizes: Sizes, where: str) -> Stage:
    what = f"{sizes.product} x {sizes.product} x {sizes.product} product, bf16"
    return Stage("large products", {"rate": Row(what, where, "TFLOP/s", None)}, measure_products)


def measure_products(bench: Bench) -> Iterator[Figure]:
    size = bench.sizes.product
    left, right = torch.randn(2, size, size, device=bench.device, dtype=DTYPE)
    out = torch.empty_like(left)
    seconds = bench.time({"product": lambda: torch.mm(left, right, out=out)})["product"]
    bench.product_rate = 2 * size**3 / seconds.median
    yield Figure("rate", scaled(seconds, lambda value: 2 * size**3 / value / 1e12), "the limit of the rows below")
    start_compile_workers(bench.device)


def filter_bank_stage(sizes: Sizes, where: str) -> Stage:
    what = f"filter bank, {sizes.clips} clips of {SECONDS:g} s on the device"
    rows = {
        "ms": Row(what, where, MS, None, at_most=6.0),
        "clips": Row(what, where, CLIPS, None),
        "rival": Row(what, where, "x kaldi.fbank clip by clip", None),
        "memory": Row(what, where, "peak memory, x the input", None, at_most=4.0),
    }
    return Stage("filter bank", rows, measure_filter_bank)


def measure_filter_bank(bench: Bench) -> Iterator[Figure]:
    extractor, count = SSLAMFeatureExtractor(), bench.sizes.clips
    clips = front_end.make_clips(count, SECONDS, extractor.sampling_rate, bench.device)
    max_length = front_end.padded_frames(extractor, SECONDS)
    ours, published = (
        partial(compute, extractor, clips, max_length) for compute in (front_end.ours, front_end.published)
    )
    difference = (ours() - published()).abs().max().item()
    bench.report.record("filter bank: largest difference of the input_values from kaldi.fbank's", difference)
    before = reset_peak(bench.device)
    ours()
    peak = read_peak(bench.device) - before
    seconds = bench.time({"ours": ours, "published": published})
    yield Figure("ms", milliseconds(seconds["ours"]), f"kaldi.fbank {1000 * seconds['published'].median:.4g} ms")
    yield Figure("clips", per_second(count, seconds["ours"]))
    yield Figure("rival", ratio(seconds["published"], seconds["ours"]))
    yield Figure("memory", peak / sum(clip.nbytes for clip in clips), "results and intermediate values")


@dataclass
class Encoder:
    """Our encoder on the device, with the waveforms and the features that it is timed on.

    Attributes:
        model: The plain model.
        run: The encoder, compiled or not.
        embedder: The same with its filter bank, as users run it.
        input_values: Features of a batch, on the device.
        waveforms: Samples of the batch, on the device.
        waveform: Samples of one clip `(1, num_samples)`, on the host.
    """

    model: SSLAMModel
    run: Callable[[torch.Tensor], Any]
    embedder: Embedder
    input_values: torch.Tensor
    waveforms: torch.Tensor
    waveform: torch.Tensor

    def contestants(self) -> dict[str, Callable[[], object]]:
        runs = {
            "encoder": lambda: self.run(self.input_values),
            "from waveforms": lambda: self.embedder.embed_waveforms(self.waveforms),
        }
        return {name: torch.inference_mode()(run) for name, run in runs.items()}

    def latency(self) -> torch.Tensor:
        """Embed one clip, from a waveform on the host to a vector on the host."""
        return self.embedder.embed_waveforms(self.waveform).cpu()


def make_encoder(bench: Bench, compiled: bool) -> Encoder:
    """Make an encoder of the base size in bfloat16."""
    extractor, device = SSLAMFeatureExtractor(), bench.device
    waveforms = torch.randn(bench.sizes.clips, round(SECONDS * extractor.sampling_rate), device=device) / 10
    model = SSLAMModel(base_config(bench.sizes.layers)).eval().to(device, DTYPE)
    input_values = extractor(waveforms, extractor.sampling_rate, return_tensors="pt")["input_values"]
    embedder = Embedder(model, extractor, compile=compiled)
    run = compile_encoder(model) if compiled else model
    return Encoder(model, run, embedder, input_values, waveforms, waveforms[:1].cpu())


def inference_rows(sizes: Sizes, where: str, variant: str) -> dict[str, Row]:
    encoder = f"encoder base, bf16, batch {sizes.clips}, {variant}"
    waveforms = f"inference base from waveforms, bf16, batch {sizes.clips}, {variant}"
    one = f"one clip, waveform on the host to embedding on the host, {variant}"
    fast = variant == "compiled"
    return {
        "encoder": Row(encoder, where, CLIPS, None),
        "encoder limit": Row(encoder, where, LIMIT, None),
        "from waveforms": Row(waveforms, where, CLIPS, None),
        "from waveforms limit": Row(waveforms, where, LIMIT, None, at_least=0.55 if fast else None),
        "memory": Row(waveforms, where, "GB at its peak", None),
        "latency": Row(one, where, MS, None, at_most=1.2 if fast else None),
    }


def eager_stage(sizes: Sizes, where: str) -> Stage:
    return Stage("inference, eager", inference_rows(sizes, where, "eager"), measure_eager)


def measure_eager(bench: Bench) -> Iterator[Figure]:
    encoder = make_encoder(bench, compiled=False)
    yield from inference_figures(bench, encoder, bench.time(encoder.contestants()))


def compiled_stage(sizes: Sizes, where: str) -> Stage:
    what = f"inference base from waveforms, bf16, batch {sizes.clips}, compiled"
    rows = inference_rows(sizes, where, "compiled") | {
        "AST": Row(f"encoder base, bf16, batch {sizes.clips}, compiled", where, "times AST's clips/s, compiled", None),
        "idle": Row(what, where, "idle share of the device", None),
    }
    return Stage("inference, compiled", rows, measure_compiled)


def measure_compiled(bench: Bench) -> Iterator[Figure]:
    encoder = make_encoder(bench, compiled=True)
    contestants = encoder.contestants()
    yield from inference_figures(bench, encoder, bench.time(contestants))
    found = trace(
        contestants["from waveforms"], bench.sizes.traced_calls, bench.device, bench.beside("inference_trace.json.gz")
    )
    yield Figure("idle", found.idle_share, bench.keep_trace("inference", found))
    ast = compile_encoder(make_ast(base_config(bench.sizes.layers)).to(bench.device, DTYPE))
    rival = torch.inference_mode()(partial(ast, encoder.input_values.to(DTYPE)))
    seconds = bench.time({"ours": contestants["encoder"], "AST": rival})
    note = f"AST {bench.sizes.clips / seconds['AST'].median:.4g} clips/s, both without filter bank"
    yield Figure("AST", ratio(seconds["AST"], seconds["ours"]), note)


def inference_figures(bench: Bench, encoder: Encoder, seconds: dict[str, Measurement]) -> Iterator[Figure]:
    """Yield the figures that eager and compiled inference share."""
    with torch.inference_mode():
        flops = total_flops(matrix_products(lambda: encoder.model(encoder.input_values)))
    for name, measurement in seconds.items():
        yield Figure(name, per_second(bench.sizes.clips, measurement), f"{1000 * measurement.median:.4g} ms")
        yield from bench.share_of_limit(f"{name} limit", flops, measurement)
    before = reset_peak(bench.device)
    encoder.contestants()["from waveforms"]()
    yield Figure("memory", (read_peak(bench.device) - before) / 1e9, "beyond weights and waveforms")
    yield Figure("latency", milliseconds(bench.time({"one clip": encoder.latency})["one clip"]))

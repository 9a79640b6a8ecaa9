"""The pre-training steps of both stages, against the plain transcription in float16."""

import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from benchmarks.gemm import total_flops
from benchmarks.gpu.bench import Bench, Figure, Sizes, Stage, milliseconds
from benchmarks.gpu.trace import trace
from benchmarks.gpu.variants import Variant, fast_model
from benchmarks.measurement import ratio, read_peak, reset_peak
from benchmarks.pretraining_step import GB, make_plain_step, make_step, products_of_step
from benchmarks.report import Row

STAGES = {"sslam": "stage 2", "ua": "stage 1"}
PLAIN = "plain transcription, fp16"
EAGER = (Variant("small", compiled=False), Variant("fast", compiled=False))
COMPILED_FAST, COMPILED_SMALL = (Variant("fast", compiled=True),), (Variant("small", compiled=True),)
# Calls before a contestant's memory is read: compile, warm up and record a CUDA graph, then replay it.
CALLS_TO_PEAK = 3


def name_of(sizes: Sizes, objective: str) -> str:
    return f"pre-training step base, {STAGES[objective]}, B {sizes.batch}, C {sizes.clones[objective]}"


def step_stage(sizes: Sizes, where: str, objective: str, variants: Sequence[Variant]) -> Stage:
    """Make the stage that measures some variants of a step in turn with the plain transcription."""
    what, rows = name_of(sizes, objective), {}
    if not variants[0].compiled:
        rows |= {f"{PLAIN} ms": Row(f"{what}, {PLAIN}", where, "ms", None)}
        rows |= {f"{PLAIN} memory": Row(f"{what}, {PLAIN}", where, "GB at its peak", None)}
    for variant in variants:
        ours, best = f"{what}, bf16, {variant}", variant in COMPILED_FAST
        rows |= {
            f"{variant} ms": Row(ours, where, "ms", None),
            f"{variant} speed": Row(ours, where, "times the plain speed, fp16", None, at_least=2.25 if best else None),
            f"{variant} limit": Row(
                ours, where, "of the limit by large products", None, at_least=0.4 if best else None
            ),
            f"{variant} memory": Row(ours, where, "GB at its peak", None, at_most=24.0 if best else None),
        }
        if best:
            rows["idle"] = Row(ours, where, "idle share of the device", None)
            if objective == "sslam":
                rows["fed"] = Row(
                    f"data loader beside {ours}", where, "times the clips/s of the step", None, at_least=1.0
                )
    names = "; ".join(map(str, variants))
    return Stage(f"{what}: {names}", rows, partial(measure_steps, objective=objective, variants=variants))


def measure_steps(bench: Bench, objective: str, variants: Sequence[Variant]) -> Iterator[Figure]:
    setting = bench.setting(objective)
    flops = total_flops(products_of_step(setting))
    makers: dict[str, Callable[[], Callable[[], None]]] = {PLAIN: partial(make_plain_step, setting)}
    for variant in variants:
        makers[str(variant)] = partial(make_step, setting, partial(fast_model, variant=variant))
    contestants, peaks = {}, {}
    for name, make in makers.items():
        gc.collect()
        before = reset_peak(bench.device)
        contestants[name] = make()
        for _ in range(CALLS_TO_PEAK):
            contestants[name]()
        peaks[name] = (read_peak(bench.device) - before) / GB
    seconds = bench.time(contestants)
    what = name_of(bench.sizes, objective)
    bench.report.record(f"{what}: TFLOPs of the matrix products", flops / 1e12)
    plain = seconds[PLAIN]
    if not variants[0].compiled:
        yield Figure(f"{PLAIN} ms", milliseconds(plain))
        yield Figure(f"{PLAIN} memory", peaks[PLAIN])
    for variant in variants:
        ours = seconds[str(variant)]
        yield Figure(f"{variant} ms", milliseconds(ours))
        yield Figure(f"{variant} speed", ratio(plain, ours), f"plain {1000 * plain.median:.4g} ms")
        yield from bench.share_of_limit(f"{variant} limit", flops, ours)
        yield Figure(f"{variant} memory", peaks[str(variant)], f"plain {peaks[PLAIN]:.3g} GB")
        fastest = bench.step_seconds.get(objective, float("inf"))
        bench.step_seconds[objective] = min(fastest, ours.median)
        if variant in COMPILED_FAST:
            if objective == "sslam":
                yield from bench.fed("fed", ours.median)
            key = f"{STAGES[objective].replace(' ', '_')}_step"
            path = bench.beside(f"{key}_trace.json.gz")
            found = trace(contestants[str(variant)], bench.sizes.traced_calls, bench.device, path)
            yield Figure("idle", found.idle_share, bench.keep_trace(key, found))

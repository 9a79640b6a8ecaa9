"""The pre-training steps of both stages, against the plain transcription in float16."""

import gc
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial

from benchmarks.gemm import total_flops
from benchmarks.gpu.bench import LIMIT, MS, Bench, Figure, Sizes, Stage, milliseconds
from benchmarks.gpu.loading import share_of_ready_batch
from benchmarks.gpu.trace import trace
from benchmarks.gpu.variants import Variant, fast_model
from benchmarks.measurement import Measurement, ratio, read_peak, reset_peak
from benchmarks.pretraining_step import GB, make_plain_step, make_step, products_of_step
from benchmarks.report import Row

STAGES = {"sslam": "stage 2", "ua": "stage 1"}
PLAIN = "plain transcription, fp16"
PEAK, SPEED = "GB at its peak", "times the plain speed, fp16"
EAGER = (Variant("small", "eager"), Variant("fast", "eager"))
FAST, GRAPHS, SMALL = Variant("fast", "compiled"), Variant("fast", "CUDA graphs"), Variant("small", "compiled")

Step = Callable[[], None]


def name_of(sizes: Sizes, objective: str) -> str:
    return f"pre-training step base, {STAGES[objective]}, B {sizes.batch}, C {sizes.clones[objective]}"


def eager_stage(sizes: Sizes, where: str, objective: str) -> Stage:
    what = name_of(sizes, objective)
    rows = {
        "plain ms": Row(f"{what}, {PLAIN}", where, MS, None),
        "plain memory": Row(f"{what}, {PLAIN}", where, PEAK, None),
    }
    for variant in EAGER:
        rows |= variant_rows(f"{what}, bf16, {variant}", where, variant)
    return Stage(f"{what}, eager", rows, partial(measure_eager, objective=objective))


def fast_stage(sizes: Sizes, where: str, objective: str) -> Stage:
    """Make the stage of the step as `training.pretrain` runs it on a GPU, with its trace and its data loader."""
    ours = f"{name_of(sizes, objective)}, bf16, {FAST}"
    rows = variant_rows(ours, where, FAST, speed=2.25, share=0.4, gigabytes=24.0)
    rows["idle"] = Row(ours, where, "idle share of the device", None)
    if objective == "sslam":
        fed = f"{ours}, from FLAC shards, {sizes.workers} workers"
        rows["fed"] = Row(fed, where, "loader's clips/s, times the step's", None, at_least=1.0)
        rows["from loader"] = Row(fed, where, "steps/s of those on a ready batch", None, at_least=0.98)
    return Stage(ours, rows, partial(measure_fast, objective=objective))


def other_stage(sizes: Sizes, where: str, objective: str, variant: Variant) -> Stage:
    ours = f"{name_of(sizes, objective)}, bf16, {variant}"
    rows = variant_rows(ours, where, variant)
    return Stage(ours, rows, partial(measure_other, objective=objective, variant=variant))


def variant_rows(
    what: str,
    where: str,
    variant: Variant,
    speed: float | None = None,
    share: float | None = None,
    gigabytes: float | None = None,
) -> dict[str, Row]:
    """Return the rows of a variant, with their targets."""
    return {
        f"{variant} ms": Row(what, where, MS, None),
        f"{variant} speed": Row(what, where, SPEED, None, at_least=speed),
        f"{variant} limit": Row(what, where, LIMIT, None, at_least=share),
        f"{variant} memory": Row(what, where, PEAK, None, at_most=gigabytes),
    }


def measure_eager(bench: Bench, objective: str) -> Iterator[Figure]:
    _, seconds, peaks = yield from measure_variants(bench, objective, EAGER)
    yield Figure("plain ms", milliseconds(seconds[PLAIN]))
    yield Figure("plain memory", peaks[PLAIN])


def measure_other(bench: Bench, objective: str, variant: Variant) -> Iterator[Figure]:
    yield from measure_variants(bench, objective, (variant,))


def measure_fast(bench: Bench, objective: str) -> Iterator[Figure]:
    steps, seconds, _ = yield from measure_variants(bench, objective, (FAST,))
    step = steps[str(FAST)]
    if objective == "sslam":
        yield from bench.fed("fed", seconds[str(FAST)].median)
    name = f"{STAGES[objective].replace(' ', '_')}_step"
    found = trace(step, bench.sizes.traced_calls, bench.device, bench.beside(f"{name}_trace.json.gz"))
    yield Figure("idle", found.idle_share, bench.keep_trace(name, found))
    if objective == "sslam" and bench.clips_per_second is not None:
        yield Figure("from loader", share_of_ready_batch(bench, step.func))


def measure_variants(
    bench: Bench, objective: str, variants: Sequence[Variant]
) -> Generator[Figure, None, tuple[dict[str, partial[None]], dict[str, Measurement], dict[str, float]]]:
    """Measure variants of a step in turn with the plain transcription.

    Yields:
        The figures of [`variant_rows`].

    Returns:
        Our steps, and the seconds and the peak memory in GB of all, by name.
    """
    setting = bench.setting(objective)
    flops = total_flops(products_of_step(setting))
    plain, peak = with_peak(bench, partial(make_plain_step, setting))
    contestants, peaks, ours = {PLAIN: plain}, {PLAIN: peak}, {}
    for variant in variants:
        name = str(variant)
        step, peaks[name] = with_peak(bench, partial(make_step, setting, partial(fast_model, variant=variant)))
        contestants[name] = ours[name] = step
    seconds = bench.time(contestants)
    for variant in variants:
        name, own = str(variant), seconds[str(variant)]
        bench.step_seconds[objective] = min(bench.step_seconds.get(objective, own.median), own.median)
        yield Figure(f"{name} ms", milliseconds(own))
        yield Figure(f"{name} speed", ratio(seconds[PLAIN], own), f"plain {1000 * seconds[PLAIN].median:.4g} ms")
        yield from bench.share_of_limit(f"{name} limit", flops, own)
        yield Figure(f"{name} memory", peaks[name], f"plain {peaks[PLAIN]:.3g} GB")
    return ours, seconds, peaks


def with_peak(bench: Bench, make: Callable[[], Step]) -> tuple[Step, float]:
    """Make a step, warm it up, and return it with its peak memory in GB: from before its model existed."""
    gc.collect()
    before = reset_peak(bench.device)
    step = make()
    for _ in range(bench.sizes.warmup_calls):
        step()
    return step, (read_peak(bench.device) - before) / GB

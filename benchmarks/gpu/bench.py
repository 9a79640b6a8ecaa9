"""A bench: device, sizes and results of a run, and the stages that it measures one after another."""

import gc
import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.gpu.budget import Budget, OutOfTimeError
from benchmarks.gpu.trace import Trace
from benchmarks.measurement import Measurement, process_age, scaled, time_in_turn
from benchmarks.pretraining_step import Setting
from benchmarks.report import Report, Row, section_of

# Meanings of the values of several stages' rows.
MS, CLIPS, LIMIT = "ms", "clips/s", "of the limit by large products"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measured computations.

    Attributes:
        product: Rows and columns of the factors of the large product.
        clips: Clips of a batch in inference.
        batch: Clips of a pre-training step.
        clones: Masked copies of each clip of a step, by objective: "sslam" (stage 2) and "ua" (stage 1).
        frames: Frames of a clip of a step.
        warmup_calls: Calls before a measurement: a CUDA graph is warmed up, recorded and replayed in its first three.
        rounds: Measured rounds; the contestants take turns in each.
        turn_seconds: Length of a contestant's turn.
        workers: Workers of the data loader.
        batches_per_worker: Batches of each worker in a round of the data loader.
        steps: Steps of a turn that the data loader feeds.
        traced_calls: Calls in a trace.
        layers: Blocks of the encoder.
    """

    product: int = 8192
    clips: int = 256
    batch: int = 12
    clones: Mapping[str, int] = field(default_factory=lambda: {"sslam": 8, "ua": 16})
    frames: int = 1024
    warmup_calls: int = 3
    rounds: int = 5
    turn_seconds: float = 0.25
    workers: int = 16
    batches_per_worker: int = 4
    steps: int = 20
    traced_calls: int = 3
    layers: int = 12


# The same code at a size that a CPU computes in seconds.
TRIAL_SIZES = Sizes(
    product=256,
    clips=2,
    batch=2,
    clones={"sslam": 1, "ua": 2},
    frames=64,
    warmup_calls=1,
    rounds=1,
    turn_seconds=0.0,
    workers=1,
    batches_per_worker=1,
    steps=1,
    traced_calls=1,
)


class Figure(NamedTuple):
    """A measured value of one of a stage's rows.

    Attributes:
        row: Key of the row.
        value: The value.
        note: Further conditions of the value.
    """

    row: str
    value: Measurement | float
    note: str = ""


@dataclass
class Bench:
    """Device, sizes and results of a run.

    Attributes:
        device: Device to measure.
        sizes: Sizes of the computations.
        report: Rows and figures so far.
        path: JSON file of the results. The other files have its name with other endings.
        scratch: Folder for temporary files.
        product_rate: FLOP/s of large products, the limit of the device; None before it is measured.
        step_seconds: Time of our fastest step so far, by objective.
        clips_per_second: Rate of the data loader; None before it is measured.
    """

    device: torch.device
    sizes: Sizes
    report: Report
    path: Path
    scratch: Path
    product_rate: float | None = None
    step_seconds: dict[str, float] = field(default_factory=dict)
    clips_per_second: float | None = None

    def time(self, contestants: Mapping[str, Callable[[], object]]) -> dict[str, Measurement]:
        """Time functions in turn, in seconds of a call."""
        sizes = self.sizes
        return time_in_turn(contestants, sizes.rounds, self.device, sizes.warmup_calls, sizes.turn_seconds)

    def setting(self, objective: str) -> Setting:
        """Return the setting of a pre-training step."""
        sizes = self.sizes
        return Setting(
            sizes.batch,
            sizes.clones[objective],
            sizes.frames,
            sizes.layers,
            str(self.device),
            half_precision=True,
            objective=objective,
        )

    def share_of_limit(self, row: str, flops: int, seconds: Measurement) -> Iterator[Figure]:
        """Yield the FLOP/s of matrix products over those of large products, if the latter are measured."""
        rate = self.product_rate
        if rate is not None:
            note = f"{flops / 1e12:.3g} TFLOP; {1000 * flops / rate:.3g} ms at {rate / 1e12:.3g} TFLOP/s"
            yield Figure(row, scaled(seconds, lambda value: flops / rate / value), note)

    def fed(self, row: str, step_seconds: float) -> Iterator[Figure]:
        """Yield the data loader's clips/s over those that a step consumes, if the loader is measured."""
        if self.clips_per_second is not None:
            share = self.clips_per_second * step_seconds / self.sizes.batch
            waits = "yes" if share >= 1 else "no"
            note = f"feeds that step without waiting: {waits}; {self.sizes.batch / step_seconds:.4g} clips/s"
            yield Figure(row, share, note)

    def beside(self, name: str) -> Path:
        """Return the path of another file of the results."""
        return self.path.with_name(f"{self.path.stem}_{name}")

    def keep_trace(self, name: str, trace: Trace) -> str:
        """Print and write a trace's summary, record it, and return a note that names its files."""
        text = trace.as_text(name)
        print(text, end="", flush=True)
        self.beside(f"{name}_kernels.txt").write_text(text)
        self.report.record(f"{name}: dearest kernels, share of the kernels' time", trace.shares())
        return f"{self.beside(name).name}_kernels.txt, _trace.json.gz"

    def start(self) -> None:
        """Print the machine and the versions, and begin the file of rows with them."""
        found = self.report.as_dict()
        header = {name: found[name] for name in ("command", "date", "machine", "versions", "settings")}
        machine, versions = header["machine"], header["versions"]
        found_versions = ", ".join(f"{name} {version}" for name, version in versions.items())
        print(f"{machine['gpu'] or machine['processor']}, {machine['cores']} cores; {found_versions}", flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".jsonl").write_text(json.dumps(header) + "\n")

    def publish(self, row: Row) -> None:
        """Print a row and write all results so far, so that an interruption loses nothing."""
        self.report.add(row)
        with self.path.with_suffix(".jsonl").open("a") as file:
            file.write(json.dumps({"seconds": round(process_age(), 1), **row.as_dict()}) + "\n")
        self.report.save(self.path)
        self.path.with_suffix(".md").write_text("\n".join(section_of(self.report.as_dict())) + "\n")


class Stage(NamedTuple):
    """Rows that are measured together.

    Attributes:
        name: Name in the output.
        rows: The rows without their values, by key.
        measure: Generator of the rows' values, in any order.
    """

    name: str
    rows: Mapping[str, Row]
    measure: Callable[[Bench], Iterator[Figure]]


def run_stages(bench: Bench, stages: Iterable[Stage], budget: Budget) -> list[str]:
    """Measure stages in order and publish each row as soon as it is measured.

    A stage that fails or runs out of time or memory leaves its remaining rows "not measured", with the reason, and the
    next stage follows.

    Returns:
        Names of the stages that failed with an error.
    """
    failed = []
    for stage in stages:
        missing, reason = dict(stage.rows), "it needs a figure that is missing"
        try:
            print(f"-- {stage.name} ({process_age():.0f} s since the start)", flush=True)
            with budget.limit():
                free_memory()
                figures = stage.measure(bench)
            while True:
                with budget.limit():
                    figure = next(figures, None)
                if figure is None:
                    break
                bench.publish(replace(missing.pop(figure.row), value=figure.value, note=figure.note))
        except OutOfTimeError:
            reason = "out of time"
        except torch.OutOfMemoryError:
            reason = "out of memory"
        except Exception as error:
            traceback.print_exc()
            reason = type(error).__name__
            failed.append(stage.name)
        for row in missing.values():
            bench.publish(replace(row, if_missing=f"not measured: {reason}"))
    return failed


def free_memory() -> None:
    """Free what earlier stages have left: models, compiled functions and their CUDA graphs, and cached memory."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def milliseconds(seconds: Measurement) -> Measurement:
    return scaled(seconds, lambda value: 1000 * value)


def per_second(count: int, seconds: Measurement) -> Measurement:
    return scaled(seconds, lambda value: count / value)

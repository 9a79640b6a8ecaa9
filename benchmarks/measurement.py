"""How the benchmarks measure: contestants in turn, ratios round by round, peak memory in a process of its own."""

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Measurement:
    """Repeats of one figure: their median, and the quartiles between which the middle half of them lies."""

    median: float
    lower: float
    upper: float
    repeats: list[float]

    @classmethod
    def of(cls, repeats: list[float]) -> "Measurement":
        if len(repeats) == 1:
            return cls(repeats[0], repeats[0], repeats[0], repeats)
        lower, median, upper = statistics.quantiles(repeats, n=4, method="inclusive")
        return cls(median, lower, upper, repeats)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def synchronize(device: torch.device) -> None:
    """Waits for what was asked of a device; a CPU has done it by then."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(
    contestants: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warmup_rounds: int = 1
) -> dict[str, Measurement]:
    """Seconds of one call of each, A B A B: what else the machine does meets all of them. Whatever a first call does
    once (compiling, filling caches) is done in rounds before those that count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for index in range(warmup_rounds + rounds):
        for name, run in contestants.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            if index >= warmup_rounds:
                seconds[name].append(time.perf_counter() - start)
    return {name: Measurement.of(values) for name, values in seconds.items()}


def ratio(numerator: Measurement, denominator: Measurement) -> Measurement:
    """Of two contestants that took turns, round by round."""
    pairs = zip(numerator.repeats, denominator.repeats, strict=True)
    return Measurement.of([first / second for first, second in pairs])


def scaled(measurement: Measurement, function: Callable[[float], float]) -> Measurement:
    """Every repeat through a function, for example seconds into clips per second."""
    return Measurement.of([function(value) for value in measurement.repeats])


@dataclass(frozen=True)
class PeakMemory:
    """Bytes of a run at its peak.

    Attributes:
        of_run: Beyond what was held before the run began: its results and intermediate values.
        in_all: Beyond what the bare process held before anything was set up: weights and inputs too.
    """

    of_run: int
    in_all: int


def peak_memory(set_up: Callable[[], Callable[[], object]]) -> PeakMemory:
    """Peak memory of what `set_up` returns, called once, in a new process: no other run has left memory there that it
    could use again. Resident memory on a CPU, allocated memory on a GPU if it was used.

    Args:
        set_up: A function of a module (or a `functools.partial` of one), which the new process imports.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure_peak, args=(set_up, torch.get_num_threads(), sender))
    process.start()
    sender.close()
    try:
        of_run, in_all = receiver.recv()
    except EOFError:
        process.join()
        raise RuntimeError(
            f"The process whose memory was to be measured ended with exit code {process.exitcode}; its error is above "
            "(-9: out of memory)."
        ) from None
    process.join()
    return PeakMemory(of_run, in_all)


def _measure_peak(set_up: Callable[[], Callable[[], object]], num_threads: int, sender: Any) -> None:
    torch.set_num_threads(num_threads)
    bare = _status_bytes("VmRSS")
    run = set_up()
    before = _status_bytes("VmRSS")
    uses_cuda = torch.cuda.is_available() and torch.cuda.memory_allocated() > 0
    if uses_cuda:
        bare, before = 0, torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts anew from here
    run()
    peak = torch.cuda.max_memory_allocated() if uses_cuda else _status_bytes("VmHWM")
    sender.send((peak - before, peak - bare))


def _status_bytes(field: str) -> int:
    """A memory figure of this process as the Linux kernel gives it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux.")

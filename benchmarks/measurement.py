"""Time contestants in turn, take ratios round by round, and measure peak memory in a separate process."""

import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch


@dataclass(frozen=True)
class Measurement:
    """Repeats of one figure, with their median and their lower and upper quartile."""

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
    """Wait until a GPU has finished its work; a CPU works synchronously."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_in_turn(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    warmup_rounds: int = 1,
    turn_seconds: float = 0.0,
) -> dict[str, Measurement]:
    """Time the contestants round by round, in the order A B A B.

    Other load on the machine then affects all contestants alike. Warm-up rounds come first and do not count: they
    include one-time work such as compiling and filling caches.

    Args:
        contestants: Functions to time, by name.
        rounds: Measured rounds.
        device: Device that the functions use. Each turn ends when its work is finished.
        warmup_rounds: Rounds before the measured ones.
        turn_seconds: Length of a turn. A contestant is called as often as fits into a turn, but at least once. The
            number follows from its time in the latest warm-up round. Several calls keep a GPU's queue filled, as in a
            program that does not wait for each call.

    Returns:
        Seconds of a call, by contestant.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    calls = dict.fromkeys(contestants, 1)
    for index in range(warmup_rounds + rounds):
        for name, run in contestants.items():
            synchronize(device)
            start = time.perf_counter()
            for _ in range(calls[name]):
                run()
            synchronize(device)
            of_a_call = (time.perf_counter() - start) / calls[name]
            if index >= warmup_rounds:
                seconds[name].append(of_a_call)
            else:
                calls[name] = max(1, int(turn_seconds / of_a_call))
    return {name: Measurement.of(values) for name, values in seconds.items()}


class CallTime(NamedTuple):
    """Seconds of one call: wall-clock time, and processor time over all threads."""

    wall: float
    processor: float


def time_call(function: Callable[[], object]) -> CallTime:
    """Time one call."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return CallTime(time.perf_counter() - wall, time.process_time() - processor)


def print_ratios(command: str, bare: list[CallTime], whole: list[CallTime]) -> None:
    """Print the speed of a whole command as a share of the bare model's: the ratios of the median times."""
    for kind, index in (("wall-clock", 0), ("processor", 1)):
        share = statistics.median(times[index] for times in bare) / statistics.median(times[index] for times in whole)
        print(f"{kind} time: {command} at {share:.3f} of the bare model")


def ratio(numerator: Measurement, denominator: Measurement) -> Measurement:
    """Divide the figures of two contestants that took turns, round by round."""
    pairs = zip(numerator.repeats, denominator.repeats, strict=True)
    return Measurement.of([first / second for first, second in pairs])


def scaled(measurement: Measurement, function: Callable[[float], float]) -> Measurement:
    """Apply a function to every repeat, for example to turn seconds into clips per second."""
    return Measurement.of([function(value) for value in measurement.repeats])


@dataclass(frozen=True)
class PeakMemory:
    """Peak memory of a run in bytes.

    Attributes:
        of_run: Memory in addition to that at the start of the run: results and intermediate values.
        in_all: Memory in addition to that of the bare process: weights and inputs, too.
    """

    of_run: int
    in_all: int


def peak_memory(set_up: Callable[[], Callable[[], object]]) -> PeakMemory:
    """Measure the peak memory of the function that `set_up` returns, called once in a new process.

    In a new process, no earlier run has left memory that this one could reuse. The figure is resident memory on a CPU,
    and allocated memory on a GPU if the run uses one.

    Args:
        set_up: A module-level function (or a `functools.partial` of one), which the new process imports.

    Raises:
        RuntimeError: If the new process fails.
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
            f"The process whose memory is measured ended with exit code {process.exitcode}; its error is above "
            "(-9: out of memory)."
        ) from None
    process.join()
    return PeakMemory(of_run, in_all)


def _measure_peak(set_up: Callable[[], Callable[[], object]], num_threads: int, sender: Any) -> None:
    torch.set_num_threads(num_threads)
    bare = _status_bytes("VmRSS")
    run = set_up()
    uses_cuda = torch.cuda.is_available() and torch.cuda.memory_allocated() > 0
    if uses_cuda:
        bare = 0
    device = torch.device("cuda" if uses_cuda else "cpu")
    before = reset_peak(device)
    run()
    peak = read_peak(device)
    sender.send((peak - before, peak - bare))


def reset_peak(device: torch.device) -> int:
    """Reset the peak of this process's memory on a device and return the bytes in use: allocated or resident ones."""
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    before = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's peak of this process
    return before


def read_peak(device: torch.device) -> int:
    """Return the largest number of bytes in use on a device since [`reset_peak`]."""
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    """Read a memory figure of this process from the Linux kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; memory is measured on Linux.")


def process_age() -> float:
    """Return the seconds since this process started, imports included, from the Linux kernel."""
    # The program's name, in parentheses, may contain spaces. The start time is field 22.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return uptime - int(fields[19]) / os.sysconf("SC_CLK_TCK")

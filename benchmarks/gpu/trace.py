"""Traces of a run: its dearest kernels, the idle share of the device, and a file for a trace viewer."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.measurement import synchronize

TOP_KERNELS = 10
# Names of generated kernels and of templates can fill a page.
NAME_LENGTH = 100


@dataclass(frozen=True)
class Trace:
    """Summary of a trace.

    Attributes:
        kernels: Seconds of each kernel over all calls, by name. On a CPU the kernels are torch's operators.
        seconds: From the start of the first kernel to the end of the last.
        busy_seconds: Time of these in which at least one kernel ran.
        calls: Traced calls.
    """

    kernels: Counter[str]
    seconds: float
    busy_seconds: float
    calls: int

    @property
    def idle_share(self) -> float:
        return 1 - self.busy_seconds / self.seconds

    def shares(self) -> dict[str, float]:
        """Return the dearest kernels' shares of the time of all kernels, the dearest first."""
        total = self.kernels.total()
        return {name: seconds / total for name, seconds in self.kernels.most_common(TOP_KERNELS)}

    def as_text(self, what: str) -> str:
        lines = [
            f"{what}: {1000 * self.seconds / self.calls:.3g} ms a call under the profiler, "
            f"{1000 * self.kernels.total() / self.calls:.3g} ms of kernels, idle share {self.idle_share:.3f}",
            "share of the kernels' time | ms a call | kernel",
        ]
        for name, share in self.shares().items():
            milliseconds = 1000 * self.kernels[name] / self.calls
            lines.append(f"{share:.3f} | {milliseconds:.3f} | {name[:NAME_LENGTH]}")
        return "\n".join(lines) + "\n"


def trace(run: Callable[[], object], calls: int, device: torch.device, path: Path) -> Trace:
    """Trace calls of a function that has been warmed up.

    Args:
        run: The function.
        calls: Number of calls.
        device: Device that it uses.
        path: File for Chrome's trace viewer or Perfetto to write, ending in .json.gz.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        for _ in range(calls):
            run()
        synchronize(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    # Annotations are ranges around kernels, not kernels.
    events = [event for event in profiler.events() or () if event.device_type == kind and not event.is_user_annotation]
    kernels: Counter[str] = Counter()
    for event in events:
        kernels[event.name] += (event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total) / 1e6
    ranges = [(event.time_range.start / 1e6, event.time_range.end / 1e6) for event in events]
    seconds = max(end for _, end in ranges) - min(start for start, _ in ranges)
    return Trace(kernels, seconds, covered(ranges), calls)


def covered(ranges: Iterable[tuple[float, float]]) -> float:
    """Return the length of the union of ranges (start, end), so that overlapping kernels count once."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(ranges):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total

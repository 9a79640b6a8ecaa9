"""Work ahead in threads, results in order: so that a model never waits for what decoders can do meanwhile."""

import os
import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Output = TypeVar("Output")

# More threads than this only take turns at Python's lock.
MAX_THREADS = 16
# Outputs of one item that may wait. Recordings of hours must not pile up in memory.
OUTPUTS_AHEAD = 8
# How often a thread that cannot go on looks whether it is still wanted.
POLL_SECONDS = 0.1


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefetch(items: Iterable[Item], produce: Callable[[Item], Iterable[Output]], items_ahead: int) -> Iterator[Output]:
    """All outputs of the first item, then those of the second, and so on; threads work on the next items meanwhile.

    Args:
        items: Iterated in a thread of its own.
        produce: Called once for each item, in several threads at a time. What it raises is raised here, in its turn.
        items_ahead: How many items may wait or be worked on.
    """
    stop = threading.Event()
    waiting: queue.Queue = queue.Queue(items_ahead)
    tasks: queue.SimpleQueue = queue.SimpleQueue()

    def put(target: queue.Queue, value: Any) -> bool:
        while not stop.is_set():
            try:
                target.put(value, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                pass
        return False

    def forward(values: Iterable, target: queue.Queue) -> None:
        """Ends with a pair that no value is: a marker and what went wrong, if anything did."""
        error = None
        try:
            for value in values:
                if not put(target, (value,)):
                    return
        except BaseException as raised:
            error = raised
        put(target, (None, error))

    def work() -> None:
        # Each thread works on an item of its own; torch's own threads would only contend for the same cores.
        torch.set_num_threads(1)
        while (task := tasks.get()) is not None:
            item, outputs = task
            forward(produce(item), outputs)

    def hand_out() -> Iterator[queue.Queue]:
        for item in items:
            outputs: queue.Queue = queue.Queue(OUTPUTS_AHEAD)
            tasks.put((item, outputs))
            yield outputs

    def drain(source: queue.Queue) -> Iterator[Any]:
        while True:
            value, *end = source.get()
            if not end:
                yield value
            elif end[0] is not None:
                raise end[0]
            else:
                return

    threads_before = torch.get_num_threads()
    # Not those of concurrent.futures, for which a program waits that ends before it has seen all outputs.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(MAX_THREADS, available_cores()))]
    threads.append(threading.Thread(target=lambda: forward(hand_out(), waiting), daemon=True))
    for thread in threads:
        thread.start()
    try:
        for outputs in drain(waiting):
            yield from drain(outputs)
    finally:
        stop.set()
        for _ in threads:
            tasks.put(None)
        for thread in threads:
            thread.join()
        # What a thread sets for itself is also the default of threads to come.
        torch.set_num_threads(threads_before)

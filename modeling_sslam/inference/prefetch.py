"""Threads that work ahead and return results in order, so that a model need not wait for decoders."""

import os
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Output = TypeVar("Output")

# More threads than this only contend for the global interpreter lock.
MAX_THREADS = 16
# Outputs of one item that may wait. The limit keeps recordings of hours from filling the memory.
OUTPUTS_AHEAD = 8
# Interval at which a blocked thread checks whether it must stop.
POLL_SECONDS = 0.1


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prefetch(
    items: Iterable[Item], produce: Callable[[Item], Iterable[Output]], items_ahead: int
) -> Generator[Output, None, None]:
    """Yield all outputs of the first item, then those of the second, and so on, while threads work on later items.

    Args:
        items: Iterated in a thread of its own.
        produce: Called once for each item, in several threads at a time.
        items_ahead: Number of items that may wait or be worked on.

    Raises:
        BaseException: Any error of `items` or `produce`, after the outputs that come before it.
    """
    stop = threading.Event()
    waiting: queue.Queue = queue.Queue(items_ahead)
    tasks: queue.SimpleQueue = queue.SimpleQueue()

    def put(target: queue.Queue, value: Any) -> bool:
        """Put a value when there is room. Return False if the consumer has stopped before."""
        while not stop.is_set():
            try:
                target.put(value, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                pass
        return False

    def forward(values: Iterable, target: queue.Queue) -> None:
        """Put each value as a 1-tuple and, at the end, a pair: `None` and the error, if there was one."""
        error = None
        try:
            for value in values:
                if not put(target, (value,)):
                    return
        except BaseException as raised:
            error = raised
        put(target, (None, error))

    def work() -> None:
        # Each of these threads works on an item of its own, so torch's threads would only contend for the same cores.
        torch.set_num_threads(1)
        while (task := tasks.get()) is not None:
            item, outputs = task
            forward(produce(item), outputs)

    def hand_out() -> Iterator[queue.Queue]:
        """Give each item to a thread, and yield the queue of its outputs."""
        for item in items:
            outputs: queue.Queue = queue.Queue(OUTPUTS_AHEAD)
            tasks.put((item, outputs))
            yield outputs

    def drain(source: queue.Queue) -> Iterator[Any]:
        """Yield the values that `forward` puts, and raise its error."""
        while True:
            value, *end = source.get()
            if not end:
                yield value
            elif end[0] is not None:
                raise end[0]
            else:
                return

    threads_before = torch.get_num_threads()
    # Use daemon threads, because a program that ends early would wait for threads of concurrent.futures.
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
        # Restore the number, because set_num_threads in a thread also sets the default of later threads.
        torch.set_num_threads(threads_before)

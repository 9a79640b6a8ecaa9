"""A parallel map over processes that keeps the order of results."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    num_processes: int,
    initializer: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """Apply a function in several processes and yield the results in order.

    Args:
        function: The function. It must be picklable.
        items: Its arguments.
        num_processes: Number of processes. With 1 or less, this process does the work.
        initializer: Called once in each process.
        arguments: Arguments of `initializer`.
    """
    if num_processes <= 1:
        if initializer is not None:
            initializer(*arguments)
        yield from map(function, items)
        return
    context = get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, context, initializer, arguments)
    try:
        yield from pool.map(function, items, chunksize=8)
    finally:
        # After an interruption, this waits only for running chunks and cancels all others.
        pool.shutdown(cancel_futures=True)

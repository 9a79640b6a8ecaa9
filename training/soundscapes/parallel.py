"""Work in several processes, with results in order."""

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
        function: The function, which can be pickled.
        items: Its arguments.
        num_processes: Number of processes; at most 1 for this process alone.
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
        # After an interruption this waits for the chunks in work alone, even if others were still being submitted.
        pool.shutdown(cancel_futures=True)

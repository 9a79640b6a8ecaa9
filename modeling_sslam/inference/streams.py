"""Copies and filter banks on a GPU beside the model, on streams of their own; without effect on other devices."""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager, closing, nullcontext
from typing import Any, TypeVar

import torch

from .prefetch import prefetch

Item = TypeVar("Item")
Output = TypeVar("Output")


class SideStreams:
    """A stream for each thread that prepares a model's inputs, so that its kernels run beside the model's.

    Args:
        device: Device of the model. On any other than a GPU with CUDA all methods do nothing.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._of_thread = threading.local()

    def use(self) -> AbstractContextManager[Any]:
        """Return a context whose kernels and copies run on the calling thread's stream."""
        if not self._is_cuda:
            return nullcontext()
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._of_thread.stream)

    def mark(self) -> Any:
        """Return an event at which all work so far of the current stream is done, or None."""
        if not self._is_cuda:
            return None
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def receive(self, event: Any, tensors: Iterable[torch.Tensor]) -> None:
        """Let the current stream wait for an event before it reads tensors. The CPU does not wait.

        Memory belongs to the stream that allocated it. Recording the reader keeps that stream from reusing the memory
        while the reader's kernels still run.
        """
        if not self._is_cuda:
            return
        reader = torch.cuda.current_stream(self._device)
        reader.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(reader)


def prefetch_beside(
    items: Iterable[Item],
    produce: Callable[[Item], Iterable[Output]],
    items_ahead: int,
    device: torch.device,
    tensors_of: Callable[[Output], Iterable[torch.Tensor]],
) -> Generator[Output, None, None]:
    """Apply [`prefetch`], with the threads' kernels beside those of the thread that consumes the outputs.

    Args:
        items: See [`prefetch`].
        produce: See [`prefetch`]. It runs on the thread's own stream.
        items_ahead: See [`prefetch`].
        device: Device of the tensors.
        tensors_of: Returns the tensors of an output that are on the device.
    """
    streams = SideStreams(device)

    def produce_and_mark(item: Item) -> Iterator[tuple[Output, Any]]:
        outputs = iter(produce(item))
        while True:
            with streams.use():
                try:
                    output = next(outputs)
                except StopIteration:
                    return
                event = streams.mark()
            yield output, event

    with closing(prefetch(items, produce_and_mark, items_ahead)) as produced:
        for output, event in produced:
            streams.receive(event, tensors_of(output))
            yield output

"""Work on side streams: nothing changes on the CPU, and on a GPU readers wait for writers."""

import threading
from contextlib import contextmanager

import pytest
import torch

from modeling_sslam.inference.streams import SideStreams, prefetch_beside

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def produce(item: int):
    for number in range(3):
        yield torch.tensor([item, number])


def test_outputs_on_the_cpu_are_those_of_prefetch():
    outputs = prefetch_beside(range(4), produce, 2, CPU, lambda tensor: [tensor])
    assert [tensor.tolist() for tensor in outputs] == [[item, number] for item in range(4) for number in range(3)]


def test_errors_come_after_earlier_outputs():
    def fail(item: int):
        yield torch.tensor(item)
        raise KeyError("broken")

    outputs = prefetch_beside([7], fail, 1, CPU, lambda tensor: [tensor])
    assert next(outputs) == 7
    with pytest.raises(KeyError, match="broken"):
        next(outputs)


def test_no_stream_is_made_on_the_cpu():
    streams = SideStreams(CPU)
    with streams.use():
        assert streams.mark() is None
    streams.receive(None, [torch.zeros(1)])


class Recorder:
    """Stands for `torch.cuda` and records the order of its calls by thread."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.current = threading.local()
        self.main = self.make_stream(None)

    def make_stream(self, device):
        recorder = self

        class Stream:
            def wait_event(self, event) -> None:
                recorder.calls.append(("wait", self, event))

        return Stream()

    def make_event(self):
        recorder = self

        class Event:
            def record(self, stream) -> None:
                recorder.calls.append(("record", stream, self))

        return Event()

    @contextmanager
    def stream(self, stream):
        self.current.stream = stream
        yield
        del self.current.stream

    def current_stream(self, device):
        return getattr(self.current, "stream", self.main)


def test_a_reader_on_a_gpu_waits_for_the_writer_and_keeps_the_memory(monkeypatch):
    recorder, used_in, kept = Recorder(), [], []
    replacements = {
        "Stream": recorder.make_stream,
        "Event": recorder.make_event,
        "stream": recorder.stream,
        "current_stream": recorder.current_stream,
    }
    for name, replacement in replacements.items():
        monkeypatch.setattr(torch.cuda, name, replacement)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append((tensor.tolist(), stream)))

    def produce_on_stream(item: int):
        for tensor in produce(item):
            used_in.append(recorder.current_stream(None))
            yield tensor

    outputs = list(prefetch_beside([5], produce_on_stream, 1, GPU, lambda tensor: [tensor]))
    (side,) = set(used_in)  # one thread works on an item, and a thread has one stream
    assert side is not recorder.main
    records = [call for call in recorder.calls if call[0] == "record"]
    waits = [call for call in recorder.calls if call[0] == "wait"]
    assert [stream for _, stream, _ in records] == [side] * 3
    assert [stream for _, stream, _ in waits] == [recorder.main] * 3
    assert [event for _, _, event in waits] == [event for _, _, event in records]
    assert kept == [(tensor.tolist(), recorder.main) for tensor in outputs]

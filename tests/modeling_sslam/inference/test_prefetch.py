"""Threads that work ahead: results keep their order, errors their place, and no thread is left."""

import threading
import time

import numpy as np
import pytest
import torch

from modeling_sslam.inference.prefetch import OUTPUTS_AHEAD, prefetch


def test_outputs_come_in_the_order_of_the_items():
    pauses = np.random.default_rng(0).uniform(0, 0.01, 30)

    def produce(item):
        for part in range(item % 4):
            time.sleep(pauses[item])
            yield item, part

    expected = [(item, part) for item in range(30) for part in range(item % 4)]
    assert list(prefetch(range(30), produce, items_ahead=5)) == expected


def test_work_is_done_ahead_but_not_without_bound():
    begun, produced = [], []

    def produce(item):
        begun.append(item)
        for part in range(1000):
            produced.append(part)
            yield part

    outputs = prefetch(range(100), produce, items_ahead=3)
    next(outputs)
    deadline = time.monotonic() + 60
    while len(begun) < 2 and len(produced) < 2:
        assert time.monotonic() < deadline, "no work is done ahead"
        time.sleep(0.01)
    # Work without a bound would go on meanwhile.
    time.sleep(0.3)
    # One item is being read, three wait, and one more waits for room.
    assert len(begun) <= 5
    assert len(produced) <= len(begun) * (OUTPUTS_AHEAD + 1) + 1
    outputs.close()


@pytest.mark.parametrize("place", ["item", "output"])
def test_errors_come_after_earlier_outputs(place):
    def items():
        yield from (1, 2, 3)
        if place == "item":
            raise ValueError("no more items")

    def produce(item):
        yield item
        if place == "output" and item == 3:
            raise ValueError("no more outputs")

    found = []
    with pytest.raises(ValueError, match=f"no more {place}s"):  # noqa: PT012 - raised in the middle of the loop
        for output in prefetch(items(), produce, 2):
            found.append(output)
    assert found == [1, 2, 3]


def test_threads_end_with_the_iteration():
    # Threads that other tests left may end meanwhile.
    others, torch_threads = set(threading.enumerate()), torch.get_num_threads()
    outputs = prefetch(range(100), lambda item: iter(lambda: item, None), items_ahead=3)
    assert next(outputs) == 0
    # A program that ends without closing the iterator must not wait for the threads.
    started = set(threading.enumerate()) - others
    assert {thread.daemon for thread in started} == {True}
    outputs.close()
    assert not any(thread.is_alive() for thread in started)
    assert torch.get_num_threads() == torch_threads

"""A graceful stop: signals are requests, and data workers leave them to their parent."""

import os
import signal
import subprocess
import sys

import pytest

from modeling_sslam.common.signals import StopRequest

# The parent forks a worker, lets another process send it both signals, and then sends one itself.
WORKER = """
import os, signal, subprocess, time
from modeling_sslam.common.signals import StopRequest

with StopRequest() as stop:
    ready, started = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(started, b"x")
        time.sleep(60)
        os._exit(1)
    os.read(ready, 1)
    for name in ("INT", "TERM"):
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)
    time.sleep(0.3)
    print("alive", os.waitpid(worker, os.WNOHANG) == (0, 0))
    os.kill(worker, signal.SIGTERM)
    print("status", os.waitpid(worker, 0)[1], stop.requested)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request(number):
    before = [signal.getsignal(other) for other in StopRequest.SIGNALS]
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
    assert [signal.getsignal(other) for other in StopRequest.SIGNALS] == before


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_later_sigint_aborts(first):
    with StopRequest():
        os.kill(os.getpid(), first)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_abort_is_the_callers_choice():
    aborted = []
    with StopRequest(abort=lambda: aborted.append(True)) as stop:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
    assert stop.requested
    assert aborted == [True]


def test_a_later_sigterm_does_not_abort():
    with StopRequest() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_workers_obey_only_their_parent(repository):
    done = subprocess.run([sys.executable, "-c", WORKER], cwd=repository, capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines() == ["alive True", "status 0 False"], done.stderr

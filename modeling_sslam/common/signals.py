"""Graceful stop on SIGINT and SIGTERM."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

INTERRUPTED = 130  # 128 + SIGINT, the exit status that shells report


def interrupt() -> None:
    """Raise KeyboardInterrupt."""
    raise KeyboardInterrupt


class StopRequest:
    """Context in which SIGTERM and SIGINT set `requested` instead of ending the process.

    Data workers forked in the context ignore both signals unless their parent sends them. Terminals and launchers
    signal the whole process group, but the current update still needs its batches.

    Args:
        abort: Called on a SIGINT after the first signal.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self, abort: Callable[[], Any] = interrupt) -> None:
        self.requested = False
        self._abort = abort
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in self.SIGNALS}
        os.register_at_fork(after_in_child=self._shield)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _shield(self) -> None:
        # Python cannot unregister this function, so it must do nothing outside the context.
        if self._before:
            signal.pthread_sigmask(signal.SIG_BLOCK, self.SIGNALS)
            threading.Thread(target=self._obey_parent, daemon=True).start()

    def _obey_parent(self) -> None:
        while signal.sigwaitinfo(self.SIGNALS).si_pid != os.getppid():
            pass
        os._exit(0)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # Launchers also send a SIGTERM for each Ctrl-C, so a second SIGTERM does not mean that the user asks again.
        if number == signal.SIGINT and self.requested:
            self._abort()
        self.requested = True

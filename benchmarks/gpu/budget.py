"""The time that a rented GPU may cost: measuring ends when it is used up."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from benchmarks.measurement import process_age


class OutOfTimeError(BaseException):
    """The budget is used up. Not an Exception, because torch's compiler wraps those in errors of its own."""


class Budget:
    """Minutes since the start of this process, imports included."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() - process_age() + 60 * minutes

    @contextmanager
    def limit(self) -> Iterator[None]:
        """Interrupt the body when the budget is used up.

        The interruption comes between two instructions of Python in the main thread, so a backward pass that compiles
        or waits for the device is finished first.

        Raises:
            OutOfTimeError: At once if the budget is used up already, or else in the body.
        """
        left = self.end - time.monotonic()
        if left <= 0:
            raise OutOfTimeError
        before = signal.signal(signal.SIGALRM, _interrupt)
        signal.setitimer(signal.ITIMER_REAL, left)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise OutOfTimeError

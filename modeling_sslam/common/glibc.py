"""Settings of glibc's memory allocator. On other C libraries these do nothing."""

import ctypes
import sys
import time

# malloc.h: the free memory at the heap's end that is kept, and the mmap threshold (32 MiB, the largest that glibc
# accepts).
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 1 << 30
M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES = -3, 1 << 25
# A trim takes about 20 ms, so this costs at most 0.4 % of the time.
TRIM_SECONDS = 5.0


def _glibc_function(name: str) -> "ctypes._FuncPointer | None":
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees.

    A training step on a CPU asks for the memory that the previous step freed. By default glibc returns it to the
    system, which zeroes every page on its next first touch: 1 to 9 % of a step's time (benchmarks/NOTES.md).
    """
    mallopt = _glibc_function("mallopt")
    if mallopt is not None:
        # Set both, because setting one stops glibc from adapting the other.
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, HEAP_BLOCK_BYTES)


class MemoryTrimmer:
    """Return free memory to the system from time to time.

    Tensors lie at aligned addresses, and glibc before 2.38 rarely reuses the remainders of such blocks (glibc bug
    14581): a process that creates and drops tensors for hours grows without holding any of them. Measured on glibc
    2.36 with a tiny model: 817 MB for one minute of audio; for ten hours 1111 MB without trimming, 895 MB with it.
    """

    def __init__(self) -> None:
        self._trim = _glibc_function("malloc_trim")
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Trim if the last trim is long enough ago. Call it as often as convenient."""
        if self._trim is not None and time.monotonic() - self._last >= TRIM_SECONDS:
            self._trim(0)
            self._last = time.monotonic()

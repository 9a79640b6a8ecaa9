"""Memory that a training process keeps for its next step."""

import ctypes
import sys

# Of glibc's malloc.h, and what they are set to: free memory at the heap's end that is kept, and the size from which a
# piece is the system's own business (32 MiB, the largest that glibc takes).
M_TRIM_THRESHOLD, KEPT_BYTES = -1, 1 << 30
M_MMAP_THRESHOLD, LARGEST_OF_HEAP = -3, 1 << 25


def keep_freed_memory() -> None:
    """Has this process keep what it frees, where the C library is glibc.

    A step on a CPU asks for the memory that the step before it freed. By default glibc hands that back to the system
    piece by piece, which clears every page anew before its next use: 1 to 9 % of a step's time (benchmarks/NOTES.md).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        # Both, since setting one of them stops glibc from adapting the other.
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        mallopt(M_MMAP_THRESHOLD, LARGEST_OF_HEAP)

"""Random numbers that depend neither on earlier draws nor on the process."""

import hashlib

import numpy as np


def generator_for(*key: int | str) -> np.random.Generator:
    """Return a generator that depends on its key alone: numbers of at least 0, and names."""
    words = [
        part
        if isinstance(part, int)
        else int.from_bytes(hashlib.blake2b(part.encode(), digest_size=16).digest(), "little")
        for part in key
    ]
    return np.random.default_rng(words)

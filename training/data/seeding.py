"""Random numbers that do not depend on what was drawn before, nor in which process."""

import hashlib

import numpy as np


def generator_for(*key: int | str) -> np.random.Generator:
    """A generator that is a function of its key alone: numbers at least 0, and names."""
    words = [
        part
        if isinstance(part, int)
        else int.from_bytes(hashlib.blake2b(part.encode(), digest_size=16).digest(), "little")
        for part in key
    ]
    return np.random.default_rng(words)

"""Encoding of clips."""

import io

import numpy as np
import soundfile


def encode_flac(waveform: np.ndarray, rate: int) -> bytes:
    """Encode a waveform as a FLAC file with 16 bits per sample."""
    file = io.BytesIO()
    soundfile.write(file, waveform, rate, format="FLAC", subtype="PCM_16")
    return file.getvalue()

"""Comparison of the clips' lengths with the length that an encoder reads."""

from itertools import islice
from pathlib import Path
from statistics import median

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor
from modeling_sslam.common.decoding import duration_seconds
from training.data.sources import Source

# Clips whose lengths are looked up.
MAX_CLIPS = 64
# A smaller share of sound in the input, or of the clip in it, is worth a warning.
LEAST_SHARE = 0.75


def typical_seconds(source: Source) -> float | None:
    """Return the median length of the first clips by their headers.

    `None` if it is unknown, if scenes are mixed to the encoder's length, or if clips would have to be downloaded.
    """
    if source.mixer is not None or not Path(source.config.source).expanduser().exists():
        return None
    audio = (source.audio(row) for row in islice(source.rows([source.columns.audio]), MAX_CLIPS))
    files = (path if encoded is None else encoded for encoded, path in audio)
    lengths = (duration_seconds(file) for file in files if file is not None)
    known = [length for length in lengths if length]
    return median(known) if known else None


def length_advice(seconds: float, feature_extractor: SSLAMFeatureExtractor, config: SSLAMConfig) -> str | None:
    """Return a warning if an encoder reads much less or much more than a clip, or `None`.

    Args:
        seconds: Length of a typical clip.
        feature_extractor: Crops or pads clips to its `max_length` frames.
        config: The encoder's configuration, which limits that length.
    """
    rate, patch = feature_extractor.sampling_rate, config.patch_size
    read = feature_extractor.num_samples(feature_extractor.max_length) / rate
    frames = feature_extractor.num_frames(max(feature_extractor.frame_length, round(seconds * rate)))
    wanted = min(max(1, round(frames / patch)), config.max_position_embeddings) * patch
    if wanted == feature_extractor.max_length or LEAST_SHARE <= seconds / read <= 1 / LEAST_SHARE:
        return None
    rest = "the rest is not used" if seconds > read else "the rest of its input is padding"
    return (
        f"A typical clip has {seconds:.2f} s and the encoder reads {read:.2f} s: {rest}. "
        f"--features.max_length {wanted} fits the clips."
    )

"""Warning if clips are much longer or shorter than the input of an encoder."""

from itertools import islice
from pathlib import Path
from statistics import median

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor
from modeling_sslam.common.decoding import duration_seconds
from training.data.sources import Source

# Number of clips whose lengths are read.
MAX_CLIPS = 64
# A warning follows if less than this share of the clip is read, or if less than this share of the input is sound.
LEAST_SHARE = 0.75


def typical_seconds(source: Source) -> float | None:
    """Return the median length of the first clips in seconds, from their headers.

    The result is `None` if no length is known, if scenes are mixed to the encoder's length, or if clips would have to
    be downloaded.
    """
    if source.mixer is not None or not Path(source.config.source).expanduser().exists():
        return None
    audio = (source.audio(row) for row in islice(source.rows([source.columns.audio]), MAX_CLIPS))
    sounds = (path if encoded is None else encoded for encoded, path in audio)
    lengths = (duration_seconds(sound) for sound in sounds if sound)
    known = [length for length in lengths if length]
    return median(known) if known else None


def length_advice(seconds: float, feature_extractor: SSLAMFeatureExtractor, config: SSLAMConfig) -> str | None:
    """Return a warning if an encoder's input is much shorter or longer than a clip, else `None`.

    Args:
        seconds: Length of a typical clip.
        feature_extractor: Crops or pads clips to its `max_length` frames.
        config: The encoder's configuration, which limits `max_length`.
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
        f"Set --features.max_length {wanted} to fit the clips."
    )

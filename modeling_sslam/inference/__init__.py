"""Long recordings and large collections, from Python and (`python -m modeling_sslam`) from the command line.

[`SSLAMTagger`] says what sounds in recordings and when; [`embed`] gives their embeddings. Importing this package also
registers timelines as a pipeline of transformers, "long-audio-classification". Needs `pip install
"modeling-sslam[inference]"`.
"""

from .audio import ClipError, stream_blocks
from .cpu import optimize_for_cpu
from .embedding import ClipEmbedding, Embedder, embed
from .errors import InferenceError
from .events import Event, EventSettings
from .pipeline import LongAudioClassificationPipeline
from .tagger import SSLAMTagger
from .timelines import Timeline

__all__ = [
    "ClipEmbedding",
    "ClipError",
    "Embedder",
    "Event",
    "EventSettings",
    "InferenceError",
    "LongAudioClassificationPipeline",
    "SSLAMTagger",
    "Timeline",
    "embed",
    "optimize_for_cpu",
    "stream_blocks",
]

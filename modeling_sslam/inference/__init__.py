"""Long recordings and large collections, from Python and (`python -m modeling_sslam`) from the command line.

[`SSLAMTagger`] says what sounds in recordings and when; [`embed`] gives their embeddings. Importing this package also
registers timelines as a pipeline of transformers, "long-audio-classification". Needs `pip install
"modeling-sslam[inference]"`.
"""

from ..common.audio import stream_blocks
from ..common.errors import ClipError, InferenceError
from .embedding.embedder import ClipEmbedding, Embedder, embed
from .packed_blocks import optimize_for_cpu
from .pipeline import LongAudioClassificationPipeline
from .tagger import SSLAMTagger
from .timeline.events import Event, EventSettings
from .timeline.timeline import Timeline

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

"""Long recordings and large collections, from Python and (`python -m modeling_sslam`) from the command line.

[`SSLAMTagger`] says what sounds in recordings and when. Importing this package also registers the same as a pipeline
of transformers, "long-audio-classification". Needs `pip install "modeling-sslam[inference]"`.
"""

from .audio import ClipError, stream_blocks
from .errors import InferenceError
from .events import Event, EventSettings
from .pipeline import LongAudioClassificationPipeline
from .tagger import SSLAMTagger
from .timelines import Timeline

__all__ = [
    "ClipError",
    "Event",
    "EventSettings",
    "InferenceError",
    "LongAudioClassificationPipeline",
    "SSLAMTagger",
    "Timeline",
    "stream_blocks",
]

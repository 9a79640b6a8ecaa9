"""Inference on long recordings and large collections of sounds.

[`SSLAMTagger`] names the sounds in recordings and locates them in time. [`embed`] computes embeddings. The command
`sslam` is built on this package. Importing it makes `pipeline("long-audio-classification")` of transformers available.

Requires `pip install "modeling-sslam[inference]"`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..after_import import after_import

if TYPE_CHECKING:
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

# Names are imported when they are first used, because `sslam --help` needs neither torch nor transformers.
_MODULES = {
    "ClipEmbedding": ".embedding.embedder",
    "ClipError": "..common.errors",
    "Embedder": ".embedding.embedder",
    "Event": ".timeline.events",
    "EventSettings": ".timeline.events",
    "InferenceError": "..common.errors",
    "LongAudioClassificationPipeline": ".pipeline",
    "SSLAMTagger": ".tagger",
    "Timeline": ".timeline.timeline",
    "embed": ".embedding.embedder",
    "optimize_for_cpu": ".packed_blocks",
    "stream_blocks": "..common.audio",
}

# The module registers its task with transformers.
after_import("transformers.pipelines", lambda: import_module(".pipeline", __name__))


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULES[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Long recordings and large collections, from Python and (`python -m modeling_sslam`) from the command line.

[`SSLAMTagger`] says what sounds in recordings and when; [`embed`] gives their embeddings. Needs `pip install
"modeling-sslam[inference]"`.
"""

from .audio import ClipError, stream_blocks
from .embedding import ClipEmbedding, Embedder, embed
from .errors import InferenceError
from .tagger import SSLAMTagger

__all__ = ["ClipEmbedding", "ClipError", "Embedder", "InferenceError", "SSLAMTagger", "embed", "stream_blocks"]

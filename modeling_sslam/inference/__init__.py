"""Long recordings and large collections, from Python and (`python -m modeling_sslam`) from the command line.

[`SSLAMTagger`] says what sounds in recordings and when. Needs `pip install "modeling-sslam[inference]"`.
"""

from .audio import ClipError, stream_blocks
from .errors import InferenceError
from .tagger import SSLAMTagger

__all__ = ["ClipError", "InferenceError", "SSLAMTagger", "stream_blocks"]

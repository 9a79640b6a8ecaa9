"""The page of `sslam app` as a Hugging Face Space; README.md explains how to make one."""

import os
from pathlib import Path

from modeling_sslam.common.recordings import find_recordings
from modeling_sslam.inference import SSLAMTagger
from modeling_sslam.inference.commands.app import MAX_MEGABYTES
from modeling_sslam.inference.commands.app.listening import Listener
from modeling_sslam.inference.commands.app.page import make_page, serve

HERE = Path(__file__).parent
# OWNER/NAME on the Hub, or a folder beside this file.
MODEL = os.environ.get("SSLAM_MODEL", str(HERE / "model"))
# Longest sound. A Space without a GPU has only two cores.
MAX_MINUTES = 3
EXAMPLES = HERE / "examples"

tagger = SSLAMTagger.from_pretrained(MODEL)
examples = find_recordings([str(EXAMPLES)]) if EXAMPLES.is_dir() else []
page = make_page(Listener(tagger, MAX_MINUTES), Path(MODEL).name, examples)

if __name__ == "__main__":
    serve(page, MAX_MEGABYTES)

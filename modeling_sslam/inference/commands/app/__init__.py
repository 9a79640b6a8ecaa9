"""`sslam app`: a page in the browser that listens. Gradio is imported when it is served, and not before."""

import argparse
from pathlib import Path

from ....common.errors import InferenceError
from ....common.recordings import find_recordings
from ...tagger import SSLAMTagger
from ..arguments import add_model_arguments, positive_int
from .listening import Listener

# Ten minutes take a base model on a CPU a few minutes, for which a visitor may wait and nobody else is served.
MAX_MINUTES = 10
# Ten minutes of stereo at 48 kHz and 24 bits.
MAX_MEGABYTES = 180
LOOPBACK = "127.0.0.1"

DESCRIPTION = """\
Serves a page to the browser: upload or record a sound; see its spectrogram with the events on it and the top labels;
play it and watch the cursor go over the picture; compare two sounds by their embeddings. Nothing leaves this machine.
"""
EXAMPLES = """\
examples:
  sslam app --model sslam-as2m
  sslam app --model sslam-as2m --examples recordings/ --max-minutes 30
  sslam app --model sslam-as2m --host 0.0.0.0 --port 8080      # for everyone who can reach this machine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    add_model_arguments(parser)
    parser.add_argument("--examples", metavar="DIR", help="folder of sounds that the page offers to try")
    parser.add_argument(
        "--max-minutes",
        type=positive_int,
        default=MAX_MINUTES,
        metavar="N",
        help=f"longest sound to take (default: {MAX_MINUTES})",
    )
    parser.add_argument(
        "--max-megabytes",
        type=positive_int,
        default=MAX_MEGABYTES,
        metavar="N",
        help=f"largest file to take (default: {MAX_MEGABYTES})",
    )
    address = parser.add_argument_group("address")
    address.add_argument(
        "--host", default=LOOPBACK, help=f"address to listen at (default: {LOOPBACK}, this machine alone)"
    )
    address.add_argument("--port", type=positive_int, help="default: the first free one from 7860 on")
    address.add_argument(
        "--share", action="store_true", help="also make a public address by way of Gradio's servers, for 72 hours"
    )


def run(args: argparse.Namespace) -> int:
    examples = find_recordings([args.examples]) if args.examples else []
    try:
        from .page import make_page, serve
    except ModuleNotFoundError as error:
        raise InferenceError(f'{error}: the page needs pip install "modeling-sslam[app]".') from error

    tagger = SSLAMTagger.from_pretrained(args.model, args.device, args.dtype, args.batch_size, args.revision)
    page = make_page(Listener(tagger, args.max_minutes), Path(args.model).resolve().name, examples)
    serve(page, args.max_megabytes, args.host, args.port, args.share)
    return 0

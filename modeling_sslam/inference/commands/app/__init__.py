"""`sslam app`: serve a page that analyses sounds in the browser."""

import argparse
from pathlib import Path

from ....common.errors import InferenceError
from ..arguments import add_model_arguments, positive_int

# On a CPU, a base model takes a few minutes for a recording of this length. Other visitors wait meanwhile.
MAX_MINUTES = 10
# Ten minutes of stereo at 48 kHz and 24 bits.
MAX_MEGABYTES = 180
LOOPBACK = "127.0.0.1"

SUMMARY = "Serve a page that analyses sounds in the browser."
DETAILS = """\
Visitors upload or record a sound and see its spectrogram, events and top labels. During playback, a cursor moves over
the picture. A second tab compares two sounds by their embeddings. The model and the sounds stay on this machine.
"""
EXAMPLES = """\
examples:
  sslam app --model ta012/SSLAM_AS2M_Finetuned
  sslam app --model ta012/SSLAM_AS2M_Finetuned --examples recordings/ --max-minutes 30
  sslam app --model ta012/SSLAM_AS2M_Finetuned --host 0.0.0.0 --port 8080    # for everyone in reach
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_model_arguments(parser)
    sounds = parser.add_argument_group("sounds")
    sounds.add_argument("--examples", metavar="DIR", help="folder of sounds that the page offers (default: none)")
    sounds.add_argument(
        "--max-minutes",
        type=positive_int,
        default=MAX_MINUTES,
        metavar="N",
        help=f"longest sound to accept, in minutes (default: {MAX_MINUTES})",
    )
    sounds.add_argument(
        "--max-megabytes",
        type=positive_int,
        default=MAX_MEGABYTES,
        metavar="N",
        help=f"largest file to accept, in megabytes (default: {MAX_MEGABYTES})",
    )
    address = parser.add_argument_group("address")
    address.add_argument(
        "--host", default=LOOPBACK, help=f"address to listen on (default: {LOOPBACK}, this machine only)"
    )
    address.add_argument(
        "--port", type=positive_int, metavar="N", help="port to listen on (default: the first free one from 7860)"
    )
    address.add_argument(
        "--share",
        action="store_true",
        help="also create a public address, valid for 72 hours; it leads through Gradio's servers",
    )


def run(args: argparse.Namespace) -> int:
    """Serve the page until Ctrl-C or SIGTERM; return the exit status."""
    from ....common.recordings import find_recordings
    from ...tagger import SSLAMTagger
    from .listening import Listener

    examples = find_recordings([args.examples]) if args.examples else []
    try:
        from .page import make_page, serve
        from .protection import private_uploads
    except ModuleNotFoundError as error:
        raise InferenceError(f'{error.name} is not installed: pip install "modeling-sslam[app]"') from error

    tagger = SSLAMTagger.from_pretrained(args.model, args.device, args.dtype, args.batch_size, args.revision)
    with private_uploads():
        page = make_page(Listener(tagger, args.max_minutes), Path(args.model).resolve().name, examples)
        serve(page, args.max_megabytes, args.host, args.port, args.share)
    return 0

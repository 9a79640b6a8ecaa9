"""`sslam embed`: any number of sounds to a folder of Parquet with their embeddings."""

import argparse
import os
import sys

from ...common.signals import StopRequest
from .arguments import add_model_arguments, positive_int, positive_seconds

DESCRIPTION = """\
Embeds sound files, or a data set with an audio column, with an SSLAM or EAT encoder, and writes sharded Parquet that
datasets, pandas, DuckDB and the like read: the sound, start and end in seconds, and the vector. Recordings longer than
a window are cut into windows.

Interrupted in whatever way, the same command goes on where it was; once done, it embeds what has been added. Sounds
that cannot be used are listed in OUT/failures.csv, and the exit status is then 1.
"""
EXAMPLES = """\
examples:
  sslam embed recordings/ 'more/**/*.flac' --model sslam-base --out embeddings
  find /archive -name '*.wav' | sslam embed - --model sslam-base --out embeddings --pooling mean --dtype-out float16
  sslam embed OWNER/NAME --split test --model sslam-base --out embeddings
  accelerate launch --num_processes 4 -m modeling_sslam embed recordings/ --model sslam-base --out embeddings
"""
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def layer(text: str) -> int | str:
    if text.isdecimal():
        return int(text)
    if text not in ("last", "all", "mean"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither last, all, mean nor a number")
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="FILE|DIR|DATASET|-",
        help="sound files, folders of them, patterns, - for a list of files on standard input; or one data set: "
        "OWNER/NAME on the Hub, or a folder of parquet, arrow or WebDataset shards or of save_to_disk",
    )
    parser.add_argument("--out", required=True, help="folder to write, or to go on with")
    add_model_arguments(parser)
    what = parser.add_argument_group("what to embed")
    what.add_argument(
        "--pooling",
        choices=("cls", "mean", "frame", "patch"),
        default="cls",
        help="cls: the CLS token; mean: over the patches; frame: a vector every 160 ms; patch: one for every patch, 8 "
        "every 160 ms (default: cls)",
    )
    what.add_argument(
        "--layer",
        type=layer,
        default="last",
        help="number of a block (0: before the first), last, mean (over the blocks), or all: a row "
        "for each (default: last)",
    )
    what.add_argument(
        "--window", type=positive_seconds, metavar="S", help="seconds of a window (default: the model's, 10.24)"
    )
    what.add_argument(
        "--hop", type=positive_seconds, metavar="S", help="seconds from one window to the next (default: a window)"
    )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--dtype-out", choices=("float32", "float16"), default="float32", help="of the vectors (default: float32)"
    )
    output.add_argument(
        "--shard-rows", type=positive_int, metavar="N", help="rows of a Parquet file, about (default: 128 MB)"
    )
    data = parser.add_argument_group("data sets")
    data.add_argument("--config-name", help="configuration of a data set on the Hub")
    data.add_argument("--split", default="train", help="default: train")
    data.add_argument("--data-revision", help="branch, tag or commit of a data set on the Hub")
    data.add_argument("--audio-column", help="default: the only one there is")
    data.add_argument("--id-column", help="default: video_id, id or __key__, else the name of the audio file")


def run(args: argparse.Namespace) -> int:
    from ..embedding.embedder import Embedder
    from ..embedding.folder import Processes, embed_to_folder
    from ..embedding.sources import open_sources

    processes = Processes.find()
    sources = open_sources(
        args.sources,
        config_name=args.config_name,
        split=args.split,
        revision=args.data_revision,
        audio_column=args.audio_column,
        id_column=args.id_column,
    )
    embedder = Embedder.from_pretrained(
        args.model,
        device=processes.device if args.device == "auto" else args.device,
        dtype=args.dtype,
        revision=args.revision,
        pooling=args.pooling,
        layer=args.layer,
        window=args.window,
        hop=args.hop,
        batch_size=args.batch_size,
    )
    with StopRequest(abort=lambda: os._exit(INTERRUPTED)) as stop:
        summary = embed_to_folder(
            sources,
            args.out,
            embedder,
            model_id=args.model,
            dtype=args.dtype_out,
            shard_rows=args.shard_rows,
            should_stop=lambda: stop.requested,
            processes=processes,
        )
    if summary.stopped:
        print(f"Stopped; the same command goes on. {args.out} has what was embedded.", file=sys.stderr)
        return INTERRUPTED
    if processes.rank:
        return 0
    print(f"{args.out} holds the embeddings of {summary.num_sounds} sounds.", file=sys.stderr)
    if summary.num_failures:
        print(f"{summary.num_failures} sounds could not be used: see {args.out}/failures.csv.", file=sys.stderr)
    return 1 if summary.num_failures else 0

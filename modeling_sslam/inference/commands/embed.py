"""`sslam embed`: write the embeddings of any number of sounds to a folder of Parquet files."""

import argparse
import os
import sys

from ...common.signals import INTERRUPTED, StopRequest
from ...common.text import escape_controls
from ..embedding import EMBEDDING_POOLINGS
from .arguments import add_compile_argument, add_model_arguments, positive_int, positive_seconds

SUMMARY = "Write embeddings of sound files, or of a data set with an audio column, to a folder of Parquet files."
DETAILS = """\
Each row holds the name of the sound, start and end in seconds, and the vector. Recordings longer than a window are cut
into windows. datasets, pandas and DuckDB read the folder.

After an interruption, the same command continues. After it has finished, it embeds the sound files that were added or
changed (by size and time of change) and drops the old rows of the latter. Rows of files that no longer exist are
reported and stay, unless --prune drops them. Rows of a data set stay.
Sounds that cannot be used are listed in OUT/failures.csv, and every call tries them again; the exit status is then 1.
"""
EXAMPLES = """\
examples:
  sslam embed recordings/ 'more/**/*.flac' --model ta012/SSLAM_pretrain --out embeddings
  find /archive -name '*.wav' | sslam embed - --model ta012/SSLAM_pretrain --out embeddings --pooling mean
  sslam embed OWNER/NAME --split test --model ta012/SSLAM_pretrain --out embeddings
  accelerate launch --num_processes 4 -m modeling_sslam embed recordings/ --model ta012/SSLAM_pretrain --out embeddings
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="FILE|DIR|DATASET|-",
        help="sound files, folders (searched recursively), quoted patterns (** matches any depth), or - for a list of "
        "paths on standard input; or one data set: OWNER/NAME on the Hub, a folder of parquet, arrow or WebDataset "
        "shards, or a folder that save_to_disk wrote",
    )
    add_model_arguments(parser)
    add_compile_argument(parser)
    embeddings = parser.add_argument_group("embeddings")
    embeddings.add_argument(
        "--pooling",
        choices=EMBEDDING_POOLINGS,
        default="cls",
        help="cls: the CLS token; mean: the mean over the patches; frame: a vector every 160 ms, the mean over "
        "frequency; patch: a vector for each patch, 8 every 160 ms (default: cls)",
    )
    embeddings.add_argument(
        "--layer",
        type=layer,
        default="last",
        help="number of a block (0: the input of the first), last, mean (over the blocks), or all (a row for each) "
        "(default: last)",
    )
    embeddings.add_argument(
        "--window",
        type=positive_seconds,
        metavar="S",
        help="length of a window in seconds (default: the model's clip length, 10.24)",
    )
    embeddings.add_argument(
        "--hop", type=positive_seconds, metavar="S", help="seconds from one window to the next (default: the window)"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--out", required=True, help="folder to create or to continue")
    output.add_argument(
        "--dtype-out",
        choices=("float32", "float16"),
        default="float32",
        help="data type of the vectors (default: float32)",
    )
    output.add_argument(
        "--shard-rows",
        type=positive_int,
        metavar="N",
        help="approximate number of rows in a Parquet file (default: 128 MB of rows)",
    )
    output.add_argument(
        "--prune", action="store_true", help="drop the rows of sound files that no longer exist (default: report them)"
    )
    data = parser.add_argument_group("data set")
    data.add_argument("--config-name", help="configuration of a data set on the Hub (default: its own default)")
    data.add_argument("--split", default="train", help="split of the data set (default: train)")
    data.add_argument("--data-revision", help="branch, tag or commit of a data set on the Hub (default: main)")
    data.add_argument("--audio-column", help="column with the sounds (default: the only audio column)")
    data.add_argument(
        "--id-column",
        help="column with the names of the sounds (default: video_id, id or __key__, or else the audio file's name)",
    )


def layer(text: str) -> int | str:
    """Argparse type of `--layer`: the number of a block, "last", "all" or "mean"."""
    if text.isdecimal():
        return int(text)
    if text not in ("last", "all", "mean"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither last, all, mean nor a number")
    return text


def run(args: argparse.Namespace) -> int:
    """Embed all sounds that the folder does not hold yet; return the exit status."""
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
        compile=args.compile,
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
            prune=args.prune,
        )
    if summary.stopped:
        print(
            f"Stopped. {args.out} keeps what has been embedded; the same command continues from there.",
            file=sys.stderr,
        )
        return INTERRUPTED
    # The first process reports for all.
    if processes.rank:
        return 0
    if summary.changed:
        print(f"Files that had changed and are embedded anew: {_some(summary.changed)}.", file=sys.stderr)
    if summary.removed:
        fate = "their rows were dropped" if args.prune else "their rows stay, unless --prune drops them"
        print(f"Files that no longer exist: {_some(summary.removed)}; {fate}.", file=sys.stderr)
    print(f"{args.out} holds the embeddings of {summary.num_sounds} sounds.", file=sys.stderr)
    if summary.num_failures:
        print(f"{summary.num_failures} sounds could not be used: see {args.out}/failures.csv.", file=sys.stderr)
    return 1 if summary.num_failures else 0


def _some(names: list[str]) -> str:
    """Return the first names of a list and its length."""
    shown = ", ".join(map(escape_controls, names[:3]))
    return shown if len(names) <= 3 else f"{shown}, ... ({len(names)} files)"

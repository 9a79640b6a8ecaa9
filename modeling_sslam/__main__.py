"""`sslam COMMAND`, also as `python -m modeling_sslam COMMAND`: long recordings and large collections of sound."""

import argparse
import os
import sys
from importlib import import_module

DESCRIPTION = """\
What sounds in recordings and when, by an SSLAM or EAT model. MODEL is everywhere a folder that save_pretrained or
`python -m conversion` wrote, or OWNER/NAME of such a repository on the Hub.
"""
# Each command is a module of `inference/commands` with `add_arguments(parser)` and `run(args) -> exit status`.
COMMANDS = {
    "tag": "labels of sound files",
    "timeline": "what sounds when in a recording of any length",
    "embed": "embeddings of any number of sounds, as Parquet",
    "app": "a page in the browser that listens",
}
INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sslam", description=DESCRIPTION)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = import_module(f"modeling_sslam.inference.commands.{name}")
        subparser = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        The exit status: 0, 1 if something could not be done (stderr says what), 2 for arguments that make no sense,
        130 after Ctrl-C.
    """
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    try:
        from .common.errors import InferenceError
    except ModuleNotFoundError as error:
        print(f'error: {error.name} is not there: pip install "modeling-sslam[inference]"', file=sys.stderr)
        return 1

    args = make_parser().parse_args(arguments)
    # Names of files may hold what the terminal's encoding has no character for.
    sys.stdout.reconfigure(errors="backslashreplace")
    logging.set_verbosity_error()
    # That of loading weights, which takes a second; downloads take longer and keep theirs.
    logging.disable_progress_bar()
    enable_progress_bars()
    try:
        status = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) has had enough. What Python flushes at exit must not complain once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InferenceError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())

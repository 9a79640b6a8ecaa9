"""Command line of the package: `sslam COMMAND`, also as `python -m modeling_sslam COMMAND`."""

import argparse
import io
import os
import sys
from importlib import import_module

from .common.errors import InferenceError
from .common.signals import INTERRUPTED
from .common.text import escape_controls

DESCRIPTION = """\
Label sounds in recordings, locate them in time and embed them, with an SSLAM or EAT model.
"""
EPILOG = """\
MODEL is OWNER/NAME of a model on the Hub, as published or saved by transformers, or a folder of one. Checkpoints of
fairseq are converted to such folders.

examples:
  sslam tag recordings/ --model ta012/SSLAM_AS2M_Finetuned
  sslam convert SSLAM_AS2M_Finetuned.pt sslam-as2m
  sslam timeline night.wav --model MODEL
  sslam COMMAND --help      # options and examples of a command
"""
# A command is a module of `inference/commands` with the texts SUMMARY, DETAILS and EXAMPLES, `add_arguments(parser)`
# and `run(args)`, which returns the exit status. `run` itself imports torch, so that help and errors appear at once.
COMMANDS = ("tag", "timeline", "embed", "app", "convert")


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    parser = argparse.ArgumentParser(
        prog="sslam", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = import_module(f"modeling_sslam.inference.commands.{name}")
        subparser = commands.add_parser(
            name,
            help=command.SUMMARY,
            description=f"{command.SUMMARY}\n\n{command.DETAILS}",
            epilog=command.EXAMPLES,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(run=command.run)
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: The command's name and arguments. Defaults to the arguments of the process.

    Returns:
        The exit status: 0 for success, 1 for a failure that stderr describes, 130 after Ctrl-C.

    Raises:
        SystemExit: After help (status 0) and for invalid arguments (status 2).
    """
    args = make_parser().parse_args(arguments)
    # A file name can hold bytes for which the terminal's encoding has no character.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        _quiet_transformers()
        status: int = args.run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) closed the pipe. Python flushes stdout once more at exit, which must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ModuleNotFoundError as error:
        print(f'error: {error.name} is not installed: pip install "modeling-sslam[inference]"', file=sys.stderr)
        return 1
    except (InferenceError, OSError) as error:
        # A file name in the message can hold characters that a terminal obeys.
        print("error: " + "\n".join(map(escape_controls, str(error).split("\n"))), file=sys.stderr)
        return 1
    return status


def _quiet_transformers() -> None:
    """Silence transformers' warnings and its progress bar for weights; downloads keep theirs."""
    from huggingface_hub.utils import enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    # This call also disables the bars of downloads.
    logging.disable_progress_bar()
    enable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())

"""`sslam convert`: convert checkpoints to transformers and back.

The program is the folder `conversion/` at the top of the repository. An installed package has it as
`modeling_sslam.conversion`; a clone that is not installed has it beside the library.
"""

import argparse
from importlib import import_module
from importlib.util import find_spec

INSTALLED, CLONE = "modeling_sslam.conversion", "conversion"

_program = import_module(f"{INSTALLED if find_spec(INSTALLED) else CLONE}.__main__")

SUMMARY = "Convert a published checkpoint to a transformers folder, and back."
DETAILS: str = _program.DESCRIPTION
EXAMPLES: str = _program.EXAMPLES.replace("python -m conversion", "sslam convert")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    _program.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Convert, and return the exit status."""
    status: int = _program.run(args)
    return status

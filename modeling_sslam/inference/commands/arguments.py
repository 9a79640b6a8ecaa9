"""Command-line arguments and argument types that the commands share."""

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")

Number = TypeVar("Number", int, float)


def number(
    convert: Callable[[str], Number], description: str, is_valid: Callable[[Number], bool]
) -> Callable[[str], Number]:
    """Return an argparse type for the numbers that `is_valid` accepts.

    Args:
        convert: `int` or `float`.
        description: Completes the error message "... is not ...".
        is_valid: Whether a value is allowed.
    """

    def parse(text: str) -> Number:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return value

    return parse


positive_int = number(int, "a positive whole number", lambda value: value >= 1)
positive_seconds = number(float, "a positive number of seconds", lambda value: 0 < value < math.inf)
non_negative_seconds = number(float, "a number of seconds", lambda value: 0 <= value < math.inf)
score = number(float, "a number between 0 and 1", lambda value: 0 <= value <= 1)


def batch_size(text: str) -> int | str:
    """Argparse type of `--batch-size`: "auto" or a positive whole number."""
    return text if text == "auto" else positive_int(text)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the group "model": --model, --revision, --device, --dtype and --batch-size."""
    model = parser.add_argument_group("model")
    model.add_argument("--model", required=True, help="folder of a model, or OWNER/NAME on the Hub")
    model.add_argument("--revision", help="branch, tag or commit of a model on the Hub (default: main)")
    model.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1, mps, ...; auto: an accelerator if there is one, or else the CPU (default: auto)",
    )
    model.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision of the computation; auto: precision of the saved weights; int8: an approximation, on CPUs "
        "only (default: auto)",
    )
    model.add_argument(
        "--batch-size",
        type=batch_size,
        default="auto",
        metavar="N",
        help="windows in a batch; auto: chosen by the device's memory, and halved when a GPU runs out of it "
        "(default: auto)",
    )


def add_compile_argument(parser: argparse.ArgumentParser) -> None:
    """Add --compile."""
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the model by torch.compile, with CUDA graphs on a GPU: faster for many batches, after a minute "
        "or so of compiling; not with int8",
    )

"""Command-line arguments that commands share."""

import argparse

DTYPES = ("auto", "float32", "bfloat16", "float16", "int8")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --model, --revision, --device, --dtype and --batch-size."""
    parser.add_argument("--model", required=True, help="folder of a model, or OWNER/NAME on the Hub")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps, ...; auto takes an accelerator if there is one"
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="precision to compute in; auto: what the model was saved in; int8: an approximation, on CPUs",
    )
    parser.add_argument(
        "--batch-size",
        type=batch_size,
        default="auto",
        metavar="N",
        help="windows at a time; auto goes by the memory, and halves on a GPU that has not enough",
    )


def batch_size(text: str) -> int | str:
    return text if text == "auto" else positive_int(text)


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def positive_seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of seconds")
    return value


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value

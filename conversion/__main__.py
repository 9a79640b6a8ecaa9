"""Command line of the conversion: `python -m conversion SOURCE OUT`."""

import argparse
import sys
from pathlib import Path

from . import ConversionError

DESCRIPTION = """\
Convert an SSLAM or EAT checkpoint to a transformers folder, back to a published layout, or to an ONNX graph. The
format of SOURCE is detected automatically: a fairseq .pt (pre-trained or fine-tuned, base or large), a folder or Hub
repository in EATModel's layout, a bare state dict (.pt, .bin, .safetensors), or a folder written by this program or by
save_pretrained. Nothing in SOURCE is executed. fairseq and omegaconf are not needed. The result is checked before it
appears under its name.
"""
EXAMPLES = """\
examples:
  The encoder of a pre-trained checkpoint, for features or fine-tuning:
    python -m conversion SSLAM_Pretrained.pt sslam-base

  The classifier of a fine-tuned checkpoint. 527 classes get AudioSet's names; others are named by a file:
    python -m conversion SSLAM_AS2M_Finetuned.pt sslam-as2m
    python -m conversion esc50_fold1.pt sslam-esc50 --labels esc50_labels.csv

  Student, decoder and teacher, to continue pre-training; or the teacher as an encoder:
    python -m conversion SSLAM_Pretrained.pt sslam-base-pretraining --head pretraining
    python -m conversion SSLAM_Pretrained.pt sslam-base-teacher --weights teacher

  From the Hub, with an upload of the result:
    python -m conversion ta012/SSLAM_pretrain sslam-base --push-to-hub me/sslam-base

  Back to the layouts that the published code reads:
    python -m conversion sslam-as2m sslam-as2m.pt --to fairseq
    python -m conversion sslam-as2m sslam-as2m-hub --to hub-eat

  An ONNX graph for any batch size and length (pip install ".[onnx]"). onnx-masked adds the input attention_mask,
  with which a padded clip gets the same result as alone:
    python -m conversion sslam-as2m sslam-as2m-onnx --to onnx
    python -m conversion sslam-as2m sslam-as2m-onnx --to onnx-masked
"""


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m conversion",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments, which `sslam convert` takes as well."""
    parser.add_argument("source", metavar="SOURCE", help="a file, a folder, or a Hub repository's OWNER/NAME")
    parser.add_argument("out", metavar="OUT", type=Path, help="the folder to write; with --to fairseq, the .pt file")
    parser.add_argument(
        "--to",
        choices=("transformers", "fairseq", "hub-eat", "onnx", "onnx-masked"),
        default="transformers",
        help="layout to write (default: transformers)",
    )
    parser.add_argument(
        "--head",
        choices=("auto", "encoder", "classification", "pretraining"),
        default="auto",
        help="the part to keep; auto: the classifier of a fine-tuned checkpoint, the encoder of a pre-trained one",
    )
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="the encoder of a pre-trained checkpoint: the student (used for the published results) or its moving "
        "average, the teacher",
    )
    parser.add_argument(
        "--labels", metavar="CSV", type=Path, help="class names, one a line: index,mid,name or index,name or name"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    parser.add_argument("--quiet", action="store_true", help="print only errors")

    overrides = parser.add_argument_group("settings that the checkpoint lacks or states wrongly")
    overrides.add_argument(
        "--num-attention-heads",
        metavar="N",
        type=int,
        help="attention heads of a block (default: by the settings, else one per 64 channels)",
    )
    overrides.add_argument(
        "--pooling", choices=("cls", "mean", "lin_softmax"), help="pooling of the states before the classifier"
    )
    overrides.add_argument(
        "--problem-type",
        choices=("single_label_classification", "multi_label_classification"),
        help="whether a clip has one label or several",
    )
    overrides.add_argument(
        "--dataset-preset",
        choices=("audioset", "esc50", "speech_commands", "esp_aves2"),
        help="data set whose mean, standard deviation and clip length the model was trained with",
    )
    hub = parser.add_argument_group("Hub")
    hub.add_argument("--revision", help="branch, tag or commit of SOURCE")
    hub.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the written folder")
    hub.add_argument("--private", action="store_true", help="create the repository as private")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 after an error in one line on stderr, 2 for invalid arguments, or 130 after Ctrl-C.
    """
    return run(make_parser().parse_args(arguments))


def run(options: argparse.Namespace) -> int:
    """Run the conversion that parsed arguments describe, and return the exit status as [`main`] does."""
    if options.push_to_hub and options.to == "fairseq":
        print("error: --push-to-hub uploads a folder; --to fairseq writes a file", file=sys.stderr)
        return 2
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("error: interrupted; OUT is as it was, or complete.", file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    # Imported after the arguments are parsed: --help need not wait for torch and transformers.
    from transformers.utils import logging

    from modeling_sslam.common.labels import LabelFileError, read_labels
    from modeling_sslam.common.text import escape_controls

    from .configuration import Choices
    from .convert import convert
    from .hub import fetch, push

    logging.disable_progress_bar()
    logging.set_verbosity_error()

    def report(line: str) -> None:
        if not options.quiet:
            print(escape_controls(line))

    try:
        source, title = fetch(options.source, options.revision)
        convert(
            source,
            options.out,
            head=options.head,
            weights=options.weights,
            to=options.to,
            choices=Choices(
                num_attention_heads=options.num_attention_heads,
                pooling=options.pooling,
                problem_type=options.problem_type,
                dataset=options.dataset_preset,
                labels=read_labels(options.labels) if options.labels else None,
            ),
            overwrite=options.overwrite,
            title=title,
            report=report,
        )
        if options.push_to_hub:
            report(f"uploaded: {push(options.out, options.push_to_hub, options.private)}")
    except (ConversionError, LabelFileError, OSError) as error:
        print(f"error: {escape_controls(str(error))}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

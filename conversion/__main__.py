"""`python -m conversion SOURCE OUT`: published SSLAM and EAT checkpoints to transformers and back."""

import argparse
import sys
from pathlib import Path

from . import ConversionError

DESCRIPTION = """\
Converts a checkpoint of SSLAM or EAT to a transformers folder, back to a published layout, or to an ONNX graph. What
SOURCE is, is found out: a fairseq .pt (pre-trained or fine-tuned, base or large), a folder or repository in the Hub
layout of EATModel, a bare state dict (.pt, .bin, .safetensors), or a folder that this program or save_pretrained
wrote. Nothing in SOURCE is executed, and neither fairseq nor omegaconf is needed. The result is checked before it
appears under its name.
"""
EXAMPLES = """\
examples:
  Encoder of a pre-trained checkpoint, for features or fine-tuning:
    python -m conversion SSLAM_Pretrained.pt sslam-base

  Classifier of a fine-tuned one; 527 classes get AudioSet's names, others may be named:
    python -m conversion SSLAM_AS2M_Finetuned.pt sslam-as2m
    python -m conversion esc50_fold1.pt sslam-esc50 --labels esc50_labels.csv

  Everything that pre-training goes on from (student, decoder, teacher), or the teacher as encoder:
    python -m conversion SSLAM_Pretrained.pt sslam-base-pretraining --head pretraining
    python -m conversion SSLAM_Pretrained.pt sslam-base-teacher --weights teacher

  From the Hub, and to it:
    python -m conversion ta012/SSLAM_pretrain sslam-base --push-to-hub me/sslam-base

  Back to what published code reads:
    python -m conversion sslam-as2m sslam-as2m.pt --to fairseq
    python -m conversion sslam-as2m sslam-as2m-hub --to hub-eat

  For onnxruntime, with any batch size and length (pip install ".[onnx]"); the same with a second input,
  attention_mask, under which a padded clip gets the result that it gets alone:
    python -m conversion sslam-as2m sslam-as2m-onnx --to onnx
    python -m conversion sslam-as2m sslam-as2m-onnx --to onnx-masked
"""


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="SOURCE", help="a file, a folder, or OWNER/NAME of a repository on the Hub")
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
        help="what to keep; auto: the classifier of a fine-tuned checkpoint, the encoder of a pre-trained one",
    )
    parser.add_argument(
        "--weights",
        choices=("student", "teacher"),
        default="student",
        help="of a pre-trained checkpoint, the student (as published results do) or its moving average",
    )
    parser.add_argument(
        "--labels", metavar="CSV", type=Path, help="class names: index,mid,name or index,name or name a line"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")
    parser.add_argument("--quiet", action="store_true", help="print errors alone")

    said = parser.add_argument_group("where the checkpoint does not say, or says it wrong")
    said.add_argument(
        "--num-attention-heads", metavar="N", type=int, help="no shape shows them; 64 channels each if unknown"
    )
    said.add_argument("--pooling", choices=("cls", "mean", "lin_softmax"), help="what the classifier sees of a clip")
    said.add_argument(
        "--problem-type",
        choices=("single_label_classification", "multi_label_classification"),
        help="whether a clip has one label or several",
    )
    said.add_argument(
        "--dataset-preset",
        choices=("audioset", "esc50", "speech_commands"),
        help="dataset whose mean, deviation and clip length the model was trained with",
    )
    hub = parser.add_argument_group("Hub")
    hub.add_argument("--revision", help="branch, tag or commit of SOURCE")
    hub.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the folder when it is written")
    hub.add_argument("--private", action="store_true", help="make the repository private if it is new")
    return parser


def main(arguments: list[str] | None = None) -> int:
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.push_to_hub and options.to == "fairseq":
        parser.error("--push-to-hub uploads a folder; --to fairseq writes a file")
    # After the arguments, so that --help does not wait for torch and transformers.
    from transformers.utils import logging

    from modeling_sslam.common.labels import LabelFileError, read_labels

    from .configuration import Choices
    from .convert import convert
    from .hub import fetch, push

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    report = (lambda line: None) if options.quiet else print
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
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

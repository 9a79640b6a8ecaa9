"""Speed of the exported graphs in onnxruntime against the model in torch, on a CPU in float32.

    python -m benchmarks.onnx_inference              # base size, batches of 8 clips of 10 s

An encoder and a classifier with random weights are exported as `python -m conversion --to onnx` exports them. They run
on other batch sizes and lengths than those of the export. Both runtimes have the same number of threads. The model in
torch runs after `use_onednn`.
"""

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from onnxruntime import InferenceSession, SessionOptions

from benchmarks.measurement import ratio, scaled, time_in_turn
from benchmarks.report import Report, Row, base_config, make_parser
from conversion.onnx_export import TOLERANCE, export_graph
from modeling_sslam import SSLAMForAudioClassification, SSLAMModel, SSLAMPreTrainedModel
from modeling_sslam.onednn_sslam import use_onednn

PARITY_SHAPES = ((1, 1024), (3, 304))


def export_session(model: SSLAMPreTrainedModel, file: Path, masked: bool, num_threads: int) -> InferenceSession:
    export_graph(model, file, masked)
    options = SessionOptions()
    options.intra_op_num_threads = num_threads
    return InferenceSession(file, options, providers=["CPUExecutionProvider"])


@torch.inference_mode()
def parity_error(model: SSLAMPreTrainedModel, session: InferenceSession) -> float:
    """Return the largest difference of any output on clips of noise."""
    errors = []
    for batch_size, frames in PARITY_SHAPES:
        clips = torch.randn(batch_size, frames, model.config.num_mel_bins)
        theirs = session.run(None, {"input_values": clips.numpy()})
        errors += [np.abs(a - b.numpy()).max() for a, b in zip(theirs, model(clips).to_tuple(), strict=True)]
    return float(max(errors))


@torch.inference_mode()
def run_torch(model: SSLAMModel, clips: torch.Tensor) -> None:
    model(clips)


def main(arguments: list[str] | None = None) -> None:
    parser = make_parser("onnx_inference", __doc__, rounds=5)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--frames", type=int, default=1024, help="frames of a clip, 10 ms each (%(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = SSLAMForAudioClassification(base_config(options.layers)).eval()
    encoder = model.sslam
    settings = {"layers": options.layers, "batch_size": options.batch_size, "frames": options.frames}
    report = Report("onnx_inference", settings | {"threads": options.threads, "rounds": options.rounds})
    where = f"CPU, {options.threads} threads"

    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            name: export_session(part, Path(folder) / f"{name}.onnx", masked, options.threads)
            for name, part, masked in (
                ("encoder", encoder, False),
                ("classifier", model, False),
                ("masked", encoder, True),
            )
        }
    for name, part in (("encoder", encoder), ("classifier", model)):
        error = parity_error(part, sessions[name])
        report.add(
            Row(f"ONNX {name} in onnxruntime", where, "largest difference from torch", error, at_most=TOLERANCE)
        )

    clips = torch.randn(options.batch_size, options.frames, encoder.config.num_mel_bins)
    inputs = {"input_values": clips.numpy()}
    mask = {"attention_mask": np.ones(clips.shape[:2], dtype=np.int64)}
    seconds = time_in_turn(
        {
            "torch": partial(run_torch, use_onednn(encoder), clips),
            "onnxruntime": partial(sessions["encoder"].run, None, inputs),
            "onnxruntime, masked": partial(sessions["masked"].run, None, inputs | mask),
        },
        options.rounds,
        torch.device("cpu"),
    )
    for name, measurement in seconds.items():
        report.record(f"clips per second: {name}", scaled(measurement, lambda value: options.batch_size / value))
    report.add(
        Row(
            "ONNX encoder in onnxruntime, fp32",
            where,
            "of torch's clips/s",
            ratio(seconds["torch"], seconds["onnxruntime"]),
            at_least=1.0,
            note=f"{options.batch_size} clips of {options.frames} frames; torch eager, use_onednn",
        ),
        Row(
            "ONNX encoder with attention_mask",
            where,
            "of the clips/s without the input",
            ratio(seconds["onnxruntime"], seconds["onnxruntime, masked"]),
            note="nothing padded",
        ),
    )
    report.write(options.out)


if __name__ == "__main__":
    main()

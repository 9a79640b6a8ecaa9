"""Speed of encoder and classifier against the Audio Spectrogram Transformer, a plain transcription and the GEMM limit.

    python -m benchmarks.inference

On the CPU, the base size computes clips of 10 s from `input_values`, in these forms:

- "as loaded": the model of `from_pretrained`, with torch's own kernels;
- "use_onednn": the model after `modeling_sslam.onednn_sslam.use_onednn`, as the training programs run it;
- "optimised": the model after `modeling_sslam.inference.optimize_for_cpu`, in float32, bfloat16 and int8, as the
  `sslam` commands run it.

One rival is transformers' ASTForAudioClassification of the same width and depth. It cuts a clip into overlapping
patches and has 1214 tokens, where SSLAM has 513. The other is a plain transcription of SSLAM with eager attention.
Fidelity is the lowest cosine similarity over clips between the CLS embeddings and those of the model as loaded, on
soundscapes and with random weights.

`python -m benchmarks gpu` measures inference on a GPU.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import cosine_similarity
from transformers import ASTConfig, ASTForAudioClassification

from benchmarks import plain
from benchmarks.gemm import gemm_runner, matrix_products, total_flops
from benchmarks.measurement import ratio, scaled, time_in_turn
from benchmarks.report import Report, Row, base_config, make_parser
from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification
from modeling_sslam.inference.packed_blocks import can_optimize, optimize_for_cpu
from modeling_sslam.onednn_sslam import use_onednn
from training.data.seeding import generator_for
from training.soundscapes.scene import soundscape

SECONDS = 10.0
# Targets of reduced precision: times the speed of float32 by `use_onednn`, and cosine with its embeddings.
TARGETS = {"bfloat16": (2.0, 0.9995), "int8": (2.5, 0.998)}


def soundscapes(count: int, sampling_rate: int) -> list[torch.Tensor]:
    """Make clips of 10 s with several sounds each."""
    sounds = (soundscape(generator_for(0, "benchmark", number), SECONDS, sampling_rate)[0] for number in range(count))
    return [torch.from_numpy(sound).float() for sound in sounds]


def make_ast(config: SSLAMConfig) -> ASTForAudioClassification:
    """Make the rival, as wide and as deep as the configuration."""
    return ASTForAudioClassification(
        ASTConfig(
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_length=config.max_length,
            num_mel_bins=config.num_mel_bins,
            num_labels=config.num_labels,
        )
    ).eval()


@torch.inference_mode()
def cpu_rows(report: Report, config: SSLAMConfig, batch_size: int, rounds: int) -> None:
    device, extractor = torch.device("cpu"), SSLAMFeatureExtractor()
    clips = soundscapes(batch_size, extractor.sampling_rate)
    input_values = extractor(clips, extractor.sampling_rate, return_tensors="pt")["input_values"]
    model, transcription = SSLAMForAudioClassification(config).eval(), plain.Encoder(config).eval()
    precisions = [precision for precision in ("float32", *TARGETS) if can_optimize(precision)]
    optimised = {precision: optimize_for_cpu(copy.deepcopy(model), precision) for precision in precisions}
    by_onednn = use_onednn(copy.deepcopy(model))

    products = matrix_products(lambda: model(input_values))
    contestants: dict[str, Callable[[], object]] = {
        "as loaded": partial(model, input_values),
        "use_onednn": partial(by_onednn, input_values),
        **{f"optimised, {precision}": partial(fast, input_values) for precision, fast in optimised.items()},
        "AST": partial(make_ast(config), input_values),
        "plain transcription": lambda: transcription(transcription.embed(input_values)),
        "matrix products": gemm_runner(products, device, ("torch", "onednn", "packed")),
        "matrix products by torch.mm": gemm_runner(products, device, ("torch",)),
    }
    seconds = time_in_turn(contestants, rounds, device)
    flops = total_flops(products)
    report.record("GFLOPs of the matrix products", flops / 1e9)
    for name, measurement in seconds.items():
        report.record(f"seconds, {name}", measurement)
        report.record(f"clips/s, {name}", scaled(measurement, lambda value: batch_size / value))
        report.record(f"GFLOP/s of the products, {name}", scaled(measurement, lambda value: flops / value / 1e9))

    def against(rival: str, name: str) -> dict:
        return {"where": "CPU", "value": ratio(seconds[rival], seconds[name])}

    what, limit, torch_limit = (
        f"inference base, fp32, batch {batch_size}",
        "matrix products",
        "matrix products by torch.mm",
    )
    for name in ("optimised, float32", "use_onednn", "as loaded"):
        aims = (0.85, 2.3) if name.startswith("optimised") else (None, None)
        report.add(
            Row(f"{what}, {name}", figure="of the GEMM limit", at_least=aims[0], **against(limit, name)),
            Row(f"{what}, {name}", figure="of the limit by torch.mm alone", **against(torch_limit, name)),
            Row(f"{what}, {name}", figure="times AST's clips/s", at_least=aims[1], **against("AST", name)),
            Row(f"{what}, {name}", figure="times the plain transcription's", **against("plain transcription", name)),
        )
    expected = model.sslam(input_values).pooler_output
    for precision, (speed, cosine) in TARGETS.items():
        what, name = f"inference base, {precision}, batch {batch_size}", f"optimised, {precision}"
        if precision not in optimised:
            report.add(
                Row(
                    what,
                    "CPU",
                    "times own fp32, use_onednn",
                    None,
                    at_least=speed,
                    note="no kernels on this processor",
                )
            )
            continue
        found = optimised[precision].sslam(input_values).pooler_output.float()
        fidelity = cosine_similarity(found, expected).min().item()
        report.add(
            Row(what, figure="times own fp32, use_onednn", at_least=speed, **against("use_onednn", name)),
            Row(what, figure="times own fp32, as loaded", **against("as loaded", name)),
            Row(what, figure="times own fp32, optimised", **against("optimised, float32", name)),
            Row(what, "CPU", "cosine of embeddings", fidelity, at_least=cosine),
        )


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("inference", __doc__, rounds=5)
    parser.add_argument("--batch-size", type=int, default=8, help="clips in a batch (%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    report = Report("inference", {name: value for name, value in vars(args).items() if name != "out"})
    config = base_config(args.layers)
    cpu_rows(report, config, args.batch_size, args.rounds)
    report.write(args.out)


if __name__ == "__main__":
    main()

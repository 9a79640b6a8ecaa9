"""Scaling of cost: plots of clips/s and peak memory against batch size, clip length and number of clones.

    python -m benchmarks.scaling [--picture benchmarks/scaling.png]

The base size runs on a GPU (bfloat16, compiled) if there is one, and otherwise on the CPU (float32, `use_onednn`). The
classifier runs in inference against batch size (clips of 10 s) and against length (one clip), beside the Audio
Spectrogram Transformer where that takes such clips. The pre-training step runs against the number of clones (2 clips).
Each point is timed in this process. Its peak memory is measured in a separate process, and includes weights and
inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks.inference import make_ast
from benchmarks.measurement import peak_memory, time_in_turn
from benchmarks.pretraining_step import Setting, cost_of_step
from benchmarks.report import GIB, Report, base_config, make_parser
from modeling_sslam import SSLAMForAudioClassification
from modeling_sslam.onednn_sslam import use_onednn

BATCH_SIZES = (1, 2, 4, 8, 16, 32)
# From 1 s to 2 min, in whole patches of 160 ms.
LENGTHS = (96, 192, 512, 1024, 3072, 6144, 12_288)
CLONES = (1, 2, 4, 8, 16)
CLIPS_OF_A_STEP = 2


@dataclass(frozen=True)
class Inference:
    """A run in inference: the model's name, its blocks, the clips and their frames, the device."""

    model: str
    layers: int
    batch_size: int
    frames: int
    device: str

    def set_up(self) -> Callable[[], object]:
        config = base_config(self.layers, max_length=self.frames)
        dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        model = make_ast(config) if self.model == "AST" else use_onednn(SSLAMForAudioClassification(config).eval())
        model = model.to(self.device, dtype)
        if self.device == "cuda":
            model = torch.compile(model)
        input_values = torch.randn(self.batch_size, self.frames, config.num_mel_bins, device=self.device, dtype=dtype)
        return torch.inference_mode()(partial(model, input_values))


def cost_of_inference(setting: Inference, rounds: int) -> dict[str, float]:
    """Measure clips/s and peak memory in GiB."""
    device = torch.device(setting.device)
    seconds = time_in_turn({"forward": setting.set_up()}, rounds, device)["forward"].median
    return {"clips/s": setting.batch_size / seconds, "GiB": peak_memory(setting.set_up).in_all / GIB}


def draw(curves: dict[str, dict[str, dict[float, dict[str, float]]]], title: str) -> Figure:
    """Draw curves by axis, name and place: clips/s above, peak memory below."""
    figure = Figure(figsize=(4 * len(curves), 6.5), layout="constrained")
    axes = figure.subplots(2, len(curves), squeeze=False)
    for column, (axis, named) in enumerate(curves.items()):
        for row, quantity in enumerate(("clips/s", "GiB")):
            plot = axes[row][column]
            for name, points in named.items():
                plot.plot(list(points), [point[quantity] for point in points.values()], marker="o", label=name)
            plot.set_xscale("log", base=2)
            plot.set_yscale("log")
            ticks = sorted({place for points in named.values() for place in points})
            plot.set_xticks(ticks, [f"{tick:.2g}" if tick < 100 else f"{tick:.0f}" for tick in ticks])
            plot.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))  # legible over one decade and over four
            plot.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
            plot.yaxis.set_minor_formatter(NullFormatter())
            plot.set_xlabel(axis)
            plot.grid(which="both", alpha=0.3)
            plot.legend()
        axes[0][column].set_ylabel("clips/s")
        axes[1][column].set_ylabel("peak memory in GiB, all included")
    figure.suptitle(title)
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = make_parser("scaling", __doc__, rounds=3)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCH_SIZES, metavar="N")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T", help="frames of 10 ms")
    parser.add_argument("--clones", type=int, nargs="+", default=CLONES, metavar="C")
    parser.add_argument("--picture", type=Path, default=Path("outputs/benchmarks/scaling.png"), help="(%(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("rounds", "threads", "layers", "batch_sizes", "lengths", "clones")
    report = Report("scaling", {name: getattr(args, name) for name in names} | {"device": device})
    curves: dict[str, dict[str, dict[float, dict[str, float]]]] = {}

    def add(axis: str, name: str, place: float, cost: dict[str, float]) -> None:
        curves.setdefault(axis, {}).setdefault(name, {})[place] = cost
        print(f"{axis} {place:g}, {name}: {cost['clips/s']:.3g} clips/s, {cost['GiB']:.3g} GiB", flush=True)

    max_length = base_config(args.layers).max_length
    for model in ("SSLAM", "AST"):
        for batch_size in args.batch_sizes:
            setting = Inference(model, args.layers, batch_size, max_length, device)
            add("clips of 10 s at a time", model, batch_size, cost_of_inference(setting, args.rounds))
        for frames in args.lengths:
            setting = Inference(model, args.layers, 1, frames, device)
            add("seconds of one clip", model, frames / 100, cost_of_inference(setting, args.rounds))
    for clones in args.clones:
        setting = Setting(CLIPS_OF_A_STEP, clones, max_length, args.layers, device, half_precision=device == "cuda")
        seconds, peak = cost_of_step(setting, args.rounds)
        cost = {"clips/s": CLIPS_OF_A_STEP / seconds.median, "GiB": peak.in_all / GIB}
        add(f"clones, step of {CLIPS_OF_A_STEP} clips", "SSLAM, stage 2", clones, cost)

    for axis, named in curves.items():
        report.record(
            axis, {name: {f"{place:g}": cost for place, cost in points.items()} for name, points in named.items()}
        )
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {args.threads} threads, float32"
    matplotlib.use("agg")
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    draw(curves, f"Base size on {where}").savefig(args.picture, dpi=110)
    report.write(args.out)
    print(f"Picture: {args.picture}")


if __name__ == "__main__":
    main()

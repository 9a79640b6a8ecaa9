"""Time and memory of a pre-training step against a plain transcription and the GEMM limit.

    python -m benchmarks.pretraining_step

The benchmark times a step of the second stage (objective "sslam") at the base size on the CPU in float32: forward and
backward pass, gradient clipping, AdamW and the teacher's update. Our step runs as in `training.pretrain`, with
`use_onednn`. The benchmark does not apply the training programs' settings of glibc's heap. They hold for a whole
process, so they would also change the transcription. `python -m benchmarks gpu` measures the steps of both stages on a
GPU.

Peak memory is that of a second step in a separate process, and includes weights, gradients and the optimiser's state.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import nn

from benchmarks.gemm import MatrixProduct, gemm_runner, matrix_products, total_flops
from benchmarks.measurement import Measurement, PeakMemory, peak_memory, ratio, scaled, time_in_turn
from benchmarks.plain import PlainPreTraining
from benchmarks.report import Report, Row, base_config, make_parser
from modeling_sslam import SSLAMConfig, SSLAMForPreTraining
from modeling_sslam.onednn_sslam import use_onednn
from training.pretrain import compile_blocks
from training.run.optimization import OptimizerConfig, make_optimizer

GB = 10**9
OPTIMIZER = OptimizerConfig(learning_rate=5e-5)

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass(frozen=True)
class Setting:
    """Size of a step, and its device and precision.

    Attributes:
        batch: Clips.
        clones: Masked copies of each clip.
        frames: Frames of a clip, 10 ms each.
        layers: Blocks of the encoder.
        device: Name of the device.
        half_precision: Whether to compute by autocast in half precision, ours in bfloat16 and the transcription in
            float16 with scaled gradients, as published. Otherwise float32.
        objective: "ua" for the first stage, "sslam" for the second.
    """

    batch: int
    clones: int
    frames: int
    layers: int = 12
    device: str = "cpu"
    half_precision: bool = False
    objective: str = "sslam"

    @property
    def config(self) -> SSLAMConfig:
        return base_config(self.layers, num_clones=self.clones, pretraining_objective=self.objective)

    def make_batch(self) -> torch.Tensor:
        return torch.randn(self.batch, self.frames, self.config.num_mel_bins, device=self.device)


def make_update(model: SSLAMForPreTraining, half_precision: bool) -> Callable[[torch.Tensor], None]:
    """Return a function that makes a step of the model on a batch of `input_values`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(model, OPTIMIZER)

    def update(input_values: torch.Tensor) -> None:
        if model.device.type == "cuda":
            # If the model runs as CUDA graphs, they may reuse the memory of the previous step.
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(model.device.type, torch.bfloat16, enabled=half_precision):
            loss = model(input_values).loss
        loss.backward()
        nn.utils.clip_grad_norm_(trained, OPTIMIZER.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher(model.ema_decay(1))

    return update


def on_device(setting: Setting, model_class: Callable[[SSLAMConfig], ModelT]) -> ModelT:
    """Make a model whose weights are drawn on the device, which takes a GPU less time than copying them."""
    with torch.device(setting.device):
        model = model_class(setting.config)
    return model.to(setting.device)  # the table of positions is computed on the CPU


def prepare_as_trainer(model: SSLAMForPreTraining) -> None:
    """Prepare a model as `training.pretrain` does: by `use_onednn` on a CPU, with compiled blocks on a GPU."""
    if model.device.type == "cpu":
        use_onednn(model)
    else:
        compile_blocks(model)


def make_step(
    setting: Setting, prepare: Callable[[SSLAMForPreTraining], object] = prepare_as_trainer
) -> partial[None]:
    """Return our step on a ready batch, with a model that `prepare` has changed. `func` takes other batches."""
    model = on_device(setting, SSLAMForPreTraining).train()
    prepare(model)
    return partial(make_update(model, setting.half_precision), setting.make_batch())


def products_of_step(setting: Setting) -> Counter[MatrixProduct]:
    """Record the products of our step, without those that it recomputes to save memory."""
    return matrix_products(make_step(setting, prepare=lambda model: model.set_memory("fast")))


def make_plain_step(setting: Setting) -> Callable[[], None]:
    """Return a function that makes the transcription's step on a ready batch."""
    config = setting.config
    model = on_device(setting, PlainPreTraining).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=OPTIMIZER.learning_rate, betas=OPTIMIZER.betas, weight_decay=OPTIMIZER.weight_decay
    )
    clips = setting.make_batch()
    scaler = torch.amp.GradScaler(setting.device, enabled=setting.half_precision)

    def step() -> None:
        with torch.autocast(setting.device, torch.float16, enabled=setting.half_precision):
            loss = model(clips)["loss"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trained, OPTIMIZER.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.update_teacher(config.ema_decay)

    return step


def peak_of(make: Callable[[Setting], Callable[[], None]], setting: Setting) -> PeakMemory:
    return peak_memory(partial(_second_step, make, setting))


def _second_step(make: Callable[[Setting], Callable[[], None]], setting: Setting) -> Callable[[], None]:
    """Return a step whose optimiser has its state already."""
    step = make(setting)
    step()
    return step


def cost_of_step(setting: Setting, rounds: int) -> tuple[Measurement, PeakMemory]:
    """Measure seconds and peak memory of our step."""
    seconds = time_in_turn({"step": make_step(setting)}, rounds, torch.device(setting.device))["step"]
    return seconds, peak_of(make_step, setting)


def measure(report: Report, setting: Setting, rounds: int) -> tuple[dict[str, Measurement], dict[str, PeakMemory]]:
    """Measure our step, the transcription's and our matrix products: seconds in turn, and the steps' peak memory."""
    device, name = torch.device(setting.device), setting.device
    products = products_of_step(setting)
    contestants = {"ours": make_step(setting), "plain": make_plain_step(setting)}
    seconds = time_in_turn({**contestants, "limit": gemm_runner(products, device)}, rounds, device)
    flops = total_flops(products)
    report.record(f"{name}: TFLOPs of the matrix products", flops / 1e12)
    report.record(f"{name}: TFLOP/s of the limit", scaled(seconds["limit"], lambda value: flops / value / 1e12))
    for contestant, measurement in seconds.items():
        report.record(f"{name}: seconds, {contestant}", measurement)
    contestants.clear()  # free their memory
    peaks = {"ours": peak_of(make_step, setting), "plain": peak_of(make_plain_step, setting)}
    for contestant, peak in peaks.items():
        report.record(f"{name}: peak bytes, {contestant}", peak.in_all)
    return seconds, peaks


def cpu_rows(report: Report, setting: Setting, rounds: int) -> list[Row]:
    what, where = f"pre-training step base, B {setting.batch}, C {setting.clones}", "CPU"
    seconds, peaks = measure(report, setting, rounds)
    note = (
        f"{seconds['ours'].median:.2f} s; plain {seconds['plain'].median:.2f} s, limit {seconds['limit'].median:.2f} s"
    )
    memory_note = f"{peaks['ours'].in_all / GB:.2f} GB; plain {peaks['plain'].in_all / GB:.2f} GB"
    return [
        Row(what, where, "of the GEMM limit", ratio(seconds["limit"], seconds["ours"]), at_least=0.8, note=note),
        Row(what, where, "times the plain speed", ratio(seconds["plain"], seconds["ours"]), at_least=1.3),
        Row(
            what,
            where,
            "of the plain peak memory",
            peaks["ours"].in_all / peaks["plain"].in_all,
            at_most=0.7,
            note=memory_note,
        ),
    ]


def main() -> None:
    parser = make_parser("pretraining_step", __doc__, rounds=5)
    parser.add_argument("--batch", type=int, default=2, help="clips of a step (%(default)s)")
    parser.add_argument("--clones", type=int, default=4, help="clones of each clip (%(default)s)")
    parser.add_argument("--frames", type=int, default=1024, help="frames of a clip (%(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    report = Report("pretraining_step", {name: value for name, value in vars(args).items() if name != "out"})
    report.add(*cpu_rows(report, Setting(args.batch, args.clones, args.frames, args.layers), args.rounds))
    report.write(args.out)


if __name__ == "__main__":
    main()

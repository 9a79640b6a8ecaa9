"""Pre-training from the command line, on generated soundscapes and a tiny model: learning, exact resume, stopping."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import AutoModel

from conversion.convert import convert
from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForPreTraining
from modeling_sslam.common.files import TEMPORARY_PREFIX
from training import pretrain
from training.arguments import parse
from training.data import stream
from training.data.loader import AudioLoader
from training.run import processes as start_of_processes
from training.run import trainer
from training.run.checkpointing import list_checkpoints
from training.run.metrics_log import read_metrics
from training.soundscapes.__main__ import make_row

pytestmark = pytest.mark.slow

SETTINGS = {
    "max_updates": 8,
    "batch_size": 4,
    "data": {"num_workers": 0, "shuffle_buffer": 8},
    "model": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_mel_bins": 32,
        "max_length": 64,
        "max_position_embeddings": 8,
        "num_clones": 2,
        "decoder_num_layers": 2,
        "ema_anneal_end_step": 10,
    },
    "optimizer": {"learning_rate": 2e-3, "warmup_updates": 4},
    "checkpoint": {"every": 3},
    "watch": {"every": 2, "tracker": "none"},
}


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder of 24 short soundscapes."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(24):
        row = make_row(("train", i), seed=0, duration=0.8, rate=16_000, max_sources=2)
        (folder / f"clip{i:02d}.flac").write_bytes(row["audio"]["bytes"])
    return folder


@pytest.fixture
def arguments(clips, tmp_path):
    """A command line for a run in `tmp_path / name`, with settings changed by their dotted keys."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(SETTINGS))

    def arguments(name: str = "run", **changes) -> list[str]:
        changes = {"output_dir": tmp_path / name, "data.source": clips} | changes
        return ["--config", str(settings), *(f"--{key}={value}" for key, value in changes.items())]

    return arguments


@pytest.fixture
def train(arguments, tmp_path):
    """A function that runs the program in this process and returns the folder of the run."""

    def train(name: str = "run", **changes) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        pretrain.main(arguments(name, **changes))
        return tmp_path / name

    return train


@pytest.fixture(scope="session")
def processes():
    """A function that starts the program in a new process, forked from a server that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.pretrain"])
    before, os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS"), "1"
    started = []
    # If data workers were started in the same way as this process, they would import everything again.
    program = "multiprocessing.set_start_method('fork', force=True); pretrain.main(argv)"

    def start(argv: list[str]) -> multiprocessing.Process:
        code = f"import multiprocessing; from training import pretrain; {program}"
        started.append(context.Process(target=exec, args=(code, {"argv": argv})))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
    os.environ.pop("OMP_NUM_THREADS") if before is None else os.environ.update(OMP_NUM_THREADS=before)


def assert_identical(found, wanted) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_identical(found[key], wanted[key])
    elif isinstance(wanted, (list, tuple)):
        for part, wanted_part in zip(found, wanted, strict=True):
            assert_identical(part, wanted_part)
    elif isinstance(wanted, torch.Tensor):
        assert torch.equal(found, wanted)
    else:
        assert found == wanted


def assert_same_run(one: Path, other: Path) -> None:
    """Check that two runs have identical weights, optimiser states, random numbers and clips."""
    for path in (one, other):
        assert not list(path.rglob(f"{TEMPORARY_PREFIX}*"))
    last, expected = list_checkpoints(one)[-1], list_checkpoints(other)[-1]
    assert last.name == expected.name
    weights, expected_weights = (load_file(path / "model.safetensors") for path in (last, expected))
    assert weights.keys() == expected_weights.keys()
    assert all(torch.equal(weights[name], expected_weights[name]) for name in weights)
    for name in ("optimizer.pt", "rank-00000.pt"):
        found, wanted = (torch.load(path / name, weights_only=True) for path in (last, expected))
        assert_identical(found, wanted)
    timings = ("clips_per_second", "data_wait_fraction", "memory_gib")
    rows, expected_rows = (
        [
            {key: value for key, value in row.items() if key not in timings}
            for row in read_metrics(path / "metrics.jsonl")
        ]
        for path in (one, other)
    )
    assert rows == expected_rows


# Files and learning


def test_files_of_a_run(train):
    run = train(**{"watch.tracker": "tensorboard"})
    assert [path.name for path in list_checkpoints(run)] == ["step-00000006", "step-00000008"]
    rows = read_metrics(run / "metrics.jsonl")
    assert [row["update"] for row in rows] == [2, 4, 6, 8]
    for row in rows:
        terms = [row[name] for name in pretrain.LOSS_TERMS]
        assert row["loss"] == pytest.approx(sum(terms), rel=1e-5)
    assert [row["learning_rate"] for row in rows] == pytest.approx([1e-3, 2e-3, 1e-3, 0.0])
    assert rows[-1]["clips"] == 32
    assert rows[-1]["epoch"] == 1
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert yaml.safe_load((run / "config.yaml").read_text())["optimizer"]["learning_rate"] == 2e-3

    card = (run / "model" / "README.md").read_text()
    assert f"{rows[-1]['loss']:.4g}" in card
    assert "8 of 8" in card
    model = SSLAMForPreTraining.from_pretrained(run / "model")
    encoder = AutoModel.from_pretrained(run / "model", trust_remote_code=True)
    for name, tensor in model.sslam.state_dict().items():
        assert torch.equal(encoder.state_dict()[name], tensor)
    assert SSLAMFeatureExtractor.from_pretrained(run / "model").max_length == 64


def test_loss_falls(train):
    run = train(max_updates=60, batch_size=8, **{"watch.every": 10, "optimizer.warmup_updates": 10})
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl")]
    assert losses[-1] < 0.8 * losses[0]


def test_second_stage_starts_from_student_and_teacher_of_the_first(train):
    first = train("first", **{"model.pretraining_objective": "ua", "model.num_clones": 4, "model.ema_decay": 0.9})
    changes = {"model.pretraining_objective": "sslam", "optimizer.warmup_updates": 0}
    second = train("second", init_from=first / "model", max_updates=1, **changes)
    before = SSLAMForPreTraining.from_pretrained(first / "model")
    after = SSLAMForPreTraining.from_pretrained(second / "model")
    assert (before.config.pretraining_objective, after.config.pretraining_objective) == ("ua", "sslam")
    assert after.config.num_clones == 2
    # The only update is the last one, with a learning rate of 0: student and decoder are unchanged.
    for part in ("sslam", "decoder"):
        for name, tensor in getattr(before, part).state_dict().items():
            assert torch.equal(getattr(after, part).state_dict()[name], tensor)
    decay = before.ema_decay(1)
    for (name, teacher), student in zip(before.teacher.named_parameters(), before.sslam.parameters(), strict=True):
        assert not torch.equal(teacher, student)
        expected = decay * teacher + (1 - decay) * student
        torch.testing.assert_close(after.teacher.get_parameter(name), expected)
    (row,) = read_metrics(second / "metrics.jsonl")
    assert row["update"] == 1


def test_second_stage_starts_from_a_converted_checkpoint(train, golden_dir, tmp_path):
    convert(golden_dir / "sslam_pretrained.pt", tmp_path / "converted", head="pretraining")
    changes = {
        "model.num_hidden_layers": 3,
        "model.intermediate_size": 128,
        "model.num_mel_bins": 128,
        "model.max_position_embeddings": 768,
        "model.decoder_num_layers": 3,
    }
    run = train(init_from=tmp_path / "converted", max_updates=1, **{"optimizer.warmup_updates": 0}, **changes)
    before = SSLAMForPreTraining.from_pretrained(tmp_path / "converted")
    after = SSLAMForPreTraining.from_pretrained(run / "model")
    assert (after.config.pretraining_objective, after.config.max_length) == ("sslam", 64)
    decay = after.ema_decay(1)
    for (name, teacher), student in zip(before.teacher.named_parameters(), before.sslam.parameters(), strict=True):
        assert torch.equal(after.sslam.get_parameter(name), student)
        torch.testing.assert_close(after.teacher.get_parameter(name), decay * teacher + (1 - decay) * student)


def test_bf16_trains(train):
    run = train(mixed_precision="bf16")
    assert load_file(list_checkpoints(run)[-1] / "model.safetensors")["sslam.encoder.cls_token"].dtype == torch.float32
    losses = [row["loss"] for row in read_metrics(run / "metrics.jsonl")]
    assert losses[-1] < losses[0]


# Resuming


def test_a_run_killed_at_any_moment_resumes_exactly(arguments, processes, tmp_path):
    changes = {
        "max_updates": 60,
        "checkpoint.every": 2,
        "watch.every": 3,
        "gradient_accumulation_steps": 2,
        "data.num_workers": 2,
        "resume": "auto",
    }
    calm = processes(arguments("calm", **changes))
    calm.join()
    assert calm.exitcode == 0

    argv, checkpoints = arguments("killed", **changes), tmp_path / "killed" / "checkpoints"
    chance, num_kills, num_in_save = random.Random(0), 0, 0

    def newest() -> str:
        return max((path.name for path in checkpoints.glob("step-*")), default="")

    while num_kills < 6 or not num_in_save:
        assert num_kills < 40, "no kill hit a save"
        process, first = processes(argv), newest()
        while newest() == first and process.is_alive():  # some progress first
            time.sleep(0.001)
        if num_kills % 2:
            time.sleep(chance.uniform(0, 0.3))
        else:
            while process.is_alive() and not list(checkpoints.glob(f"{TEMPORARY_PREFIX}*")):
                time.sleep(0.0005)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run was over before it could be killed: make it longer"
        num_kills += 1
        num_in_save += bool(list(checkpoints.glob(f"{TEMPORARY_PREFIX}*")))

    process = processes(argv)
    process.join()
    assert process.exitcode == 0
    assert_same_run(tmp_path / "killed", tmp_path / "calm")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_asked_to_stop_saves_and_resumes_exactly(number, arguments, processes, tmp_path):
    changes = {"max_updates": 30, "checkpoint.every": 1000, "data.num_workers": 2, "watch.every": 1, "resume": "auto"}
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    process = processes(arguments("stopped", **changes))
    while not read_metrics(metrics):
        assert process.is_alive(), "the run ended before its first line of the log"
        time.sleep(0.005)
    # Terminals and launchers signal the workers too.
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), number)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 0
    (checkpoint,) = list_checkpoints(tmp_path / "stopped")
    update = json.loads((checkpoint / "trainer.json").read_text())["progress"]["update"]
    assert update < 30
    assert read_metrics(metrics)[-1]["update"] == update

    for name in ("stopped", "calm"):
        process = processes(arguments(name, **changes))
        process.join()
        assert process.exitcode == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "calm")


@pytest.mark.slow
def test_a_run_of_one_graph_resumes_exactly(train, monkeypatch):
    """The backend runs torch's own operators and compiles in seconds, so the run equals one that is not compiled."""
    options = []

    def compile_fast(self, mode, **arguments):
        options.append({"mode": mode, **arguments})
        honest(self, backend="aot_eager", **arguments)

    honest = SSLAMForPreTraining.compile
    plain = train("plain", max_updates=4, memory="fast")
    monkeypatch.setattr(SSLAMForPreTraining, "compile", compile_fast)
    settings = {"compile": "true", "compile_mode": "cuda_graphs", "memory": "fast"}
    train("resumed", max_updates=2, **settings)
    resumed = train("resumed", max_updates=4, resume="auto", allow_changed_config="true", **settings)
    straight = train("straight", max_updates=4, compile="true", memory="fast")
    assert [option.pop("mode") for option in options] == ["reduce-overhead", "reduce-overhead", "default"]
    assert all(option == {"fullgraph": True, "dynamic": False} for option in options)

    weights, resumed_weights, plain_weights = (
        load_file(path / "model" / "model.safetensors") for path in (straight, resumed, plain)
    )
    for name, value in weights.items():
        torch.testing.assert_close(value, plain_weights[name], rtol=1e-3, atol=1e-4)
    # The schedules of 2 and of 4 updates agree during warm-up.
    assert_identical(resumed_weights, weights)


@pytest.mark.parametrize("objective", ["ua", "sslam"])
def test_a_run_on_features_of_a_device(train, monkeypatch, objective):
    """The filter bank of devices, run on the CPU, gives the features that the workers give."""
    model = {"model.pretraining_objective": objective}
    expected = train("workers", max_updates=1, **model)
    monkeypatch.setattr(stream, "is_host", lambda device: False)
    found = train("device", max_updates=1, **model, **{"data.front_end": "device"})
    losses = [read_metrics(run / "metrics.jsonl")[-1]["loss"] for run in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_memory_may_change_when_a_run_is_resumed(train, tmp_path):
    small = train("small", max_updates=4, memory="small")
    train("changed", max_updates=4, memory="fast")
    shutil.rmtree(list_checkpoints(tmp_path / "changed")[-1])
    changed = train("changed", max_updates=4, resume="auto", memory="small")
    weights, expected = (load_file(path / "model" / "model.safetensors") for path in (changed, small))
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-3, atol=1e-4)


def test_patches_are_whitened_once(train, capsys):
    """The first checkpoint has the whitened projection, and a resumed run does not whiten it anew."""
    changes = {"patch_whitening": 0.5, "optimizer.learning_rate": 1e-12}
    straight = train("straight", max_updates=4, **changes)
    train("resumed", max_updates=2, **changes)
    resumed = train("resumed", max_updates=4, resume="auto", allow_changed_config="true", **changes)
    random = train("random", max_updates=1, **{"optimizer.learning_rate": 1e-12})
    name = "sslam.patch_embeddings.projection.weight"
    weights, resumed_weights, random_weights = (
        load_file(path / "model" / "model.safetensors") for path in (straight, resumed, random)
    )
    torch.testing.assert_close(resumed_weights[name], weights[name])
    torch.testing.assert_close(weights[name.replace("sslam", "teacher")], weights[name])
    assert torch.linalg.matrix_norm(weights[name].flatten(1) - random_weights[name].flatten(1)) > 1
    with pytest.raises(SystemExit) as stop:
        train("both", max_updates=1, patch_whitening=0.5, init_from=straight / "model")
    assert "give one of the two" in str(stop.value) + capsys.readouterr().err


def test_damaged_checkpoint_falls_back_to_the_one_before(train, caplog):
    straight, run = train("straight"), train()
    last = list_checkpoints(run)[-1]
    (last / "optimizer.pt").write_bytes(b"damaged")
    train(resume="auto")
    assert "optimizer.pt has 7 bytes" in caplog.text
    assert_same_run(run, straight)


def test_only_the_same_run_is_resumed(train, capsys):
    train(max_updates=3)

    def refusal(**changes) -> str:
        with pytest.raises(SystemExit) as stop:
            train(**changes)
        return str(stop.value)

    assert "holds a run" in refusal(max_updates=3)
    message = refusal(max_updates=6, resume="auto", **{"optimizer.betas": "0.8,0.9", "watch.every": 1})
    assert "max_updates (3 before, 6 now)" in message
    assert "optimizer.betas ([0.9, 0.95] before, [0.8, 0.9] now)" in message
    assert "watch" not in message
    assert "precision=no" in refusal(max_updates=3, resume="auto", mixed_precision="bf16")
    run = train(max_updates=6, resume="auto", allow_changed_config="true")
    assert list_checkpoints(run)[-1].name == "step-00000006"


# Stopping


def test_an_update_with_a_loss_that_is_not_finite_is_dropped(train, monkeypatch, caplog):
    honest = AudioLoader.input_values

    def with_a_bad_clip(self, batch, device):
        input_values = honest(self, batch, device)
        bad = [id_.endswith("clip05.flac") for id_ in batch["ids"]]
        return input_values.masked_fill(torch.tensor(bad)[:, None, None], float("nan"))

    monkeypatch.setattr(AudioLoader, "input_values", with_a_bad_clip)
    run = train(max_updates=8)
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert last["dropped_updates"] >= 1
    assert last["clips"] == (8 + last["dropped_updates"]) * 4
    messages = [record.message for record in caplog.records if "Dropped an update" in record.message]
    assert len(messages) == last["dropped_updates"]
    assert all("clip05.flac" in message for message in messages)
    assert all(tensor.isfinite().all() for tensor in load_file(run / "model" / "model.safetensors").values())


def with_infinite_batches(monkeypatch, numbers):
    """Make the batches with these numbers, from 1, infinite."""
    honest = AudioLoader.input_values
    monkeypatch.setattr(
        AudioLoader,
        "input_values",
        lambda self, batch, device: (
            honest(self, batch, device)
            * (float("inf") if self.num_clips // SETTINGS["batch_size"] in numbers else 1.0)
        ),
    )


def test_a_dropped_update_changes_no_weight_of_student_and_teacher(train, monkeypatch):
    with_infinite_batches(monkeypatch, {3, 5})
    states = []
    honest = trainer.Trainer.step

    def step(self, outputs, batches):
        before = {name: tensor.clone() for name, tensor in self.plain_model.state_dict().items()}
        states.append([before, values := honest(self, outputs, batches)])
        return values

    monkeypatch.setattr(trainer.Trainer, "step", step)
    train(max_updates=5)
    assert [values is None for _, values in states] == [False, False, True, False, True, False, False]
    for (before, values), (after, _) in pairwise(states):
        is_equal = {name: torch.equal(before[name], after[name]) for name in before if name.startswith("teacher.")}
        assert len(is_equal) > 10
        if values is None:
            assert all(torch.equal(before[name], after[name]) for name in before)
        else:
            assert not any(is_equal[name] for name in is_equal if name.endswith("weight"))


def test_good_updates_between_dropped_ones_count(train, monkeypatch):
    with_infinite_batches(monkeypatch, {2, 4, 6})
    run = train(max_updates=5, **{"watch.max_dropped": 2})
    last = read_metrics(run / "metrics.jsonl")[-1]
    assert (last["update"], last["dropped_updates"]) == (5, 3)


@pytest.mark.parametrize("bound", [1e-9, 1e-7])
def test_an_update_follows_the_clipped_gradient(bound, train, monkeypatch):
    honest = trainer.Trainer.step
    errors = []

    def step(self, outputs, batches):
        parameters = [p for p in self.plain_model.parameters() if p.grad is not None]
        before, gradients = [p.detach().clone() for p in parameters], [p.grad.clone() for p in parameters]
        norm = torch.stack([g.norm() for g in gradients]).norm()
        values = honest(self, outputs, batches)
        if self.progress.update == 1:
            assert values["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
            assert norm > 100 * bound
            for parameter, old, gradient in zip(parameters, before, gradients, strict=True):
                # In AdamW's first step, the bias-corrected moments are the gradient and its square.
                clipped = gradient * (bound / norm)
                step_size = self.learning_rate * clipped / (clipped.abs() + 1e-8)
                errors.append((old - step_size - parameter.detach()).abs().max().item())
        return values

    monkeypatch.setattr(trainer.Trainer, "step", step)
    train(max_updates=2, **{"optimizer.max_grad_norm": bound, "optimizer.weight_decay": 0})
    # Without clipping, every weight moves by the learning rate of 5e-4.
    assert len(errors) > 10
    assert max(errors) < 1e-6


def test_too_many_dropped_updates_in_a_row_stop_the_run(train, monkeypatch, tmp_path):
    honest = AudioLoader.input_values
    monkeypatch.setattr(
        AudioLoader,
        "input_values",
        lambda self, batch, device: honest(self, batch, device) * (float("inf") if self.num_clips > 20 else 1.0),
    )
    with pytest.raises(SystemExit) as stop:
        train(max_updates=40, **{"watch.max_dropped": 3})
    assert "3 updates in a row" in str(stop.value)
    assert str(stop.value).count(".flac") == 3 * 4
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert checkpoint.name == "step-00000003"


def test_data_of_nothing_but_unusable_clips_stops_the_run(train, tmp_path):
    (tmp_path / "broken").mkdir()
    for i in range(8):
        (tmp_path / "broken" / f"{i}.flac").write_bytes(b"no sound")
    with pytest.raises(SystemExit, match=r"clips of .* are unusable .*undecodable.*Mend the data"):
        train(**{"data.source": tmp_path / "broken"})


def test_collapse_stops_the_run(train):
    with pytest.raises(SystemExit, match=r"target_var=.*less than watch\.min_target_var=5\.0 at update 4"):
        train(**{"watch.min_target_var": 5, "watch.collapse_after": 3})


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint_intact(train, monkeypatch, tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    honest = trainer.save_optimizer

    def fill_up(folder, *arguments):
        if folder.name.endswith("6"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        honest(folder, *arguments)

    monkeypatch.setattr(trainer, "save_optimizer", fill_up)
    try:
        with pytest.raises(SystemExit, match="step-00000006 could not be written"):
            train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]
    monkeypatch.undo()
    assert_same_run(train(resume="auto"), train("straight"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "compile_mode=cuda_graphs needs --compile true"),
        ({"compile": "true", "gradient_accumulation_steps": 2}, "cuda_graphs with gradient_accumulation_steps=2"),
    ],
)
def test_impossible_cuda_graphs_are_refused(train, capsys, changes, message):
    with pytest.raises(SystemExit):
        train(compile_mode="cuda_graphs", **changes)
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:`log_with=comet_ml`")
def test_impossible_runs_are_refused(train):
    with pytest.raises(SystemExit, match=r"data\.source='/nowhere/at/all'"):
        train(**{"data.source": "/nowhere/at/all"})
    with pytest.raises(SystemExit, match=r"model: .*nowhere"):
        train(init_from="/nowhere/at/all")
    with pytest.raises(SystemExit, match=r"model: .*hidden_size=30"):
        train(**{"model.hidden_size": 30})
    with pytest.raises(SystemExit, match=r"output_dir='/dev/null/run' cannot be made"):
        train(output_dir="/dev/null/run")
    with pytest.raises(SystemExit, match="fp16 needs a GPU"):
        train(mixed_precision="fp16")
    with pytest.raises(SystemExit, match=r"batch_size=1.*needs at least 2"):
        train(batch_size=1)
    graphs = {"compile": "true", "compile_mode": "cuda_graphs"}
    with pytest.raises(SystemExit, match=r"1 process\(es\) and memory=auto on cpu: CUDA graphs need"):
        train(**graphs)
    with pytest.raises(SystemExit, match=r"watch\.tracker='comet_ml' is not installed"):
        train(**{"watch.tracker": "comet_ml"})


def test_an_overflow_in_fp16_lowers_the_loss_scale_and_nothing_else(train, monkeypatch):
    class WithScaler(start_of_processes.Accelerator):
        """An accelerator with the loss scaling of fp16, also on a CPU."""

        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22)
            self.native_amp = True
            self.state._mixed_precision = "fp16"

    straight = train("straight", max_updates=4)
    monkeypatch.setattr(start_of_processes, "Accelerator", WithScaler)
    run = train(max_updates=4)
    row = read_metrics(run / "metrics.jsonl")[-1]
    assert row["dropped_updates"] > 0
    assert row["loss_scale"] == 2.0 ** (22 - row["dropped_updates"])
    assert row["learning_rate"] == read_metrics(straight / "metrics.jsonl")[-1]["learning_rate"]
    assert row["ema_decay"] == read_metrics(straight / "metrics.jsonl")[-1]["ema_decay"]
    state = json.loads((list_checkpoints(run)[-1] / "trainer.json").read_text())
    assert state["scaler"]["scale"] == row["loss_scale"]
    train(max_updates=6, resume="auto", allow_changed_config="true")
    assert read_metrics(run / "metrics.jsonl")[-1]["dropped_updates"] == row["dropped_updates"]


@pytest.mark.parametrize(
    "path", sorted(Path(pretrain.__file__).parent.glob("configs/pretrain_*.yaml")), ids=lambda path: path.stem
)
def test_shipped_configurations_are_complete(path):
    config = parse(pretrain.PretrainConfig, ["--config", str(path)])
    overrides = {key: value for key, value in asdict(config.model).items() if value is not None}
    model_config = SSLAMConfig(**overrides)
    if "stage2" in path.stem and "tiny" not in path.stem:
        assert (model_config.num_clones, config.optimizer.learning_rate) == (8, 5e-5)
        assert (config.max_updates, config.optimizer.warmup_updates) == (200_000, 25_000)
        assert config.init_from == "runs/stage1/model"
    if "stage1" in path.stem:
        assert (model_config.num_clones, model_config.pretraining_objective) == (16, "ua")
        assert (config.max_updates, config.optimizer.warmup_updates) == (400_000, 53_333)
    if "large" in path.stem:
        large = SSLAMConfig.large(pretraining_objective="ua", num_clones=16)
        assert model_config.to_dict() == large.to_dict()
        assert config.optimizer.learning_rate == 4e-4

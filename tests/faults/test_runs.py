"""Runs that meet another run, a kill, a full disk, damaged files or failing processes lose nothing and give a reason.

The children of these tests are forked and killed with SIGKILL, as the system does when memory runs out.
"""

import csv
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForPreTraining
from modeling_sslam.common import files
from training import evaluate, finetune, linear_eval, prepare, pretrain, report
from training.data.loader import AudioLoader
from training.linear import features, outcome
from training.run.checkpointing import (
    BEST,
    CheckpointError,
    checkpoint_path,
    find_fault,
    latest_checkpoint,
    list_checkpoints,
    rotate,
    write_checkpoint,
)
from training.run.metrics_log import append_metrics, read_metrics, truncate_metrics

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODEL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "num_mel_bins": 32,
    "max_length": 64,
    "num_clones": 2,
    "decoder_num_layers": 2,
}
SETTINGS = {
    **{f"model.{name}": value for name, value in MODEL.items()},
    "max_updates": 4,
    "batch_size": 2,
    "data.num_workers": 0,
    "optimizer.warmup_updates": 2,
    "watch.every": 1,
    "watch.tracker": "none",
    "checkpoint.every": 2,
    "resume": "auto",
}
fork = multiprocessing.get_context("fork")


def reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def _fresh_processes():
    reset_accelerate()


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of 16 tones and noises in two folds."""
    folder = tmp_path_factory.mktemp("sounds")
    rng = np.random.default_rng(0)
    rows = [("path", "category", "split")]
    for i in range(16):
        wave = rng.standard_normal(9600) if i % 2 else np.sin(2 * np.pi * rng.uniform(200, 400) * np.arange(9600))
        soundfile.write(folder / f"{i:02d}.flac", 0.1 * wave, 16_000)
        rows.append((f"{i:02d}.flac", ("tone", "noise")[i % 2], ("train", "train", "validation", "test")[i // 2 % 4]))
    with open(folder / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder / "clips.csv"


@pytest.fixture
def arguments(table, tmp_path):
    """A function that returns the command line of a pre-training in `tmp_path/run`."""

    def arguments(**changes):
        settings = SETTINGS | {"data.source": table.parent, "output_dir": tmp_path / "run"} | changes
        return [f"--{name}={value}" for name, value in settings.items()]

    return arguments


@pytest.fixture
def train(arguments, tmp_path):
    """A function that pre-trains in this process and returns the run's folder."""

    def train(**changes):
        reset_accelerate()
        pretrain.main(arguments(**changes))
        return tmp_path / "run"

    return train


@pytest.fixture(scope="module")
def finished(table, tmp_path_factory):
    """A finished run."""
    run = tmp_path_factory.mktemp("finished") / "run"
    reset_accelerate()
    settings = SETTINGS | {"data.source": table.parent, "output_dir": run}
    pretrain.main([f"--{name}={value}" for name, value in settings.items()])
    return run


@pytest.fixture
def run(finished, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(finished, tmp_path / "run")


def hidden(folder):
    return sorted(path for path in folder.rglob(".*"))


@contextmanager
def full_disk(room):
    """Let no file grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def wait_for(condition, seconds=100):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition was never met"
        time.sleep(0.01)


# Two runs in one folder


def test_the_second_of_two_runs_ends_and_the_first_goes_on(arguments, train, tmp_path):
    changes = {"max_updates": 100_000, "data.num_workers": 1}
    first = fork.Process(target=pretrain.main, args=(arguments(**changes),))
    first.start()
    metrics = tmp_path / "run" / "metrics.jsonl"
    try:
        wait_for(lambda: read_metrics(metrics))
        for _ in range(2):
            with pytest.raises(SystemExit) as end:
                train(**changes)
            message = str(end.value)
            assert f"in use by process {first.pid} on {socket.gethostname()} since 2" in message
            assert "--output_dir" in message
            assert "\n" not in message
        seen = len(read_metrics(metrics))
        wait_for(lambda: len(read_metrics(metrics)) > seen and list_checkpoints(tmp_path / "run"))
        assert first.is_alive()
    finally:
        first.kill()
        first.join()
    # The killed run no longer holds the lock, even if its data worker is still alive.
    wanted = int(list_checkpoints(tmp_path / "run")[-1].name[-8:]) + 2
    run = train(**changes | {"max_updates": wanted}, allow_changed_config="true")
    assert [row["update"] for row in read_metrics(metrics)] == list(range(1, wanted + 1))
    assert hidden(run) == []


@pytest.fixture
def held():
    """A function that lets another process hold the lock of a folder until the end of the test."""
    children = []

    def held(folder):
        from training.run.lock import locked_folder

        def hold(ready):
            with locked_folder(folder):
                ready.set()
                signal.pause()

        ready = fork.Event()
        children.append(fork.Process(target=hold, args=(ready,)))
        children[-1].start()
        assert ready.wait(10)
        return children[-1].pid

    yield held
    for child in children:
        child.kill()
        child.join()


@pytest.mark.parametrize(
    ("program", "name", "options"),
    [
        (pretrain, "out", []),
        (finetune, "out", ["--model=none", "--max_updates=1"]),
        (finetune, "out/a", ["--model=none", "--max_updates=1", "--folds=a,b"]),
        (linear_eval, "out", ["--model=none"]),
        (linear_eval, "out", ["--model=none", "--mode=published"]),
        (evaluate, "out", ["--model=none"]),
    ],
)
def test_every_program_respects_the_lock(program, name, options, held, tmp_path):
    (tmp_path / "out").mkdir()
    pid = held(tmp_path / name)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=f"^error: .*{name} is in use by process {pid} on"):
        program.main(["--data.source=nowhere", f"--output_dir={tmp_path / 'out'}", *options])
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lock_leaves_no_folder_behind(tmp_path):
    (tmp_path / "model").mkdir()
    model, out = tmp_path / "model", tmp_path / "deep" / "out"
    with pytest.raises(SystemExit, match="model="):
        evaluate.main(["--data.source=nowhere", f"--model={model}", f"--output_dir={out}"])
    assert list(tmp_path.rglob("*")) == [model]


# Kills


def kill_at_every_step(task, check, exchange, monkeypatch):
    """Run `task` in children that are killed before and after each step that changes the disk, and `check` each."""
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    steps = [(files, "_exchange"), (Path, "rename"), (Path, "replace"), (shutil, "rmtree"), (files, "force_to_disk")]
    for number in range(200):
        child = fork.Process(target=_killed_at, args=(task, steps, number))
        child.start()
        child.join()
        check()
        if child.exitcode == 0:
            return
        assert child.exitcode == -signal.SIGKILL
    raise AssertionError("the task has no end")


def _killed_at(task, steps, number):
    count = 0

    def counted(honest):
        def step(*arguments, **options):
            nonlocal count
            for moment in range(2):
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                if moment == 0:
                    result = honest(*arguments, **options)
            return result

        return step

    for owner, name in steps:
        setattr(owner, name, counted(getattr(owner, name)))
    task()


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
@pytest.mark.parametrize("name", [BEST, "checkpoints/step-00000002"])
def test_a_kill_leaves_the_old_or_the_new_folder(name, exchange, monkeypatch, tmp_path):
    accelerator = Accelerator(cpu=True)
    target = tmp_path / name

    def write(text):
        write_checkpoint(target, lambda folder: (folder / "weights").write_text(text), accelerator)

    write("old")
    seen = set()

    def check():
        if exchange:
            assert find_fault(target) is None
        files.remove_leftovers(tmp_path)  # every start of a run does the same
        assert find_fault(target) is None
        seen.add((target / "weights").read_text())
        assert hidden(tmp_path) == []

    kill_at_every_step(lambda: write("new"), check, exchange, monkeypatch)
    assert seen == {"old", "new"}


@pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "two renames"])
def test_a_report_works_after_a_kill_in_another(exchange, run, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    monkeypatch.setattr(report, "plot_curves", lambda rows, path, title: path.write_bytes(b"picture"))

    def check():
        report.main()
        assert (run / "curves.png").read_bytes() == b"picture"
        assert (run / "model" / "model.safetensors").stat().st_mode & 0o044
        assert "4 of 4" in (run / "model" / "README.md").read_text()
        assert hidden(run) == []

    # Flushing the files takes many steps, and a kill between two of them changes nothing, so it is left out.
    monkeypatch.setattr(files, "force_to_disk", lambda path: None)
    kill_at_every_step(report.main, check, exchange, monkeypatch)


def test_a_report_of_a_run_that_goes_on_leaves_its_files_alone(run, held, monkeypatch):
    held(run)
    unfinished = files.temporary_path(checkpoint_path(run, 6))
    unfinished.mkdir()
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    report.main()
    assert unfinished.is_dir()


def test_what_a_killed_preparation_unpacked_is_removed_by_the_next(table, monkeypatch, tmp_path):
    source = tmp_path / "ESC-50"
    shutil.copytree(table.parent, source / "audio")
    (source / "meta").mkdir()
    lines = [f"{i:02d}.flac,{1 + i % 5},{i % 2},{('dog', 'cat')[i % 2]},False,0,A\n" for i in range(16)]
    (source / "meta" / "esc50.csv").write_text("filename,fold,target,category,esc10,src_file,take\n" + "".join(lines))
    archive = shutil.make_archive(str(tmp_path / "esc"), "zip", tmp_path, "ESC-50")
    work = tmp_path / "work"

    def killed():
        prepare.DATASETS["esc50"].list_clips = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        prepare.main(["esc50", archive, str(work / "out")])

    child = fork.Process(target=killed)
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert list(work.rglob("00.flac"))
    prepare.main(["esc50", archive, str(work / "out")])
    assert [path.name for path in work.iterdir()] == ["out"]
    assert hidden(work) == []


# A full disk


def test_a_full_disk_at_the_end_of_a_run(train, monkeypatch, tmp_path):
    honest = report.write_report
    for room in (2_000, 150_000):  # no room for the curves, or none for the weights

        def on_full_disk(run_dir, room=room):
            with full_disk(room):
                honest(run_dir)

        monkeypatch.setattr(pretrain, "write_report", on_full_disk)
        with pytest.raises(SystemExit, match=r"^error: The report of .*run cannot be written: .*report") as end:
            train()
        assert "\n" not in str(end.value)
        assert hidden(tmp_path / "run") == []
        assert not (tmp_path / "run" / "model").exists()
    honest(tmp_path / "run")
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_a_full_disk_while_the_log_is_written(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("x" * 999)
    with full_disk(1000), pytest.raises(OSError, match=r"metrics\.jsonl could not be written"):
        append_metrics(tmp_path / "metrics.jsonl", {"update": 1})


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    SSLAMForPreTraining(SSLAMConfig(**MODEL, max_position_embeddings=8)).save_pretrained(folder)
    SSLAMFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("place", "room"), [("results", 500), ("model", 60_000), ("cache", 5_000), ("merge", 5_000), ("merge", 12_300)]
)
def test_a_full_disk_in_linear_evaluation(place, room, encoder, table, monkeypatch, tmp_path):
    owner, name = {
        "results": (outcome, "write_results"),
        "model": (outcome, "write_model"),
        "cache": (features, "_write_part"),
        "merge": (features, "_merge_parts"),
    }[place]
    honest = getattr(owner, name)

    def on_full_disk(*arguments):
        with full_disk(room):
            return honest(*arguments)

    monkeypatch.setattr(owner, name, on_full_disk)
    options = {"model": encoder, "data": table, "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    options |= {"data.num_workers": 0, "head.epochs": 1}
    with pytest.raises(SystemExit, match=r"^error: .*(cannot be|could not be|File too large)") as end:
        linear_eval.main([f"--{key}={value}" for key, value in options.items()])
    assert "\n" not in str(end.value)
    assert [path for path in hidden(tmp_path) if path.suffix != ".lock"] == []
    assert not (tmp_path / "out" / "model").exists()


def test_damaged_features_are_computed_anew(encoder, table, tmp_path, caplog):
    options = {"model": encoder, "data": table, "output_dir": tmp_path / "out", "cache_dir": tmp_path / "cache"}
    argv = [f"--{key}={value}" for key, value in (options | {"data.num_workers": 0, "head.epochs": 1}).items()]
    linear_eval.main(argv)
    before = json.loads((tmp_path / "out" / "results.json").read_text())["metrics"]
    train, test, validation = (
        sorted((tmp_path / "cache").glob("[a-z]*"))[::2] + sorted((tmp_path / "cache").glob("[a-z]*"))[1:2]
    )
    (train / "features.npy").write_bytes((train / "features.npy").read_bytes()[:-100])
    (test / "clips.json").write_text("[]")
    (validation / "clips.json").unlink()
    reset_accelerate()
    linear_eval.main(argv)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["metrics"] == before
    assert caplog.text.count("are damaged") == 3


# Damaged files


@pytest.fixture
def save(tmp_path):
    """A function that writes the checkpoint of an update."""
    accelerator = Accelerator(cpu=True)

    def save(update):
        target = checkpoint_path(tmp_path, update)
        write_checkpoint(target, lambda folder: (folder / "weights").write_text(f"{update}"), accelerator)
        return target

    return save


@pytest.mark.parametrize(
    "content",
    [
        *(b"[]", b"{}", b"3", b"null", b'"weights"', b'["weights"]', b"[" * 100_000),
        *(b'{"weights": 1}', b'{"weights": []}', b'{"weights": {"a": 1, "b": 2}}', b'{"weights": [1, 2, 3]}'),
        *(b'{"a\\u0000b": [1, 2]}', b'{"\\ud800": [1, 2]}'),
        *('{"weights": "\xe9"}'.encode("latin-1"), '{"weights": [1, 2]}'.encode("utf-16")),
    ],
    ids=lambda content: repr(content[:30]),
)
def test_a_manifest_of_another_kind_is_a_damage(content, save, tmp_path, caplog):
    before, last = save(1), save(2)
    (last / "manifest.json").write_bytes(content)
    assert latest_checkpoint(tmp_path) == before
    assert f"{last} is damaged" in caplog.text


@pytest.mark.parametrize("damage", ["dangling link", "link to itself", "file", "unreadable"])
def test_a_checkpoint_that_cannot_be_read_is_passed_over(damage, save, tmp_path):
    before, last = save(1), checkpoint_path(tmp_path, 2)
    if damage == "unreadable":
        save(2)
        (last / "weights").unlink()
        (last / "weights").symlink_to("/proc/self/mem")  # reading fails even for root
        (last / "manifest.json").write_text('{"weights": [0, 0]}')
    elif damage == "file":
        last.write_text("no folder")
    else:
        last.symlink_to(last if damage == "link to itself" else "nowhere")
    assert latest_checkpoint(tmp_path) == before
    # The damaged checkpoint does not count among those that are kept. A new checkpoint of the same update replaces it.
    following = checkpoint_path(tmp_path, 1)
    rotate(following, keep=1)
    assert latest_checkpoint(tmp_path) == before
    if damage != "file":
        assert find_fault(save(2)) is None
        rotate(last, keep=1)
        assert list_checkpoints(tmp_path) == [last]


def test_a_damaged_checkpoint_in_the_way_is_one_line(save, tmp_path):
    checkpoint_path(tmp_path, 1).parent.mkdir()
    checkpoint_path(tmp_path, 1).parent.joinpath("step-00000001").write_text("no folder")
    with pytest.raises(CheckpointError, match="step-00000001"), full_disk(0):
        save(1)


def test_a_log_that_is_not_utf8_loses_its_damaged_lines_alone(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    damaged = [b'{"update": 2, "note": "\xe9"}', b"[2]", b"", b'{"loss": 1}', b'{"update": "2"}', b"[" * 100_000]
    content = b"\n".join([b'{"update": 1}', *damaged, b'{"update": 3}', b'{"update": 4}', b""])
    path.write_bytes(content)
    assert [row["update"] for row in read_metrics(path)] == [1, 3, 4]
    assert "metrics.jsonl: left out damaged lines (2, 3, 4, 5, 6, 7)" in caplog.text
    truncate_metrics(path, 3)
    assert path.read_text() == '{"update": 1}\n{"update": 3}\n'
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content


def test_a_run_continues_beside_damaged_files_and_keeps_the_users_own(train, monkeypatch):
    run = train(max_updates=2)
    (run / "metrics.jsonl").write_bytes("größer\n".encode("latin-1") + (run / "metrics.jsonl").read_bytes())
    (run / "checkpoints" / "step-00000003").symlink_to("nowhere")
    own = [run / ".tmp-mine" / "notes", run / "checkpoints" / ".tmp-old-mine" / "notes"]
    for path in own:
        path.parent.mkdir()
        path.write_text("mine")
    train(max_updates=4, allow_changed_config="true", **{"checkpoint.keep": 1})
    assert [row["update"] for row in read_metrics(run / "metrics.jsonl")] == [1, 2, 3, 4]
    assert latest_checkpoint(run) == checkpoint_path(run, 4)
    assert [path.read_text() for path in own] == ["mine", "mine"]


@pytest.mark.parametrize("content", [b"\xe9", b"[]", b"a: [", b"{}", b""])
def test_a_report_with_damaged_settings_is_one_line(content, run, monkeypatch):
    (run / "config.yaml").write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["report", str(run)])
    with pytest.raises(SystemExit, match=r"^error: .*config\.yaml"):
        report.main()
    assert hidden(run) == []


def test_a_report_passes_over_damaged_best_weights(run, caplog, monkeypatch):
    shutil.copytree(list_checkpoints(run)[-1], run / BEST)
    (run / BEST / "model.safetensors").write_bytes(b"damaged")
    report.write_report(run)
    assert "best is damaged" in caplog.text
    assert (run / "model" / "model.safetensors").read_bytes() == (
        list_checkpoints(run)[-1] / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("content", [b"[]", b"\xe9", b"3", b"{"])
def test_results_that_are_none_are_one_line(content, encoder, tmp_path):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(SystemExit, match=r"^error: .*results\.json is not of an evaluation"):
        linear_eval.main([f"--model={encoder}", "--data=nowhere", f"--output_dir={tmp_path}"])


# Failing processes


def test_a_killed_data_worker_is_one_line(train, monkeypatch):
    honest = AudioLoader.input_values

    def kill_workers(self, batch, device):
        # A forked worker has the command line of its parent; helpers of multiprocessing, from other tests, do not.
        main = psutil.Process()
        for child in main.children():
            if child.cmdline() == main.cmdline():
                child.kill()
        return honest(self, batch, device)

    monkeypatch.setattr(AudioLoader, "input_values", kill_workers)
    with pytest.raises(SystemExit, match=r"^error: A data worker was lost: .*killed.*data\.num_workers"):
        train(max_updates=50, **{"data.num_workers": 1})


PROGRAM = """
import os, signal
from training import pretrain
from training.data.config import DataError
from training.data.loader import AudioLoader

honest, calls = AudioLoader.input_values, []

def failing(self, batch, device):
    calls.append(batch)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        raise DataError("the reason of it all")
    return honest(self, batch, device)

AudioLoader.input_values = failing
pretrain.main()
"""


def test_of_two_processes_one_says_the_reason(arguments, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    done = subprocess.run(
        [*launcher, str(tmp_path / "program.py"), *arguments()],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    assert done.stderr.count("error: the reason of it all") == 1
    # The launcher's own traceback, which no program can prevent. Its summary ends with the reason.
    assert done.stderr.count("Traceback (most recent call last)") == 1
    assert "gloo" not in done.stderr
    *_, last, _rule = done.stderr.rstrip().splitlines()
    assert last.split(": ", 1)[1] == "the reason of it all"

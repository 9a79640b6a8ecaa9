import random
import resource

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from modeling_sslam.common.files import TEMPORARY_PREFIX, remove_leftovers
from training.run.checkpointing import (
    CheckpointError,
    checkpoint_path,
    find_fault,
    latest_checkpoint,
    list_checkpoints,
    rng_state,
    rotate,
    save_tensors,
    set_rng_state,
    write_checkpoint,
)
from training.run.metrics_log import append_metrics, read_metrics, truncate_metrics


@pytest.fixture
def save(tmp_path):
    """A function that writes the checkpoint of an update, with `size` bytes that identify it."""
    accelerator = Accelerator(cpu=True)

    def save(update: int, size: int = 5000, run_dir=tmp_path):
        def write(folder):
            (folder / "deeper").mkdir()
            (folder / "deeper" / "weights.bin").write_bytes(bytes([update]) * size)
            save_tensors({"tensor": torch.full((size,), float(update))}, folder / "state.pt")

        write_checkpoint(checkpoint_path(run_dir, update), write, accelerator)
        return checkpoint_path(run_dir, update)

    return save


def test_latest_intact_checkpoint_is_found(save, tmp_path):
    assert latest_checkpoint(tmp_path) is None
    paths = [save(update) for update in (2, 10, 9)]
    assert list_checkpoints(tmp_path) == [paths[0], paths[2], paths[1]]
    assert latest_checkpoint(tmp_path) == paths[1]
    assert find_fault(paths[1]) is None


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "no manifest", "broken manifest"])
def test_a_damaged_checkpoint_is_passed_over(damage, save, tmp_path, caplog):
    before, last = save(1), save(2)
    weights = last / "deeper" / "weights.bin"
    if damage == "flip":
        content = bytearray(weights.read_bytes())
        content[1234] ^= 1
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "remove":
        weights.unlink()
    elif damage == "no manifest":
        (last / "manifest.json").unlink()
    else:
        (last / "manifest.json").write_text('{"deeper')
    assert latest_checkpoint(tmp_path) == before
    assert str(last) in caplog.text


def test_a_checkpoint_can_be_written_again(save, tmp_path):
    path = save(3)
    (path / "state.pt").unlink()
    assert save(3, size=7) == path
    assert find_fault(path) is None
    assert (path / "deeper" / "weights.bin").stat().st_size == 7
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_rotation_keeps_the_latest(save, tmp_path):
    for update in range(1, 6):
        save(update)
    rotate(checkpoint_path(tmp_path, 5), keep=2)
    assert list_checkpoints(tmp_path) == [checkpoint_path(tmp_path, 4), checkpoint_path(tmp_path, 5)]


def test_only_leftovers_are_removed(save, tmp_path):
    path = save(1)
    (path.parent / f"{TEMPORARY_PREFIX}step-00000002" / "deeper").mkdir(parents=True)
    (tmp_path / f"{TEMPORARY_PREFIX}config.yaml").write_text("half")
    (tmp_path / ".tmp-mine").write_text("a user's own")
    remove_leftovers(tmp_path)
    assert not list(tmp_path.rglob(".sslam-*"))
    assert (tmp_path / ".tmp-mine").read_text() == "a user's own"
    assert find_fault(path) is None


def test_a_full_disk_leaves_the_last_checkpoint(save, tmp_path):
    good = save(1, size=5000)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(CheckpointError, match=r"step-00000002 could not be written.*--resume auto"):
            save(2, size=15_000)  # the plain file fits, the tensor does not
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert latest_checkpoint(tmp_path) == good
    assert list(good.parent.iterdir()) == [good]


def test_the_error_names_an_unwritable_folder(save, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="file"):
        save(1, run_dir=tmp_path / "file")


def test_random_numbers_continue_after_a_restore(tmp_path):
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item(), random.gauss(0, 1)  # noqa: NPY002

    draw()
    torch.save(rng_state(), tmp_path / "rng.pt")
    expected = draw()
    draw()
    set_rng_state(torch.load(tmp_path / "rng.pt", weights_only=True))
    assert draw() == expected


def test_metrics_do_not_repeat_after_a_kill(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    for update in (10, 20, 30):
        append_metrics(path, {"update": update, "loss": 0.1})
    with open(path, "a") as file:
        file.write('{"update": 40, "lo')
    assert [row["update"] for row in read_metrics(path)] == [10, 20, 30]
    truncate_metrics(path, 20)
    append_metrics(path, {"update": 30, "loss": 0.2})
    assert [(row["update"], row["loss"]) for row in read_metrics(path)] == [(10, 0.1), (20, 0.1), (30, 0.2)]

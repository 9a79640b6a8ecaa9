"""Checkpoints that are either complete or absent, and from which a run continues exactly.

A checkpoint is a folder `checkpoints/step-00001000`:

- `model.safetensors`, `config.json` and the other files of `save_pretrained`: student, decoder and teacher. So every
  checkpoint is also a model folder, for `from_pretrained` and for starting another run;
- `optimizer.pt`: the optimiser's state by parameter name, unsharded, for any distribution over devices;
- `rank-00000.pt`, ...: each process's own state, such as random number generators and its position in the data;
- `trainer.json`: the run's progress and settings;
- `manifest.json`: size and checksum of all these files.

All files are written into a hidden folder, forced to disk and renamed at the end. A process that is killed at any
moment leaves complete checkpoints and, at worst, a hidden folder that the next start removes. The manifest reveals
later damage. Only tensors and plain values are unpickled (`weights_only`).
"""

import json
import logging
import random
import shutil
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from modeling_sslam.common.files import remove, replacing, temporary_path
from modeling_sslam.common.text import escape_controls

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# A run's model folder with the weights of its best evaluation.
BEST = "best"
WRITE_ERRORS = (OSError, SafetensorError)


class CheckpointError(Exception):
    """A checkpoint cannot be written. The message gives the reason and the remedy."""


def checkpoint_path(run_dir: Path, update: int) -> Path:
    """Return the folder of an update's checkpoint."""
    return run_dir / "checkpoints" / f"step-{update:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the checkpoints of a run in their order, including damaged ones."""
    return sorted((run_dir / "checkpoints").glob("step-*[0-9]"))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """Return the latest intact checkpoint, or `None`."""
    for path in reversed(list_checkpoints(run_dir)):
        fault = find_fault(path)
        if fault is None:
            return path
        logger.warning("Checkpoint %s is damaged (%s); trying the one before.", path, fault)
    return None


def find_fault(checkpoint: Path) -> str | None:
    """Compare a checkpoint with its manifest. Return the first difference, or `None`."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST}: {error}"
    if not (isinstance(manifest, dict) and manifest):
        return f"{MANIFEST} does not list files"
    for name, entry in manifest.items():
        path, shown = checkpoint / name, escape_controls(name)
        try:
            if not path.is_file():
                return f"{shown} is missing"
            match entry:
                case [size, checksum]:
                    if path.stat().st_size != size:
                        return f"{shown} has {path.stat().st_size} bytes, not {size}"
                    if _checksum(path) != checksum:
                        return f"{shown} does not have the checksum that it was written with"
                case _:
                    return f"{MANIFEST} has no size and checksum of {shown}"
        except (OSError, ValueError) as error:
            return f"{shown} cannot be read: {error}"
    return None


def write_checkpoint(target: Path, write: Callable[[Path], None], accelerator: Accelerator) -> None:
    """Write a folder with a manifest, completely or not at all. Call it in every process.

    Args:
        target: The folder's final place.
        write: Fills the folder that it is given. It is called in every process with the same hidden folder.
        accelerator: The processes.

    Raises:
        CheckpointError: If the folder cannot be written. `target` then keeps its content.
    """
    is_main = accelerator.is_main_process
    try:
        if is_main:
            target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) if is_main else nullcontext(temporary_path(target)) as temporary:
            if is_main:
                temporary.mkdir()
            accelerator.wait_for_everyone()
            write(temporary)
            accelerator.wait_for_everyone()
            if is_main:
                files = sorted(path for path in temporary.rglob("*") if path.is_file())
                manifest = {str(path.relative_to(temporary)): [path.stat().st_size, _checksum(path)] for path in files}
                (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    except WRITE_ERRORS as error:
        raise CheckpointError(
            f"{target} could not be written: {error}. The disk may be full, or the folder not writable. Earlier "
            "checkpoints are intact; make room and continue with --resume auto."
        ) from error
    accelerator.wait_for_everyone()


def copy_model(checkpoint: Path, folder: Path) -> None:
    """Copy the files of a checkpoint that `from_pretrained` needs into a new `folder`."""
    others = shutil.ignore_patterns("optimizer.pt", "rank-*.pt", "trainer.json", MANIFEST)
    try:
        shutil.copytree(checkpoint, folder, ignore=others)
    except shutil.Error as error:  # holds a list of all failures
        raise OSError(error.args[0][0][2]) from error


def rotate(latest: Path, keep: int) -> None:
    """Remove all checkpoints of a run up to `latest` but the last `keep`. Later ones are damaged and do not count."""
    run_dir = latest.parents[1]
    for path in [path for path in list_checkpoints(run_dir) if path <= latest][:-keep]:
        # Renamed first, so that a checkpoint is complete or absent also during its removal.
        doomed = temporary_path(path)
        remove(doomed)
        path.rename(doomed)
        remove(doomed)


def save_optimizer(folder: Path, accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer) -> None:
    """Write the optimiser's state. Call it in every process: with FSDP each of them holds a part."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer.optimizer, options=options)
    if accelerator.is_main_process:
        save_tensors(state, folder / "optimizer.pt")


def load_optimizer(folder: Path, model: nn.Module, optimizer: AcceleratedOptimizer) -> None:
    """Load the optimiser's state from a checkpoint."""
    state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    set_optimizer_state_dict(
        model, optimizer.optimizer, optim_state_dict=state, options=StateDictOptions(full_state_dict=True)
    )


def save_tensors(state: dict[str, Any], path: Path) -> None:
    """Save tensors and plain values.

    Raises:
        OSError: If the file cannot be written. (torch raises a RuntimeError.)
    """
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(f"{path.name}: {error}") from error


def rng_state() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's global generators as plain values."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002 - libraries draw from it
    inner = numpy_state["state"]
    return {
        "python": random.getstate(),
        # As `get_state()` orders them.
        "numpy": (
            numpy_state["bit_generator"],
            inner["key"].tolist(),
            inner["pos"],
            numpy_state["has_gauss"],
            numpy_state["gauss"],
        ),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Restore the states that `rng_state` returned."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _checksum(path: Path) -> int:
    """Return the CRC-32 of a file."""
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum

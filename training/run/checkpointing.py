"""Checkpoints that are either whole or not there, and that continue a run exactly.

A checkpoint is a folder `checkpoints/step-00001000`:

- `model.safetensors`, `config.json` and the rest of `save_pretrained`: student, decoder and teacher. So every
  checkpoint is a model folder as well, for `from_pretrained` and for starting another run;
- `optimizer.pt`, by parameter names and unsharded, however the run was spread over devices;
- `rank-00000.pt`, ...: what each process has for itself, such as random number generators and its place in the data;
- `trainer.json`: where the run is, and the settings it is run with;
- `manifest.json`: size and checksum of all these.

Everything is written into a hidden folder beside it, forced to disk and renamed at the end: a process killed at any
moment leaves whole checkpoints and, at worst, a hidden folder that the next start removes. The manifest tells of
damage that came later. Nothing is unpickled but tensors and plain values (`weights_only`).
"""

import json
import logging
import random
import shutil
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
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

from modeling_sslam.common.files import publish, temporary_path

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# The model folder of a run with the weights that its evaluations chose.
BEST = "best"
WRITE_ERRORS = (OSError, SafetensorError)


@dataclass
class CheckpointConfig:
    every: int = field(default=5000, metadata={"help": "Updates between checkpoints."})
    keep: int = field(default=2, metadata={"help": "Latest checkpoints to keep."})

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class CheckpointError(Exception):
    """A checkpoint that cannot be written or read; the message says what to do."""


def checkpoint_path(run_dir: Path, update: int) -> Path:
    return run_dir / "checkpoints" / f"step-{update:08d}"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, the latest last, damaged ones among them."""
    return sorted((run_dir / "checkpoints").glob("step-*[0-9]"))


def latest_checkpoint(run_dir: Path) -> Path | None:
    """The latest checkpoint that is whole."""
    for path in reversed(list_checkpoints(run_dir)):
        fault = find_fault(path)
        if fault is None:
            return path
        logger.warning("Checkpoint %s is damaged (%s); looking for the one before.", path, fault)
    return None


def find_fault(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, compared with its manifest; `None` if it is whole."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        return f"{MANIFEST}: {error}"
    for name, (size, checksum) in manifest.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, not {size}"
        if _checksum(path) != checksum:
            return f"{name} has another checksum than when it was written"
    return None


def write_folder(target: Path, write: Callable[[Path], None], accelerator: Accelerator) -> None:
    """Has `write` fill a hidden folder beside `target`, forces that to disk and gives it its name.

    Args:
        write: Called in every process with the same folder.

    Raises:
        CheckpointError: If it cannot be written. What was at `target` is then still there.
    """
    temporary = temporary_path(target)
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        accelerator.wait_for_everyone()
        write(temporary)
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            manifest = {str(path.relative_to(temporary)): [path.stat().st_size, _checksum(path)] for path in files}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            publish(temporary, target)
    except WRITE_ERRORS as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"{target} could not be written: {error}. Is the disk full, or the folder not writable? What was saved "
            "before is intact; make room and continue with --resume auto."
        ) from error
    accelerator.wait_for_everyone()


def copy_model(checkpoint: Path, folder: Path) -> None:
    """Makes `folder` of what `from_pretrained` needs of a checkpoint."""
    shutil.copytree(
        checkpoint, folder, ignore=shutil.ignore_patterns("optimizer.pt", "rank-*.pt", "trainer.json", MANIFEST)
    )


def rotate(run_dir: Path, keep: int) -> None:
    """Removes all but the `keep` latest checkpoints."""
    for path in list_checkpoints(run_dir)[:-keep]:
        # Under its name a folder is whole or absent, also while it is being removed.
        doomed = temporary_path(path)
        path.rename(doomed)
        shutil.rmtree(doomed)


def save_optimizer(folder: Path, accelerator: Accelerator, model: nn.Module, optimizer: AcceleratedOptimizer) -> None:
    """Writes the optimiser's state; to be called in every process, since it may have to be put together from all."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = get_optimizer_state_dict(model, optimizer.optimizer, options=options)
    if accelerator.is_main_process:
        save_tensors(state, folder / "optimizer.pt")


def load_optimizer(folder: Path, model: nn.Module, optimizer: AcceleratedOptimizer) -> None:
    state = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    set_optimizer_state_dict(
        model, optimizer.optimizer, optim_state_dict=state, options=StateDictOptions(full_state_dict=True)
    )


def save_tensors(state: dict[str, Any], path: Path) -> None:
    """torch.save of tensors and plain values; OSError if the disk does not take it, where torch has a RuntimeError."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(f"{path.name}: {error}") from error


def rng_state() -> dict[str, Any]:
    """Python's, numpy's and torch's global generators of this process, in plain values."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - libraries draw from it
    return {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum

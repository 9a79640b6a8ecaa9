"""Running of steps: in one process for each seed, so that Python and its packages are loaded once for all steps.

The programs are called as functions. A step starts from the state that a process of its own would have: each program
seeds all generators from its settings, all of them use one precision, and what torch has compiled is forgotten between
steps.
"""

import gc
import os
import shlex
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

import torch

from examples.polyphony_study import new_weights
from examples.polyphony_study.presets import Preset
from examples.polyphony_study.steps import Step, seed_folder, steps_of_seed
from modeling_sslam.common.files import remove
from modeling_sslam.common.signals import StopRequest
from training.finetune import FinetuneConfig, finetune
from training.linear_eval import LinearEvalConfig, linear_eval
from training.pretrain import PretrainConfig, pretrain
from training.run.run import run_program

# Interval in seconds at which the study looks for finished steps.
INTERVAL = 1.0


def run_pretrain(arguments: Sequence[str], stop: StopRequest) -> None:
    """Run `training.pretrain` until it ends or is asked to stop."""
    run_program(PretrainConfig, partial(pretrain, stop=stop), arguments, None)


def run_finetune(arguments: Sequence[str], stop: StopRequest) -> None:
    """Run `training.finetune` until it ends or is asked to stop."""
    run_program(FinetuneConfig, partial(finetune, stop=stop), arguments, None)


def run_linear_eval(arguments: Sequence[str], stop: StopRequest) -> None:
    """Run `training.linear_eval` to its end: it has nothing to save before."""
    run_program(LinearEvalConfig, linear_eval, arguments, None)


def run_new_weights(arguments: Sequence[str], stop: StopRequest) -> None:
    """Run `examples.polyphony_study.new_weights` to its end."""
    new_weights.main(arguments)


PROGRAMS: dict[str, Callable[[Sequence[str], StopRequest], None]] = {
    "training.pretrain": run_pretrain,
    "training.finetune": run_finetune,
    "training.linear_eval": run_linear_eval,
    "examples.polyphony_study.new_weights": run_new_weights,
}


def run_steps(steps: Sequence[Step], stop: StopRequest) -> bool:
    """Run the steps that have not finished, one after the other.

    Args:
        steps: The steps.
        stop: Asks the step that is running to save and stop, and the others not to start.

    Returns:
        Whether all steps have finished.

    Raises:
        SystemExit: If a program failed. It has printed or holds the reason.
    """
    for step in steps:
        if step.is_finished:
            continue
        if stop.requested:
            return False
        print(f"\n$ python -m {shlex.join([step.program, *step.arguments])}", flush=True)
        PROGRAMS[step.program](step.arguments, stop)
        forget()
        if not step.is_finished:
            if stop.requested:
                return False
            raise RuntimeError(f"{step.program} ended, but {step.result} does not exist.")
        remove_scratch(step, steps)
    return True


def forget() -> None:
    """Free what a program left behind: its model in reference cycles, compiled graphs, and memory on the device."""
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def remove_scratch(step: Step, steps: Sequence[Step]) -> None:
    """Remove the scratch folder of a step, if no other step needs it any more."""
    if step.scratch is not None and all(other.is_finished for other in steps if other.scratch == step.scratch):
        remove(step.scratch)


def run_seed(out: Path, preset: Preset, seed: int, deadline: float | None) -> None:
    """Run the steps of a seed, in a process that the study started for it.

    Args:
        out: Folder of the study.
        preset: Its settings.
        seed: The seed.
        deadline: Time at which to stop, in seconds since the epoch, or `None`.
    """
    if preset.processes > 1:
        # Progress bars of several processes would overwrite one another.
        folder = seed_folder(out, seed)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
    with StopRequest() as stop:
        Thread(target=stop_in_time, args=(stop, deadline), daemon=True).start()
        run_steps(steps_of_seed(out, preset, seed), stop)


def stop_in_time(stop: StopRequest, deadline: float | None) -> None:
    """Ask this process to stop at the deadline, or when the process of the study is gone."""
    parent = parent_process()
    if parent is not None:
        wait([parent.sentinel], None if deadline is None else max(0.0, deadline - time.time()))
        stop.requested = True


def run_seeds(out: Path, preset: Preset, deadline: float | None, report: Callable[[], None]) -> bool:
    """Run the steps of all seeds, `preset.processes` seeds at a time.

    Args:
        out: Folder of the study.
        preset: Its settings.
        deadline: Time at which to stop, in seconds since the epoch, or `None`.
        report: Called whenever steps have finished.

    Returns:
        Whether all steps have finished.

    Raises:
        SystemExit: If a step failed. The other seeds save and stop.
    """
    context = get_context("spawn")
    steps = {seed: steps_of_seed(out, preset, seed) for seed in preset.seeds}
    waiting = [seed for seed in preset.seeds if not all(step.is_finished for step in steps[seed])]
    running: dict[int, BaseProcess] = {}
    failed: list[int] = []
    num_finished = -1
    with StopRequest() as stop:
        while running or (waiting and not (stop.requested or failed)):
            while waiting and len(running) < preset.processes and not (stop.requested or failed):
                seed = waiting.pop(0)
                running[seed] = context.Process(target=run_seed, args=(out, preset, seed, deadline))
                running[seed].start()
            wait([process.sentinel for process in running.values()], INTERVAL)
            for seed, process in list(running.items()):
                if stop.requested or failed:
                    process.terminate()
                if process.exitcode is not None:
                    del running[seed]
                    if process.exitcode != 0 and not stop.requested:
                        failed.append(seed)
            if deadline is not None and time.time() >= deadline:
                waiting.clear()
            if num_finished < (
                num_finished := sum(step.is_finished for of_seed in steps.values() for step in of_seed)
            ):
                report()
    if failed:
        where = f"{seed_folder(out, failed[0]) / 'log.txt'} has the reason" if preset.processes > 1 else "see above"
        raise SystemExit(f"error: a step of seed {failed[0]} failed: {where}. The same command goes on from there.")
    return all(step.is_finished for of_seed in steps.values() for step in of_seed)

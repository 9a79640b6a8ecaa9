"""Processes of the study. Each runs all steps of one seed."""

import os
import time
from collections.abc import Callable
from multiprocessing import get_context, get_start_method, parent_process, set_start_method
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import Thread

from examples.polyphony_study.presets import Preset
from examples.polyphony_study.steps import seed_folder, steps_of_seed
from modeling_sslam.common.signals import StopRequest

# Interval in seconds at which the study looks for finished steps.
INTERVAL = 1.0


def run_seed(out: Path, preset: Preset, seed: int, deadline: float | None, start_method: str) -> None:
    """Run the steps of a seed. Called in the process that the study starts for the seed.

    Args:
        out: Folder of the study.
        preset: Its settings.
        seed: The seed.
        deadline: Time at which to stop, in seconds since the epoch, or `None`.
        start_method: Start method of data workers. By default, a spawned process would spawn its workers, and each
            worker would import all packages.
    """
    set_start_method(start_method, force=True)
    if preset.processes > 1:
        # Progress bars of several processes would overwrite one another.
        folder = seed_folder(out, seed)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "log.txt", "a", encoding="utf-8") as log:
            for descriptor in (1, 2):
                os.dup2(log.fileno(), descriptor)
    with StopRequest() as stop:
        # The training programs take seconds to import, and the main process of the study does not need them.
        from examples.steps.running import run_steps

        Thread(target=stop_in_time, args=(stop, deadline), daemon=True).start()
        run_steps(steps_of_seed(out, preset, seed), stop)


def stop_in_time(stop: StopRequest, deadline: float | None) -> None:
    """Ask this process to stop at the deadline, or when the main process of the study has ended."""
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
                arguments = (out, preset, seed, deadline, get_start_method())
                running[seed] = context.Process(target=run_seed, args=arguments)
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
        raise SystemExit(f"error: a step of seed {failed[0]} failed: {where}. Run the same command to continue.")
    return all(step.is_finished for of_seed in steps.values() for step in of_seed)

"""Running of steps, all in one process, so that Python and its packages are loaded once.

The programs are called as functions. A step starts from the state that a process of its own would have: each program
seeds all generators from its settings, all of them use one precision, and what torch has compiled is forgotten between
steps.
"""

import gc
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from examples.steps import new_weights
from examples.steps.step import Step
from modeling_sslam.common.files import remove
from modeling_sslam.common.signals import StopRequest
from training.arguments import parse
from training.data.config import DataError
from training.data.sources import open_source
from training.finetune import FinetuneConfig, finetune
from training.linear_eval import LinearEvalConfig, linear_eval
from training.pretrain import PretrainConfig, pretrain
from training.run.run import run_program


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
    """Run `examples.steps.new_weights` to its end."""
    new_weights.main(arguments)


PROGRAMS: dict[str, Callable[[Sequence[str], StopRequest], None]] = {
    "training.pretrain": run_pretrain,
    "training.finetune": run_finetune,
    "training.linear_eval": run_linear_eval,
    "examples.steps.new_weights": run_new_weights,
}


CONFIGS: dict[str, type] = {
    "training.pretrain": PretrainConfig,
    "training.finetune": FinetuneConfig,
    "training.linear_eval": LinearEvalConfig,
}


def check_steps(steps: Sequence[Step]) -> None:
    """Parse the arguments and open the data of all steps that have not finished, before the first of them runs.

    Raises:
        SystemExit: If an argument is wrong, or data are missing or lack a column or a split that is named.
    """
    configs = {}
    for step in steps:
        if step.program in CONFIGS and not step.is_finished:
            try:
                configs[step] = parse(CONFIGS[step.program], step.arguments)
            except SystemExit as error:
                raise SystemExit(f"error: this step has a wrong argument, see above: {command_of(step)}") from error
    opened = set()
    for step, config in configs.items():
        folds = getattr(config, "folds", [])
        data = replace(config.data, split="+".join(folds)) if folds else config.data
        if repr(data) in opened:
            continue
        try:
            open_source(data)
        except (OSError, ValueError, DataError) as error:
            raise SystemExit(f"error: {error}\nThis step cannot open its data: {command_of(step)}") from error
        opened.add(repr(data))


def command_of(step: Step) -> str:
    """Return the command line of a step."""
    return f"python -m {shlex.join([step.program, *step.arguments])}"


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
        if not step.is_finished:
            if stop.requested:
                return False
            print(f"\n$ {command_of(step)}", flush=True)
            PROGRAMS[step.program](step.arguments, stop)
            forget()
        if not step.is_finished:
            if stop.requested:
                return False
            raise RuntimeError(f"{step.program} ended, but {step.result} does not exist.")
        # An earlier start may have ended before this.
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

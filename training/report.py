"""Learning curves and model folder of a run, at any time: `python -m training.report RUN_DIR`.

Writes RUN_DIR/curves.png and RUN_DIR/model/, a folder for the Hub with a model card. Its weights are those of the best
evaluation so far, or of the latest checkpoint if the run has no evaluations.
"""

import argparse
import json
import logging
import math
import platform
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import accelerate
import datasets
import torch
import transformers
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor
from modeling_sslam.common.files import remove_leftovers, replacing
from modeling_sslam.common.model_card import PAPER, render_card
from training.data.labels import LabelSet
from training.run.checkpointing import BEST, copy_model, find_fault, latest_checkpoint
from training.run.config import TrainingError
from training.run.lock import locked_folder
from training.run.metrics_log import read_metrics

logger = logging.getLogger(__name__)

# Panels of the curves: title, keys, whether the axis is logarithmic.
PANELS = (
    ("Loss", ("loss",), True),
    ("Validation", ("validation_map", "validation_accuracy", "validation_balanced_accuracy"), False),
    ("Local losses, per masked patch", ("ua_local_loss", "pma_local_loss", "srl_loss"), False),
    ("Global losses, sum over the device's clips", ("ua_global_loss", "pma_global_loss"), True),
    ("Deviation over patches (0: collapse)", ("pred_var", "target_var"), False),
    ("Gradient norm before clipping", ("grad_norm",), True),
    ("Learning rate", ("learning_rate",), False),
    ("Teacher: 1 - decay", ("ema_decay",), True),
    ("Clips per second", ("clips_per_second",), False),
    ("Share of time waiting for data", ("data_wait_fraction",), False),
)
MAX_MARKED_POINTS = 40
# Number of classes that the card lists.
MAX_NAMES = 20


def latest_values(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the latest value of each key that was logged."""
    return {key: value for row in rows for key, value in row.items()}


def plot_curves(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the curves of a run over its updates."""
    logged = latest_values(rows)
    panels = [
        (name, [key for key in keys if key in logged], is_log)
        for name, keys, is_log in PANELS
        if any(key in logged for key in keys)
    ]
    columns = 3
    num_rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(14, 3.2 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, columns, squeeze=False)
    for axes, (name, keys, is_log) in zip(grid.flat, panels, strict=False):
        _plot_panel(axes, rows, keys, is_log)
        axes.set_title(name, fontsize=11)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("update")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)


def _plot_panel(axes: Axes, rows: list[dict[str, Any]], keys: list[str], is_log: bool) -> None:
    for key in keys:
        points = [(row["update"], 1 - row[key] if key == "ema_decay" else row[key]) for row in rows if key in row]
        marker = "." if len(points) <= MAX_MARKED_POINTS else None
        axes.plot(*zip(*points, strict=True), label=key, marker=marker, linewidth=1.4)
    if is_log:
        axes.set_yscale("log")
    if len(keys) > 1:
        axes.legend(frameon=False, fontsize=9)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def model_card(run_dir: Path, weights: Path, rows: list[dict[str, Any]]) -> str:
    """Write the model card of a run as text.

    Args:
        run_dir: The run's folder.
        weights: The model folder that the card describes.
        rows: The lines of the log up to these weights.
    """
    settings = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    model_config = SSLAMConfig.from_pretrained(weights)
    model_class = (model_config.architectures or ["SSLAMModel"])[0]
    last = latest_values(rows)
    data = settings["data"]
    source = " ".join(str(data[key]) for key in ("source", "config_name", "split", "revision") if data.get(key))
    start = settings["model"] if isinstance(settings["model"], str) else settings.get("init_from")
    measured = [key for key in last if key.endswith(("loss", "_var")) or key.startswith("validation_")]
    facts = {
        "data": f"`{source}`",
        "started from": f"`{start}`" if start else "random weights",
        "updates": f"{last['update']:,} of {settings['max_updates']:,}",
        "clips seen": f"{last['clips']:,} ({last['epoch'] + 1} epochs begun), {last.get('skipped_clips', 0)} skipped",
        **{key: f"{last[key]:.4g}" for key in measured if last[key] is not None},
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}, accelerate "
        f"{accelerate.__version__}, datasets {datasets.__version__}, Python {platform.python_version()}",
    }
    if model_class == "SSLAMForAudioClassification":
        names = LabelSet.of_model(model_config).names
        what = f"An audio classifier for {len(names)} classes, fine-tuned from a self-supervised encoder"
        facts["classes"] = ", ".join(names[:MAX_NAMES]) + (", ..." if len(names) > MAX_NAMES else "")
        weights_hold = ""
    else:
        what = "A self-supervised audio encoder, pre-trained"
        weights_hold = "\nThe weights hold student, decoder and teacher; the example below loads the student."
    run_settings = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).rstrip()
    return render_card(
        run_dir.name,
        f"{what} as in {PAPER} (Alex et al., ICLR 2025).{weights_hold}",
        facts,
        model_class="SSLAMModel" if model_class == "SSLAMForPreTraining" else model_class,
        sampling_rate=SSLAMFeatureExtractor.from_pretrained(weights).sampling_rate,
        sections={"Curves": "![Curves](curves.png)", "Settings of the run": f"```yaml\n{run_settings}\n```"},
        tags=["self-supervised", "eat"],
    )


def write_report(run_dir: Path) -> None:
    """Write curves.png and model/ of a run that has logged at least one line.

    Raises:
        FileNotFoundError: If the folder holds no such run.
        TrainingError: If the run's files are damaged, or the report cannot be written.
    """
    rows = read_metrics(run_dir / "metrics.jsonl")
    if not rows:
        runs = sorted(path.parent.name for path in run_dir.glob("*/metrics.jsonl"))
        hint = f"name one of the runs in it, {', '.join(runs)}" if runs else "no run has logged there yet"
        raise FileNotFoundError(f"{run_dir} has no metrics.jsonl with a line in it: {hint}.")
    try:
        with replacing(run_dir / "curves.png") as temporary:
            plot_curves(rows, temporary, run_dir.name)
        weights = best_weights(run_dir)
        if weights is None:
            return
        update = json.loads((weights / "trainer.json").read_text(encoding="utf-8"))["progress"]["update"]
        with replacing(run_dir / "model") as temporary:
            copy_model(weights, temporary)
            shutil.copy(run_dir / "curves.png", temporary)
            # The card describes these weights, so it omits the lines that the run has logged since.
            rows = [row for row in rows if row["update"] <= update] or rows[:1]
            try:
                card = model_card(run_dir, weights, rows)
            except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
                raise TrainingError(
                    f"The model card of {run_dir} cannot be written, since config.yaml or metrics.jsonl is damaged "
                    f"({type(error).__name__}: {error}). Resuming the run writes config.yaml anew."
                ) from error
            (temporary / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise TrainingError(
            f"The report of {run_dir} cannot be written: {error}. Its checkpoints are not affected; make room, then "
            f"call python -m training.report {run_dir}"
        ) from error


def best_weights(run_dir: Path) -> Path | None:
    """Return the intact folder with the weights of the best evaluation, or else of the latest checkpoint."""
    best = run_dir / BEST
    if best.exists():
        if (fault := find_fault(best)) is None:
            return best
        logger.warning("%s is damaged (%s); taking the latest checkpoint.", best, fault)
    return latest_checkpoint(run_dir)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        description="Draw a run's curves (RUN_DIR/curves.png) and make a folder for the Hub (RUN_DIR/model) with the "
        "weights of its best evaluation, or else of its latest checkpoint."
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    run_dir = parser.parse_args().run_dir
    try:
        if run_dir.is_dir():
            # A running program removes its own leftovers. A folder that is not writable has none.
            with suppress(TrainingError), locked_folder(run_dir):
                remove_leftovers(run_dir)
        write_report(run_dir)
    except (OSError, TrainingError) as error:
        sys.exit(f"error: {error}")
    print(*(path for path in (run_dir / "curves.png", run_dir / "model") if path.exists()), sep="\n")


if __name__ == "__main__":
    main()

"""The polyphony study: its steps, statistics, report and settings, and a whole study of a tiny size."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import yaml
from scipy.stats import ttest_rel
from sklearn.metrics import average_precision_score

from examples.polyphony_study import __main__ as command
from examples.polyphony_study import intervals, report, scores, steps
from examples.polyphony_study.presets import CPU, PRESETS
from examples.steps import running
from examples.steps.step import words
from training.arguments import parse

SOURCES = ("1", "2", "all")


# --------------------------------------------------------------------------------------------------------- statistics


def test_average_precisions_equal_scikit_learns_with_weights():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, 40) / 6  # with ties
    targets = rng.random(40) < 0.3
    counts = rng.multinomial(40, np.full(40, 1 / 40), 5)
    expected = [average_precision_score(targets, values, sample_weight=row) for row in counts]
    np.testing.assert_allclose(scores.average_precisions(values, targets, counts), expected)


def test_average_precision_without_positive_clips_is_undefined():
    counts = np.array([[1, 1], [2, 0]])
    found = scores.average_precisions(np.array([0.5, 0.2]), np.array([False, True]), counts)
    assert found[0] == 0.5
    assert np.isnan(found[1])


def test_interval_over_seeds_equals_scipys_paired_one():
    one, other = [0.31, 0.35, 0.29], [0.30, 0.31, 0.27]
    found = intervals.student_interval([a - b for a, b in zip(one, other, strict=True)])
    assert found == pytest.approx(ttest_rel(one, other).confidence_interval(intervals.LEVEL))


def test_one_seed_has_no_interval():
    assert intervals.student_interval([0.3]) is None


# ------------------------------------------------------------------------------------------------------------- report


def write_evaluation(path: Path, quality: float, seed: int) -> None:
    """Write the results of an evaluation of 40 clips with one or two of three sources."""
    rng = np.random.default_rng(seed)
    groups = np.arange(40) % 2 + 1
    targets = np.array([np.isin(np.arange(3), rng.permutation(3)[:n]) for n in groups])
    values = (quality * targets + rng.random(targets.shape)).astype(np.float32)

    def mean_of(rows: np.ndarray) -> dict[str, float]:
        each = [average_precision_score(targets[rows, k], values[rows, k]) for k in range(3)]
        return {"map": float(np.mean(each)), "chance_map": float(targets[rows].mean())}

    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["bell", "dog", "rain"]
    content = {
        "metrics": mean_of(groups > 0),
        "by_group": [{"group": n} | mean_of(groups == n) for n in (1, 2)],
        "per_class": [{"label": name} for name in names],
    }
    path.write_text(json.dumps(content))
    table = {
        "labels": [[name for name, has in zip(names, row, strict=True) if has] for row in targets],
        "scores": values.tolist(),
        "group": groups.tolist(),
    }
    pq.write_table(pa.table(table), path.with_name("predictions.parquet"))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a study with two seeds. In both, sslam is far better than all others, but only by its probe."""
    for seed in (0, 1):
        write_evaluation(steps.forest_results_file(tmp_path, seed), 0.1, seed)
        for protocol in steps.PROTOCOLS:
            for encoder in steps.ENCODERS:
                better = 0.8 if (protocol, encoder) == ("linear", "sslam") else 0.0
                path = steps.results_file(tmp_path, seed, encoder, protocol)
                write_evaluation(path, 0.2 + better, seed)
    return tmp_path


def gathered(out: Path, seeds: tuple[int, ...] = (0, 1)) -> tuple[scores.Scores, list[intervals.Difference]]:
    files = scores.finished_results(out, seeds)
    found = scores.gather_scores(files)
    return found, report.differences_of(found, files)


def test_resampled_scores_surround_the_reported_one(out: Path):
    path = steps.results_file(out, 0, "ua", "linear")
    for sources, value in scores.read_scores(path).items():
        interval = intervals.percentile_interval(scores.resampled_scores(path, sources))
        assert interval.low < value < interval.high


def test_differences_are_paired_by_seed(out: Path):
    found, differences = gathered(out)
    assert len(differences) == len(steps.PROTOCOLS) * 3 * len(SOURCES)
    (difference,) = (d for d in differences if (d.protocol, d.encoder, d.sources) == ("linear", "sslam", "2"))
    for seed in (0, 1):
        values = [found["linear", encoder]["2"][seed] for encoder in ("sslam", "ua")]
        assert difference.by_seed[seed] == values[0] - values[1] > 0
        assert difference.within[seed].low > 0
    same = [d for d in differences if d.encoder == "pma"]
    assert {d.mean for d in same} == {0.0}


def test_statement_follows_from_the_numbers(out: Path):
    _, differences = gathered(out)
    (of_all,) = (d for d in differences if (d.protocol, d.encoder, d.sources) == ("linear", "sslam", "all"))
    assert of_all.interval is not None
    linear, prototypes, finetuned, number = report.statement(differences).split("\n")
    if of_all.interval.excludes_zero:
        assert f"sslam is {100 * of_all.mean:.1f} points above ua" in linear
        assert "no other objective differs" in linear
    else:
        assert "no objective differs from ua" in linear
    assert "Prototype probe, all clips, 2 seeds: no objective differs from ua beyond the 95 % interval" in prototypes
    assert "Fine-tuning, all clips, 2 seeds: no objective differs" in finetuned
    assert number.startswith("Of all 27 intervals")
    assert "1.4 would on average" in number


@pytest.mark.parametrize(
    ("by_seed", "expected"),
    [
        ({0: 0.02, 1: 0.021, 2: 0.019}, "pma is 2.0 points above ua (95 % interval +1.8 to +2.2)"),
        ({0: -0.02, 1: -0.021, 2: -0.019}, "pma is 2.0 points below ua (95 % interval -2.2 to -1.8)"),
        ({0: 0.02, 1: -0.021, 2: 0.019}, "no objective differs from ua beyond the 95 % interval over seeds"),
        ({0: 0.02}, "No statement is possible yet"),
    ],
)
def test_statement_names_direction_and_interval(by_seed: dict[int, float], expected: str):
    assert expected in report.statement([intervals.Difference("linear", "pma", "all", by_seed, {})])


def test_report_of_a_complete_study(out: Path):
    report.write_report(out, (0, 1), 48, 48)
    content = json.loads((out / "results.json").read_text())
    assert content["state"] == "complete"
    assert len(content["scores"]) == 1 + 3 * 6
    assert len(content["differences"]) == 27
    lines = (out / "table.md").read_text().splitlines()
    assert lines[0].endswith("over 2 seeds; complete")
    assert lines[2] == "|  | encoder | 1 source | 2 sources | all |"
    assert len(lines) == 4 + 2 + 3 * 6
    assert not [line for line in lines[4:] if "n =" in line or "| - |" in line]
    assert content["statement"][0] in (out / "differences.md").read_text()
    assert (out / "table.png").stat().st_size > 10_000


def test_report_of_an_incomplete_study(out: Path):
    steps.results_file(out, 1, "sslam", "finetuned").unlink()
    for seed in (0, 1):
        steps.results_file(out, seed, "ua", "prototypes").unlink()
    report.write_report(out, (0, 1), 45, 48)
    text = (out / "table.md").read_text()
    assert "45 of 48 steps have finished" in text
    assert text.count("(n = 1)") == 3
    assert "| prototype probe | ua | - | - | - |" in text
    assert "Prototype probe" not in (out / "differences.md").read_text().split("| objective")[0]


def test_there_is_no_report_before_the_first_result(tmp_path: Path):
    report.write_report(tmp_path, (0,), 0, 24)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------------------------------------------- steps, settings


@pytest.mark.parametrize("name", PRESETS)
def test_programs_accept_the_arguments_of_every_step(name: str, tmp_path: Path):
    for step in steps.steps_of_seed(tmp_path, PRESETS[name], 2):
        if step.program in running.CONFIGS:
            config = parse(running.CONFIGS[step.program], step.arguments)
            assert config.seed == 2
            assert step.result.is_relative_to(config.output_dir)


def test_objectives_differ_in_nothing_else(tmp_path: Path):
    made = [steps.making(tmp_path, CPU, 0, objective).arguments for objective in steps.OBJECTIVES]
    ua = [word.replace("/ua", "/pma") for word in made[0]]
    ua[ua.index("--model.pretraining_objective") + 1] = "pma"
    assert ua == list(made[1])


def test_words_of_options():
    assert list(words({"clips": 20, "splits": ["train=0.5", "test=0.5"]})) == [
        *("--clips", "20", "--splits", "train=0.5", "test=0.5"),
    ]


def test_later_starts_need_no_arguments(tmp_path: Path):
    chosen = {"preset": "h200", "sounds": "clips", "group_by": "x", "seeds": [4, 5]}
    first, _ = command.settle(tmp_path, chosen)
    assert first == replace(PRESETS["h200"], seeds=(4, 5))
    assert command.settle(tmp_path, {}) == (first, chosen)
    assert command.settle(tmp_path, {"sounds": "clips"}) == (first, chosen)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"clips": 30}, "holds a study with clips=20, not 30"),
        ({"sounds": "clips"}, "holds a study with sounds=None, not clips"),
    ],
)
def test_another_study_in_the_folder_is_refused(tmp_path: Path, chosen: dict, message: str):
    command.settle(tmp_path, {"clips": 20})
    with pytest.raises(ValueError, match=message):
        command.settle(tmp_path, chosen)


def test_changed_recipe_is_refused(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("max_updates: 3")
    command.settle(tmp_path, {"stage1": str(recipe)})
    recipe.write_text("max_updates: 4")
    with pytest.raises(ValueError, match="The recipes differ"):
        command.settle(tmp_path, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-by", "x"], "--group-by is for recordings; it needs --sounds"),
        (["--stage1_config", "none.yaml"], "A recipe cannot be read"),
    ],
)
def test_wrong_arguments_end_the_command(tmp_path: Path, arguments: list[str], message: str):
    with pytest.raises(SystemExit, match=message):
        command.main([str(tmp_path / "out"), *arguments])
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- a study


@pytest.fixture
def arguments(tmp_path: Path, tiny_run: dict[str, Any], tiny_pretraining: dict[str, Any]) -> list[str]:
    """The arguments of a tiny study on real files: four classes of recordings."""
    rng = np.random.default_rng(0)
    time_axis = np.arange(8000) / 16_000
    sounds = {
        "low": lambda: np.sin(2 * np.pi * rng.uniform(100, 200) * time_axis),
        "high": lambda: np.sin(2 * np.pi * rng.uniform(2000, 4000) * time_axis),
        "noise": lambda: rng.uniform(-1, 1, 8000),
        "clicks": lambda: (np.arange(8000) % rng.integers(500, 900) < 20).astype(float),
    }
    for name, make in sounds.items():
        (tmp_path / "sounds" / name).mkdir(parents=True)
        for i in range(6):
            soundfile.write(tmp_path / "sounds" / name / f"{i}.flac", 0.3 * make(), 16_000)
    options = ["--sounds", str(tmp_path / "sounds"), "--clips", "40", "--seconds", "0.64", "--seeds", "0"]
    recipes = {
        "stage1": tiny_pretraining | {"max_updates": 6},
        "stage2": tiny_run | {"max_updates": 2, "model": {"num_clones": 2}},
        "finetune": tiny_run | {"max_updates": 2, "problem_type": "multi", "evaluate_every": 2},
    }
    for name, recipe in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
        options += [f"--{name}_config", str(tmp_path / f"{name}.yaml")]
    return options


@pytest.mark.slow
def test_study_goes_on_after_it_was_killed(tmp_path: Path, arguments: list[str]):
    """Later starts take all settings from the folder."""
    out = tmp_path / "out"
    start = [sys.executable, "-m", "examples.polyphony_study", str(out)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*start, *arguments], env=environment, start_new_session=True)
    checkpoints = out / "seed-0" / "stage1" / "checkpoints"
    while process.poll() is None and not list(checkpoints.glob("step-*[0-9]")):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "results.json").exists()

    done = subprocess.run(start, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resumed at update" in done.stderr
    assert "24 of 24 steps have finished" in done.stdout
    assert not list((out / "seed-0").glob("*-features"))
    content = json.loads((out / "results.json").read_text())
    assert content["state"] == "complete"
    assert all(row["map"]["all"].keys() == {"0"} for row in content["scores"])
    assert {row["encoder"] for row in content["scores"]} == {*steps.ENCODERS, steps.FOREST}

    # A step gives what its command gives in a process of its own.
    step = steps.making(out, command.settle(out, {})[0], 0, "pma")
    alone = [str(tmp_path / "alone") if word == str(step.result.parent) else word for word in step.arguments]
    subprocess.run([sys.executable, "-m", step.program, *alone], env=environment, check=True)
    weights = [folder / "model" / "model.safetensors" for folder in (step.result.parent, tmp_path / "alone")]
    assert weights[0].read_bytes() == weights[1].read_bytes()

    again = subprocess.run(start, env=environment, capture_output=True, text=True)
    assert again.returncode == 0
    assert "$ python" not in again.stdout

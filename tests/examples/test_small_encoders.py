"""The study of small encoders: its settings, steps and report, and a whole study of a tiny size."""

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml

from examples.small_encoders import __main__ as command
from examples.small_encoders import digits, report, scores, steps
from examples.small_encoders.settings import DEFAULT_FILE, Recipe, Study, read_study, record_settings
from examples.steps import running
from examples.steps.step import Step
from modeling_sslam.common.signals import StopRequest
from training.arguments import parse

POOLINGS = ("mean", "max")


# ---------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize("name", ["study.yaml", "grid.yaml"])
def test_programs_accept_the_arguments_of_every_step(tmp_path: Path, name: str):
    study = read_study(DEFAULT_FILE.with_name(name))
    options = ["--mixed_precision", "bf16", "--output_dir", "elsewhere", "--seed", "7"]
    groups = list(steps.all_steps(tmp_path, study, options).values())
    assert len(groups) == len(study.seeds) * len(study.recipes)
    assert any(step.program == "training.finetune" for step in groups[0]) == (study.finetuned_on is not None)
    for step in (step for group in groups for step in group):
        if step.program in running.CONFIGS:
            config = parse(running.CONFIGS[step.program], step.arguments)
            # The study decides on folders and seeds; words after `--` do not.
            assert step.result.is_relative_to(config.output_dir)
            assert config.seed in study.seeds


def test_checkpoints_of_a_recipe(tmp_path: Path, tiny_run: dict[str, Any]):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_run | {"max_updates": 10, "checkpoint": {"every": 4}}))
    arguments = ["--config", str(tmp_path / "recipe.yaml")]
    assert steps.updates_with_checkpoint(arguments) == [4, 8, 10]
    assert steps.updates_with_checkpoint([*arguments, "--max_updates", "8"]) == [4, 8]


def test_pretraining_keeps_the_checkpoints_of_curves_after_interruptions(
    tmp_path: Path, study: Study, tiny_run: dict[str, Any]
):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tiny_run | {"max_updates": 10, "checkpoint": {"every": 4}}))
    study = replace(study, recipes={"tiny": Recipe({"config": tmp_path / "recipe.yaml"})})
    config = parse(running.PretrainConfig, steps.steps_of_seed(tmp_path, study, "tiny", 0, [])[0].arguments)
    # An interruption after any update can add a checkpoint.
    assert config.checkpoint.keep >= config.max_updates


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"finetuned_on": "x"}, "finetuned_on=x must be one of tests: ESC-10, digits, scenes"),
        ({"finetuned_on": "digits"}, "finetuned_on=digits names a test without folds"),
        ({"more": 1}, "must have the keys .*, and has curve_seeds, .*more"),
        ({"recipes": {"tiny": {"finetuning": {}}}}, "recipes.tiny must have the keys finetuning, pretraining"),
        ({"recipes": ["tiny"]}, r"recipes=\['tiny'\] must have an entry for each name"),
        ({"recipes": {"tiny": {"pretraining": None}}}, "recipes.tiny.pretraining=None must be options"),
        ({"tests": {}}, "tests={} must have an entry for each name, and at least one"),
        ({"tests": {"a/b": {}}}, "tests has the name 'a/b'; a name is a folder"),
        ({"recipes": {"table.md": {"pretraining": {}}}}, "recipes has the name 'table.md'"),
        ({"tests": {"a": {"data": {"source": "x"}}}}, "tests.a.data is a section; write its options with dots"),
        ({"probes": {"layers": "all"}}, "probes.poolings=None must be a list of poolings"),
        ({"probes": {"poolings": ["all"]}}, "must be a list of poolings without all"),
        ({"seeds": 3}, "seeds=3 must be a list of different integers"),
        ({"seeds": [0, 0]}, "must be a list of different integers"),
        ({"seeds": [], "curve_seeds": []}, "seeds is empty"),
        ({"curve_seeds": [9]}, "has 9, which must also be one of seeds"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, change: dict, message: str):
    content = yaml.safe_load(DEFAULT_FILE.read_text())
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content | change))
    with pytest.raises(ValueError, match=message):
        read_study(tmp_path / "study.yaml")


def test_wrong_arguments_end_the_command(tmp_path: Path):
    with pytest.raises(SystemExit, match="has no recipe huge; it has tiny, small"):
        command.main([str(tmp_path / "out"), "--recipes", "huge"])
    with pytest.raises(SystemExit, match=r"none\.yaml cannot be read"):
        command.main([str(tmp_path / "out"), "--config", "none.yaml"])
    assert not (tmp_path / "out").exists()
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file cannot be the study's folder"):
        command.main([str(tmp_path / "file")])


def test_wrong_options_of_a_late_step_end_the_command_before_its_first_step(tmp_path: Path, capsys):
    content = yaml.safe_load(DEFAULT_FILE.read_text())
    content["recipes"]["small"]["finetuning"]["loss"] = "hinge"
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(SystemExit, match=r"this step has a wrong argument, see above: python -m training\.finetune"):
        command.main([str(tmp_path / "out"), "--config", str(tmp_path / "study.yaml")])
    printed = capsys.readouterr()
    assert "--loss takes" in printed.err
    assert "$ python" not in printed.out


@pytest.mark.parametrize("of_data", [{"data.source": "none.csv"}, {"data.split": "fold9"}])
def test_missing_data_of_a_late_step_end_the_command_before_its_first_step(
    tmp_path: Path, capsys, of_data: dict[str, str]
):
    write_sounds(tmp_path / "sounds")
    source = {"data.source": str(tmp_path / "sounds")}
    content = yaml.safe_load(DEFAULT_FILE.read_text())
    recipe = content["recipes"]["tiny"]
    recipe["pretraining"] |= source | {"data.split": "fold1"}
    bad = source | {"data.split": "fold1"} | of_data
    tests = {"tones": source | {"folds": ["fold1", "fold2"]}, "last": bad}
    (tmp_path / "study.yaml").write_text(
        yaml.safe_dump(content | {"recipes": {"tiny": recipe}, "tests": tests, "finetuned_on": "tones"})
    )
    with pytest.raises(
        SystemExit, match=r"(?s)(none\.csv|fold9).*This step cannot open its data: python -m training\.linear_eval"
    ):
        command.main([str(tmp_path / "out"), "--config", str(tmp_path / "study.yaml")])
    assert "$ python" not in capsys.readouterr().out


def test_changed_settings_are_refused(tmp_path: Path, study: Study):
    (tmp_path / "recipe.yaml").write_text("max_updates: 10\n")
    study = replace(study, recipes={"tiny": Recipe({"config": tmp_path / "recipe.yaml"})})
    record_settings(tmp_path, study, [])
    record_settings(tmp_path, replace(study, seeds=(0, 1, 2), tests=study.tests | {"new": {}}), [])
    record_settings(tmp_path, study, [])
    changes = {
        "probes": replace(study, probes={"poolings": ["cls"]}),
        "tests.new": replace(study, tests={"new": {"data.source": "other"}}),
        # The checkpoints of a seed that had no curve are gone.
        "curve_seeds: 1": replace(study, curve_seeds=(0, 1)),
    }
    for name, changed in changes.items():
        with pytest.raises(ValueError, match=f"has other settings of {name}: .* Restore it"):
            record_settings(tmp_path, changed, [])
    with pytest.raises(ValueError, match="has other settings of words after --: the command, "):
        record_settings(tmp_path, study, ["--compile", "true"])
    (tmp_path / "recipe.yaml").write_text("max_updates: 20\n")
    with pytest.raises(ValueError, match=r"has other settings of recipes\.tiny"):
        record_settings(tmp_path, study, [])


def test_scratch_of_a_finished_step_is_removed_at_the_next_start(tmp_path: Path):
    (tmp_path / "results.json").touch()
    (tmp_path / "features").mkdir()
    step = Step("training.linear_eval", (), tmp_path / "results.json", tmp_path / "features")
    assert running.run_steps([step], StopRequest())
    assert not (tmp_path / "features").exists()


# ------------------------------------------------------------------------------------------------------------ report


@pytest.fixture
def study() -> Study:
    """A study with two seeds, one recipe and one test."""
    recipe, probes = Recipe({"config": "x"}, {}), {"layers": ["all", "concat"], "poolings": POOLINGS}
    return Study((0, 1), {"tiny": recipe}, {"bells": {"folds": ["a"]}}, probes, "bells", (0,))


def write_heads(path: Path, values: dict[str, float]) -> None:
    """Write the results of heads on two layers. The second is 0.1 better, both together are 0.2 better."""
    path.parent.mkdir(parents=True)
    places = [
        {
            "encoder": name,
            "kind": "forest" if "forest" in name else "ridge",
            "layer": layer,
            "pooling": pooling,
            "test_accuracy": value + gain,
        }
        for name, value in values.items()
        for layer, gain in ((0, 0.0), (1, 0.1), ("concat", 0.2))
        for pooling in POOLINGS
    ]
    best = [{"encoder": name, "among": "all kinds", "test_accuracy": value + 0.2} for name, value in values.items()]
    path.write_text(json.dumps({"metric": "accuracy", "best_heads": best, "places": places}))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """The folder of a study whose second seed has not been fine-tuned."""
    for seed in (0, 1):
        values = {"model": 0.5 + 0.02 * seed, "model, new weights": 0.3, "MFCC + forest": 0.4}
        write_heads(steps.probe_results(tmp_path, "tiny", seed, "bells"), values)
    for update in (2, 4):
        write_heads(steps.curve_results(tmp_path, "tiny", 0, "bells", update), {"model": 0.4 + update / 100})
    for i, encoder in enumerate(steps.ENCODERS):
        path = steps.finetuning_results(tmp_path, "tiny", 0, encoder)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"summary": {"accuracy": {"mean": 0.9 - 0.1 * i, "std": 0.01}}}))
    return tmp_path


def test_table_has_means_over_seeds(out: Path, study: Study):
    report.write_report(out, study, "10 of 12 steps have finished")
    lines = (out / "table.md").read_text().splitlines()
    assert "10 of 12 steps have finished" in lines[0]
    assert [line for line in lines if line.startswith("#")] == ["## Best head", "## bells: accuracy"]
    best, bells = (i + 2 for i, line in enumerate(lines) if line.startswith("#"))
    assert lines[best] == "| recipe | encoder | bells: accuracy |"
    assert lines[best + 2 : bells - 3] == [
        "| tiny | pre-trained | 71.0 ± 1.4 |",
        "| tiny | new weights | 50.0 ± 0.0 |",
        "| tiny | MFCC + forest | 60.0 ± 0.0 |",
    ]
    assert lines[bells] == "| recipe | encoder | best head | mean | max | all layers, max | fine-tuned |"
    assert lines[bells + 2 :] == [
        "| tiny | pre-trained | 71.0 ± 1.4 | 61.0 ± 1.4 | 61.0 ± 1.4 | 71.0 ± 1.4 | 90.0 (n = 1) |",
        "| tiny | new weights | 50.0 ± 0.0 | 40.0 ± 0.0 | 40.0 ± 0.0 | 50.0 ± 0.0 | 80.0 (n = 1) |",
        "| tiny | MFCC + forest | 60.0 ± 0.0 | - | - | - | - |",
    ]


def test_table_has_one_kind_of_heads_and_the_metric_of_the_test(out: Path, study: Study):
    path = steps.probe_results(out, "tiny", 0, "bells")
    found = json.loads(path.read_text())
    found["places"] += [row | {"kind": "linear"} for row in found["places"]]
    path.write_text(json.dumps(found))
    path = steps.finetuning_results(out, "tiny", 0, steps.PRETRAINED)
    path.write_text(json.dumps({"summary": {"map": {"mean": 0.7}, "mean_auc": {"mean": 0.8}}}))
    report.write_report(out, study, "complete")
    assert (
        "| tiny | pre-trained | 71.0 ± 1.4 | 61.0 ± 1.4 | 61.0 ± 1.4 | 71.0 ± 1.4 | 70.0 (n = 1) |"
        in (out / "table.md").read_text()
    )


def test_curves_begin_with_new_weights(out: Path, study: Study):
    report.write_report(out, study, "complete")
    lines = (out / "curves.md").read_text().splitlines()
    assert lines[4] == "| updates | best head | layer 1, mean | layer 1, max | all layers, max |"
    assert [line.split(" | ")[:2] for line in lines[6:]] == [
        ["| new weights", "50.0"],
        ["| 2", "62.0"],
        ["| 4", "64.0"],
    ]
    assert (out / "curves.png").stat().st_size > 10_000
    rows = list(csv.DictReader((out / "scores.csv").open()))
    assert len(rows) == len(scores.gather_scores(out, study))
    assert {row["seed"] for row in rows} == {"0", "1"}


def test_there_is_no_report_before_the_first_result(tmp_path: Path, study: Study):
    report.write_report(tmp_path, study, "0 of 12 steps have finished")
    assert not list(tmp_path.iterdir())


def test_study_without_curves_has_no_picture(out: Path, study: Study):
    for update in (2, 4):
        steps.curve_results(out, "tiny", 0, "bells", update).unlink()
    report.write_report(out, replace(study, curve_seeds=()), "complete")
    assert (out / "table.md").exists()
    assert not (out / "curves.png").exists()


# ----------------------------------------------------------------------------------------------------------- a study


def write_sounds(folder: Path) -> None:
    """Write low and high tones in three folds."""
    rng = np.random.default_rng(0)
    for fold in ("fold1", "fold2", "fold3"):
        for name, pitch in (("low", 200), ("high", 3000)):
            (folder / fold / name).mkdir(parents=True)
            for i in range(4):
                tone = 0.3 * np.sin(2 * np.pi * pitch * rng.uniform(0.8, 1.2) * np.arange(8000) / 16_000)
                soundfile.write(folder / fold / name / f"{i}.flac", tone, 16_000)


@pytest.mark.slow
def test_tiny_study(tmp_path: Path, tiny_run: dict[str, Any], tiny_pretraining: dict[str, Any]):
    write_sounds(tmp_path / "sounds")
    pretraining = tiny_pretraining | {"max_updates": 4}
    (tmp_path / "pretraining.yaml").write_text(yaml.safe_dump(pretraining))
    (tmp_path / "finetuning.yaml").write_text(yaml.safe_dump(tiny_run | {"max_updates": 2, "evaluate_every": 2}))
    sounds = {"data.source": str(tmp_path / "sounds")}
    settings = {
        "seeds": [3],
        "recipes": {
            "tiny": {
                "pretraining": sounds | {"config": str(tmp_path / "pretraining.yaml"), "data.split": "fold1+fold2"},
                "finetuning": {"config": str(tmp_path / "finetuning.yaml")},
            }
        },
        "tests": {"tones": sounds | {"folds": ["fold1", "fold2", "fold3"]}},
        "probes": {"layers": "all", "poolings": ["mean", "max"], "head.kinds": "ridge"},
        "finetuned_on": "tones",
        "curve_seeds": [3],
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(settings))
    out = tmp_path / "out"
    start = [sys.executable, "-m", "examples.small_encoders", str(out), "--config", str(tmp_path / "study.yaml")]
    done = subprocess.run([*start, "--", "--data.num_workers", "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "7 of 7 steps have finished" in done.stdout
    assert not list(out.glob("**/features"))
    table = (out / "table.md").read_text()
    assert "complete" in table
    assert "| - |" not in table.split("MFCC + forest |")[0]
    assert "## tiny, tones" in (out / "curves.md").read_text()

    # The report is of all seeds, whichever ran last.
    options = ["--seeds", "3", "--", "--data.num_workers", "0"]
    again = subprocess.run([*start, *options], capture_output=True, text=True)
    assert again.returncode == 0
    assert "$ python" not in again.stdout


def test_table_of_digits(tmp_path: Path, capsys: pytest.CaptureFixture):
    names = ["3_jackson_4.wav", "3_jackson_5.wav", "0_theo_49.flac", "README.md", "acquire.py"]
    for name in names:
        path = tmp_path / "digits" / "recordings" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    digits.main([str(tmp_path / "digits"), str(tmp_path / "data" / "digits.csv")])
    rows = list(csv.DictReader((tmp_path / "data" / "digits.csv").open()))
    found = {Path(row["path"]).name: (row["label"], row["split"]) for row in rows}
    expected = {"3_jackson_4.wav": ("3", "test"), "3_jackson_5.wav": ("3", "train"), "0_theo_49.flac": ("0", "train")}
    assert found == expected
    assert "2 recordings for training, 1 for testing" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has no recordings"):
        digits.main([str(tmp_path / "data"), str(tmp_path / "none.csv")])
    assert not (tmp_path / "none.csv").exists()

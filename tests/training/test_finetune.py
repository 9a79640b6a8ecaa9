"""Fine-tuning from the command line, on generated sounds and tiny encoders: learning, files, exact resume, errors."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import pipeline

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForPreTraining
from modeling_sslam.common.signals import StopRequest
from training import finetune
from training.arguments import parse
from training.report import write_report
from training.run import trainer
from training.run.checkpointing import list_checkpoints
from training.run.metrics_log import read_metrics

pytestmark = pytest.mark.slow

RATE = 16_000
SETTINGS = {
    "max_updates": 6,
    "batch_size": 4,
    "data": {"num_workers": 0, "shuffle_buffer": 8},
    "augmentation": {"mask_ratio": 0.1},
    "optimizer": {"learning_rate": 1e-3, "warmup_updates": 2},
    "evaluate_every": 3,
    "checkpoint": {"every": 2},
    "watch": {"every": 2, "tracker": "none"},
}


@pytest.fixture(scope="session")
def encoder(tmp_path_factory) -> Path:
    """A folder as pre-training writes it (student, decoder and teacher), with new weights."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    config = SSLAMConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        num_mel_bins=32,
        max_length=64,
        max_position_embeddings=8,
        decoder_num_layers=2,
    )
    SSLAMForPreTraining(config).save_pretrained(folder)
    SSLAMFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sounds(tmp_path_factory) -> Path:
    """A folder with a subfolder for each of two classes: 16 low tones and 16 noises."""
    folder = tmp_path_factory.mktemp("sounds")
    for name in ("tone", "noise"):
        (folder / name).mkdir()
        for i in range(16):
            rng = np.random.default_rng([i, len(name)])
            time = np.arange(RATE // 2) / RATE
            wave = (
                np.sin(2 * np.pi * rng.uniform(200, 400) * time) if name == "tone" else rng.standard_normal(RATE // 2)
            )
            soundfile.write(folder / name / f"{name}{i:02d}.flac", 0.1 * wave, RATE)
    return folder


@pytest.fixture(scope="session")
def table(sounds) -> Path:
    """A table with splits of the same clips, with several labels each."""
    path = sounds / "clips.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "labels", "split"))
        for i, clip in enumerate(sorted(sounds.rglob("*.flac"))):
            labels = [clip.parent.name, *(["any; all"] if i % 2 else [])]
            split = "train" if i % 4 else "validation"
            writer.writerow((clip.relative_to(sounds), ";".join(labels), split))
    return path


@pytest.fixture
def arguments(sounds, encoder, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(yaml.safe_dump(SETTINGS))

    def arguments(name: str = "run", **changes) -> list[str]:
        changes = {"output_dir": tmp_path / name, "model": encoder, "data": sounds, "data.hold_out": 0.3} | changes
        return ["--config", str(settings), *(f"--{key}={value}" for key, value in changes.items())]

    return arguments


@pytest.fixture
def train(arguments, tmp_path):
    """A function that runs the program in this process and returns the folder of the run."""

    def train(name: str = "run", **changes) -> Path:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        finetune.main(arguments(name, **changes))
        return tmp_path / name

    return train


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_learns_and_writes_a_model_that_the_pipeline_runs(train, sounds, capsys):
    run = train(
        max_updates=60, evaluate_every=20, **{"optimizer.learning_rate": 3e-3, "augmentation.mixup_alpha": 0.2}
    )
    best = max(
        row["validation_accuracy"] for row in read_metrics(run / "metrics.jsonl") if "validation_accuracy" in row
    )
    assert best == 1.0
    results = json.loads((run / "model" / "evaluation" / f"{sounds.name}-train-held-out" / "results.json").read_text())
    assert results["metrics"]["accuracy"] == best
    assert "accuracy" in capsys.readouterr().out
    card = (run / "model" / "README.md").read_text()
    assert "audio-classification" in card
    assert "noise, tone" in card
    assert (run / "curves.png").stat().st_size > 10_000

    classifier = pipeline("audio-classification", str(run / "model"), trust_remote_code=True)
    for clip in (sounds / "tone" / "tone03.flac", sounds / "noise" / "noise05.flac"):
        samples, rate = soundfile.read(clip, dtype="float32")
        assert classifier({"array": samples, "sampling_rate": rate})[0]["label"] == clip.parent.name


def test_several_labels_from_a_table(train, table):
    run = train(data=table, **{"data.hold_out": 0})
    config = SSLAMConfig.from_pretrained(run / "model")
    assert config.problem_type == "multi_label_classification"
    assert list(config.id2label.values()) == ["all", "any", "noise", "tone"]
    rows = [row for row in read_metrics(run / "metrics.jsonl") if "validation_map" in row]
    assert [row["update"] for row in rows] == [3, 6]


def test_the_weights_of_the_best_evaluation_are_kept(train, monkeypatch):
    scores = iter([0.2, 0.9, 0.4])
    honest = finetune.compute_metrics
    monkeypatch.setattr(
        finetune, "compute_metrics", lambda *arguments: honest(*arguments) | {"accuracy": next(scores)}
    )
    run = train(evaluate_every=2, **{"checkpoint.keep": 9})
    second, last = (weights_of(list_checkpoints(run)[i]) for i in (1, 2))
    model = weights_of(run / "model")
    assert all(torch.equal(model[name], second[name]) for name in model)
    assert any(not torch.equal(model[name], last[name]) for name in model)
    assert "0.9" in (run / "model" / "README.md").read_text()


def test_patience_ends_a_run(train, monkeypatch):
    honest = finetune.compute_metrics
    monkeypatch.setattr(finetune, "compute_metrics", lambda *arguments: honest(*arguments) | {"accuracy": 0.5})
    run = train(evaluate_every=1, patience=2, max_updates=50)
    assert read_metrics(run / "metrics.jsonl")[-1]["update"] == 3
    assert (run / "model" / "model.safetensors").is_file()
    before = weights_of(run / "model")
    # A resumed run ends at once.
    train(evaluate_every=1, patience=2, max_updates=50, resume="auto")
    assert all(torch.equal(value, before[name]) for name, value in weights_of(run / "model").items())
    assert read_metrics(run / "metrics.jsonl")[-1]["update"] == 3


def test_an_interrupted_run_resumes_exactly(train, arguments):
    straight = train("straight", **{"watch.every": 1})
    interrupted = None
    for _ in range(5):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        config = parse(finetune.FinetuneConfig, arguments("interrupted", resume="auto", **{"watch.every": 1}))
        stop = StopRequest()
        stop.requested = True  # after the next update
        assert finetune.finetune(config, stop) == {}
        interrupted = config.output_dir
    assert not (interrupted / "model").exists()
    train("interrupted", resume="auto", **{"watch.every": 1})

    for folder in ("model", f"checkpoints/{list_checkpoints(straight)[-1].name}"):
        wanted = weights_of(straight / folder)
        for name, value in weights_of(interrupted / folder).items():
            assert torch.equal(value, wanted[name]), name
    compared = ("update", "loss", "grad_norm", "learning_rate", "clips_digest", "validation_accuracy")
    rows = [
        [{key: row[key] for key in compared if key in row} for row in read_metrics(run / "metrics.jsonl")]
        for run in (straight, interrupted)
    ]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 8


def test_each_fold_is_validated_by_a_model_trained_on_the_others(train, sounds, table, tmp_path, capsys):
    rows = list(csv.DictReader(table.open()))
    folds = tmp_path / "folds.csv"
    with open(folds, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "label", "split"))
        writer.writerows(
            (sounds / r["path"], Path(r["path"]).parent.name, f"fold{i % 2 + 1}") for i, r in enumerate(rows)
        )
    run = train(data=folds, folds="fold1,fold2", max_updates=2, evaluate_every=2, **{"data.hold_out": 0})
    for fold, other in (("fold1", "fold2"), ("fold2", "fold1")):
        settings = yaml.safe_load((run / fold / "config.yaml").read_text())
        assert settings["data"]["split"] == other
        assert settings["validation_split"] == fold
    summary = json.loads((run / "folds.json").read_text())
    accuracies = [fold["accuracy"] for fold in summary["folds"].values()]
    assert len(accuracies) == 2
    assert summary["summary"]["accuracy"]["mean"] == pytest.approx(np.mean(accuracies))
    assert summary["summary"]["accuracy"]["std"] == pytest.approx(np.std(accuracies, ddof=1))
    assert "accuracy over 2 folds" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="name one of the runs in it, fold1, fold2"):
        write_report(run)
    # A test split that is missing ends the program before training.
    with pytest.raises(SystemExit, match=r"test_split='test': .*fold1, fold2"):
        train("late", data=folds, folds="fold1,fold2", test_split="test", **{"data.hold_out": 0})
    assert not list((tmp_path / "late").glob("*/metrics.jsonl"))


def test_the_test_split_is_whole_if_clips_are_held_out(train, table):
    run = train(data=table, test_split="validation", max_updates=1, evaluate_every=1)
    results = json.loads((run / "model" / "evaluation" / "clips-validation" / "results.json").read_text())
    assert results["num_clips"] == 8
    held_out = json.loads((run / "model" / "evaluation" / "clips-train-held-out" / "results.json").read_text())
    assert 0 < held_out["num_clips"] < 24


def test_a_frozen_encoder_does_not_change(train, encoder):
    run = train(freeze_encoder="true", max_updates=4)
    before = weights_of(encoder)
    after = weights_of(list_checkpoints(run)[-1])
    for name, value in after.items():
        if name.startswith("sslam."):
            assert torch.equal(value, before[name]), name
    head = SSLAMConfig.from_pretrained(run / "model").num_labels
    assert after["classifier.dense.weight"].shape == (head, 32)
    assert after["classifier.dense.bias"].abs().sum() > 0


def test_a_head_for_the_same_classes_is_kept_and_another_is_not(train, table, caplog):
    first = train("first")
    caplog.set_level("INFO")
    again = train("again", model=first / "model")
    assert "encoder and head" in caplog.text
    caplog.clear()
    other = train("other", model=first / "model", data=table, **{"data.hold_out": 0})
    assert "a new head" in caplog.text
    assert SSLAMConfig.from_pretrained(again / "model").num_labels == 2
    assert SSLAMConfig.from_pretrained(other / "model").num_labels == 4


def test_epochs_and_warm_up_become_numbers_of_updates(train):
    run = train(max_updates="null", epochs=2.5, warmup_fraction=0.2, evaluate_every="null")
    settings = yaml.safe_load((run / "config.yaml").read_text())
    held_out = json.loads(next(run.glob("model/evaluation/*/results.json")).read_text())["num_clips"]
    updates = round(2.5 * (32 - held_out) / 4)
    assert settings["max_updates"] == updates
    assert settings["optimizer"]["warmup_updates"] == round(0.2 * updates)
    # The file is a valid configuration.
    parse(finetune.FinetuneConfig, ["--config", str(run / "config.yaml")])


def test_memory_and_speed_options_change_no_result(train):
    plain = train("plain", max_updates=2)
    for name, changes in {
        "checkpointed": {"gradient_checkpointing": "true"},
        "fast": {"memory": "fast"},
        "accumulated": {"batch_size": 2, "gradient_accumulation_steps": 2, "augmentation.mixup_alpha": 0},
    }.items():
        changed = train(name, max_updates=2, **changes)
        if name != "accumulated":
            for key, value in weights_of(list_checkpoints(changed)[-1]).items():
                assert torch.allclose(value, weights_of(list_checkpoints(plain)[-1])[key], atol=1e-5)
        digests = [read_metrics(run / "metrics.jsonl")[0]["clips_digest"] for run in (plain, changed)]
        assert (digests[0] == digests[1]) == (name != "accumulated")


@pytest.mark.parametrize(("wait_fraction", "count"), [(0.3, 1), (0.05, 0)])
def test_a_hint_about_waiting_for_data_appears_once(train, monkeypatch, caplog, wait_fraction, count):
    monkeypatch.setattr(trainer.IntervalTimer, "wait_fraction", wait_fraction)
    train()
    hints = [record.message for record in caplog.records if "waiting for data" in record.message]
    assert len(hints) == count
    assert all("30 % of the time" in hint and "num_workers is 0" in hint for hint in hints)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/nowhere"}, "model='/nowhere'"),
        ({"data": "/nowhere"}, "data.source='/nowhere'"),
        ({"data.hold_out": 0}, "would be the clips that it trains on"),
        ({"test_split": "test"}, "would be the clips that it trains on"),
        ({"label_file": "{tmp_path}/labels.csv"}, "the label 'noise', which is none of the 2 classes"),
        ({"features.max_length": 100}, "max_length=100"),
        ({"features.max_length": 4096}, "max_length"),
        ({"epochs": 3}, "either max_updates or epochs"),
        ({"folds": "one"}, "needs two or more"),
        ({"folds": "one,two+one"}, "folds=one,two+one has one twice"),
        ({"folds": "fold1,fold2"}, "no fold would be tested; with folds set it to 0"),
    ],
)
def test_impossible_settings_end_with_one_line(train, tmp_path, capsys, changes, message):
    (tmp_path / "labels.csv").write_text("index,label\n0,dog\n1,cat\n")
    changes = {
        key: value.format(tmp_path=tmp_path) if isinstance(value, str) else value for key, value in changes.items()
    }
    with pytest.raises(SystemExit) as error:
        train(**changes)
    assert message in f"{error.value} {capsys.readouterr().err}"


PROTOCOLS = {
    # frames, batch, updates, warm-up, learning rate, alpha, mask ratio, smoothing
    "as2m": (1024, 4 * 24, 400_000, 40_000, 5e-5, 0.8, 0.2, 0.0),
    "as20k": (1024, 48, 40_000, 4_000, 5e-5, 0.8, 0.2, 0.0),
    "esc50": (512, 48, 4_000, 400, 5e-5, 0.0, 0.4, 0.1),
    "speech_commands_v2": (128, 256, 40_000, 4_000, 2e-4, 0.8, 0.2, 0.1),
    "speech_commands_v1": (128, 256, 40_000, 4_000, 2e-4, 0.8, 0.2, 0.1),
    "spass": (1024, 48, None, None, 5e-5, 0.8, 0.2, 0.0),
    "idmt_desed_fl": (1024, 48, None, None, 5e-5, 0.8, 0.2, 0.0),
    "urban_sed": (1024, 48, None, None, 5e-5, 0.8, 0.2, 0.0),
}


@pytest.mark.parametrize("task", PROTOCOLS)
def test_shipped_protocols_are_the_published_ones(task):
    path = Path(finetune.__file__).parent / "configs" / f"finetune_{task}.yaml"
    config = parse(finetune.FinetuneConfig, ["--config", str(path), "--model", "encoder"])
    max_length, batch_size, updates, warmup, rate, alpha, mask, smoothing = PROTOCOLS[task]
    assert config.features.max_length == max_length
    assert config.batch_size * (4 if task == "as2m" else 1) == batch_size
    assert config.max_updates == updates
    if updates is None:
        assert (config.epochs, config.warmup_fraction) == (50, 0.1)
    else:
        assert config.optimizer.warmup_updates == warmup
    assert (config.optimizer.learning_rate, config.augmentation.mixup_alpha) == (rate, alpha)
    assert (config.augmentation.mask_ratio, config.label_smoothing) == (mask, smoothing)
    assert (config.augmentation.mixup_prob, config.drop_path_rate, config.augmentation.roll_and_gain) == (
        0.9,
        0.1,
        True,
    )
    optimizer = config.optimizer
    assert (optimizer.layer_decay, optimizer.weight_decay, optimizer.betas) == (0.65, 0.05, (0.9, 0.95))
    assert optimizer.initial_learning_rate == optimizer.final_learning_rate == 1e-6
    speech = task.startswith("speech")
    assert (config.augmentation.noise, config.augmentation.shift_frames) == ((0.1, 10) if speech else (0.0, 0))
    loss = "bce_per_clip" if speech else "cross_entropy" if task == "esc50" else "bce_per_target"
    assert (config.loss, config.problem_type) == (loss, "single" if speech or task == "esc50" else "multi")
    assert bool(config.data.sample_weights) == (task == "as2m")
    assert len(config.folds) == (5 if task == "esc50" else 0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("custom", {"epochs": 30, "max_updates": None, "patience": 8, "problem_type": "auto", "test_split": None}),
        ("tiny", {"epochs": None, "max_updates": 600, "evaluate_every": 200, "test_split": "test"}),
    ],
)
def test_other_shipped_configurations_are_complete(name, expected):
    path = Path(finetune.__file__).parent / "configs" / f"finetune_{name}.yaml"
    config = parse(finetune.FinetuneConfig, ["--config", str(path), "--model", "encoder"])
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.data.hold_out == (0.2 if name == "custom" else 0.0)
    assert config.optimizer.learning_rate == (5e-5 if name == "custom" else 3e-3)

"""Linear evaluation from the command line in both modes, on short soundscapes and tiny encoders."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from accelerate.state import AcceleratorState, GradientState
from safetensors.torch import load_file
from transformers import pipeline

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForPreTraining
from training import linear_eval
from training.arguments import parse, settings
from training.finetune import FinetuneConfig
from training.linear import features as features_module
from training.linear import pooled_fits
from training.linear.config import ALL_POOLINGS, LinearEvalConfig
from training.linear.features import FEATURE_POOLINGS, read_features
from training.soundscapes import __main__ as soundscapes

pytestmark = pytest.mark.slow

NUM_LAYERS = 2


@pytest.fixture(scope="session")
def scapes(tmp_path_factory):
    """Soundscapes of one to three sources: 42 for training, 9 for validation, 9 for the test."""
    folder = tmp_path_factory.mktemp("scapes") / "mini"
    arguments = ["--clips", "60", "--seconds", "1", "--max-sources", "3", "--held-out", "0.15", "--processes", "1"]
    soundscapes.main([str(folder), *arguments])
    return folder


@pytest.fixture(scope="session")
def sounds(tmp_path_factory):
    """A table with four folds of two classes: low tones and noises."""
    folder = tmp_path_factory.mktemp("sounds")
    path = folder / "clips.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("path", "category", "split"))
        for i in range(24):
            rng = np.random.default_rng(i)
            time = np.arange(8000) / 16_000
            wave = rng.standard_normal(8000) if i % 2 else np.sin(2 * np.pi * rng.uniform(200, 400) * time)
            name = f"{('tone', 'noise')[i % 2]}{i:02d}.flac"
            soundfile.write(folder / name, 0.1 * wave, 16_000)
            writer.writerow((name, ("tone", "noise")[i % 2], f"fold{1 + i // 2 % 4}"))
    return path


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "encoder"
    # This seed differs from the seed of new weights.
    torch.manual_seed(1)
    config = SSLAMConfig(
        hidden_size=32,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        intermediate_size=64,
        num_mel_bins=32,
        max_length=96,
        max_position_embeddings=8,
        decoder_num_layers=2,
        initializer_range=0.1,
    )
    SSLAMForPreTraining(config).save_pretrained(folder)
    SSLAMFeatureExtractor(num_mel_bins=32, max_length=96).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(encoder, scapes, cache_dir, tmp_path):
    """A function that runs the program in this process and returns its folder and results."""

    def run(name="out", **changes):
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        settings = {
            "model": encoder,
            "data": scapes,
            "output_dir": tmp_path / name,
            "cache_dir": cache_dir,
            "data.num_workers": 0,
            "watch.tracker": "none",
            "head.epochs": 5,
        } | changes
        linear_eval.main([f"--{key}={value}" for key, value in settings.items()])
        return tmp_path / name, json.loads((tmp_path / name / "results.json").read_text())

    return run


def classified(folder, waveform):
    """Return the pipeline's scores by label."""
    classifier = pipeline("audio-classification", str(folder), trust_remote_code=True)
    rows = classifier({"array": waveform, "sampling_rate": 16_000}, top_k=None, function_to_apply="sigmoid")
    return {row["label"]: row["score"] for row in rows}


def waveform_of(scapes, id_):
    (path,) = (scapes / "data").glob("test-*")
    (row,) = (row for row in pq.read_table(path).to_pylist() if row["id"] == id_)
    return soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="float32")[0]


@pytest.mark.parametrize(("layer", "pooling"), [("last", "mean"), ("1", "cls")])
def test_a_head_becomes_a_model_that_the_pipeline_runs(run, scapes, capsys, layer, pooling):
    out, results = run(layers=layer, poolings=pooling)

    text = capsys.readouterr().out
    assert "cached mode" in text
    assert results["mode"] == "cached"
    assert "computed once, without augmentation" in results["protocol"]
    assert results["num_clips"] == {"test": {"train": 42, "validation": 9, "test": 9}}
    (head,) = results["heads"]
    assert head == results["best_head"]
    assert head["pooling"] == pooling
    assert head["layer"] == (NUM_LAYERS if layer == "last" else 1)
    # Torch computes the metric of every head, scikit-learn that of the best one.
    assert head["test_map"] == pytest.approx(results["metrics"]["map"], abs=1e-5)
    assert f"{head['test_map']:.4f}" in text
    assert [row["group"] for row in results["by_group"]] == [1, 2, 3]
    assert not (out / "sweep.csv").exists()

    predictions = pq.read_table(out / "predictions.parquet").to_pylist()
    labels = [row["label"] for row in results["per_class"]]
    for row in predictions[:2]:
        scores = classified(out / "model", waveform_of(scapes, row["id"]))
        np.testing.assert_allclose([scores[label] for label in labels], row["scores"], rtol=0, atol=1e-5)
    model = SSLAMForAudioClassification.from_pretrained(out / "model")
    assert model.config.num_hidden_layers == head["layer"]
    assert model.config.problem_type == "multi_label_classification"
    assert "linear head" in (out / "model" / "README.md").read_text()


def test_a_sweep_over_layers_and_poolings(run, monkeypatch):
    out, results = run(layers="all", poolings="all")
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert len(rows) == (NUM_LAYERS + 1) * len(ALL_POOLINGS)
    assert {row["layer"] for row in rows} == {"0", "1", "2"}
    assert {row["pooling"] for row in rows} == {*FEATURE_POOLINGS, "cls+mean", "max+std", "mean+max+std"}
    assert (out / "sweep.png").stat().st_size > 10_000
    best = max(rows, key=lambda row: float(row["validation_map"]))
    assert results["best_head"]["layer"] == int(best["layer"])
    assert results["best_head"]["pooling"] == best["pooling"]
    assert results["metrics"]["map"] == pytest.approx(float(best["test_map"]), abs=1e-5)
    # A head in a sweep equals the head alone, and a sweep computes the features once.
    monkeypatch.setattr(features_module, "pooled_states", lambda *arguments: pytest.fail("features were computed"))
    _, alone = run("alone", layers="1", poolings="cls+mean")
    (same,) = (row for row in results["heads"] if (row["layer"], row["pooling"]) == (1, "cls+mean"))
    assert alone["best_head"]["test_map"] == pytest.approx(same["test_map"], abs=1e-5)
    assert (
        "the best head has the pooling cls+mean, and a classifier has one of cls, mean, lin_softmax"
        in alone["best_head_model"]
    )
    assert not (out.parent / "alone" / "model").exists()


def test_a_sweep_in_parts_gives_the_same_heads(run, monkeypatch):
    _, whole = run("whole", layers="0,1", poolings="cls,mean", **{"head.epochs": 2})
    monkeypatch.setattr(pooled_fits, "MAX_BYTES_IN_MEMORY", 1)
    _, parts = run("parts", layers="0,1", poolings="cls,mean", **{"head.epochs": 2})
    for one, other in zip(whole["heads"], parts["heads"], strict=True):
        assert one["test_map"] == pytest.approx(other["test_map"], abs=1e-4)


def test_heads_on_all_layers_side_by_side(run):
    kinds = {"head.kinds": "linear,ridge,knn", "ridge.strengths": 0.1, "knn.neighbours": 3, "few_shot.shots": 3}
    out, results = run("sweep", layers="all,concat", poolings="max+std", **kinds)
    for kind in ("linear", "ridge", "knn", "few_shot"):
        assert [row["layer"] for row in results["heads"] if row["kind"] == kind] == [0, 1, 2, "concat"]
    bytes_read = [row["cached_bytes_per_clip"] for row in results["heads"] if row["kind"] == "ridge"]
    assert bytes_read[3] == sum(bytes_read[:3])
    assert "| ridge | concat | max+std |" in (out / "heads.md").read_text()
    _, alone = run("alone", layers="concat", poolings="cls")
    assert alone["best_head"]["layer"] == "concat"
    assert alone["metrics"]["map"] == pytest.approx(alone["best_head"]["test_map"], abs=1e-5)
    assert "the best head reads all layers, and a classifier reads the last" in alone["best_head_model"]


def test_new_weights_for_comparison(run, capsys):
    _, results = run("new", new_weights="true", poolings="mean")
    _, trained = run("trained", poolings="mean")
    assert results["model"].endswith("new weights")
    assert "new weights" in capsys.readouterr().out
    assert results["features"] != trained["features"]
    assert results["best_head"]["test_map"] != trained["best_head"]["test_map"]
    _, again = run("again", new_weights="true", poolings="mean")
    assert again["best_head"] == results["best_head"]


def test_folds_of_clips_with_one_label(run, sounds):
    settings = {"data": sounds, "folds": "fold1,fold2,fold3,fold4", "poolings": "mean", "head.learning_rate": 0.01}
    out, results = run(**settings, **{"head.epochs": 20, "head.batch_size": 8})
    assert results["metric"] == "accuracy"
    best = results["best_head"]
    accuracies = [
        json.loads((out / f"fold{i}" / "results.json").read_text())["metrics"]["accuracy"] for i in range(1, 5)
    ]
    assert best["test_accuracy_by_fold"] == pytest.approx(accuracies)
    assert best["test_accuracy"] == pytest.approx(np.mean(accuracies))
    assert best["test_accuracy_spread"] == pytest.approx(np.std(accuracies, ddof=1))
    assert best["test_accuracy"] > 0.8
    assert best["best_epochs"] == [20] * 4
    assert {name: size["train"] for name, size in results["num_clips"].items()} == {
        f"fold{i}": 18 for i in range(1, 5)
    }
    assert not (out / "model").exists()
    # The same evaluation may write into the same folder again.
    assert run(**settings, **{"head.epochs": 20, "head.batch_size": 8})[1]["heads"] == results["heads"]


def test_few_shot_heads_beside_one_head_need_no_inner_folds(run, sounds):
    shots = {"few_shot.shots": 2, "few_shot.draws": 3, "head.kinds": "ridge", "ridge.strengths": 1}
    _, results = run(data=sounds, folds="fold1,fold2", poolings="mean", **shots)
    assert [row["kind"] for row in results["heads"]] == ["ridge", "few_shot"]
    assert results["best_head"]["kind"] == "ridge"


ALL_KINDS = {
    "head.kinds": "linear,ridge,layers,attentive,prototypes,knn",
    "head.learning_rates": "1e-3,1e-2",
    "few_shot.shots": 3,
    "few_shot.draws": 4,
    "attentive.epochs": 3,
    "prototypes.epochs": 3,
    "ridge.strengths": "0.1,1",
    "knn.neighbours": "1,3",
    "forest.trees": 5,
}

ONE_OF_EACH = {"knn.neighbours": 3, "ridge.strengths": 0.1}


def test_folds_of_a_folder_without_other_splits(run, sounds, tmp_path):
    for path in sorted(sounds.parent.glob("*.flac")):
        number = int(path.stem[-2:])
        target = tmp_path / "folds" / f"fold{1 + number // 2 % 3}" / path.stem[:-2] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    settings = {"data": tmp_path / "folds", "head.kinds": "ridge", "poolings": "mean"}
    _, results = run(**settings, folds="fold1,fold2,fold3")
    assert len(results["best_head"]["test_accuracy_by_fold"]) == 3
    with pytest.raises(SystemExit, match="fold9"):
        run("missing", **settings, folds="fold1,fold2,fold9")


def test_all_kinds_of_heads_beside_new_weights_and_a_forest(run, sounds, capsys):
    settings = {"data": sounds, "folds": "fold1,fold2,fold3,fold4", "poolings": "mean,std", "layers": "1,last"}
    out, results = run(**settings, **ALL_KINDS, compare="new_weights,mfcc_forest", **{"head.epochs": 2})
    text = capsys.readouterr().out
    # Layers, poolings and settings: linear, ridge and knn 2 * 2 * 2, layers and few-shot 2 * 2, patch tokens 2.
    kinds = [row["kind"] for row in results["heads"]]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "linear": 8, "ridge": 8, "layers": 4, "attentive": 2, "prototypes": 2, "knn": 8, "few_shot": 4
    }  # fmt: skip
    assert all(row["validation_accuracy"] is not None for row in results["heads"])
    assert all(row["parameters"] > 0 and row["flops_per_clip"] > 0 for row in results["heads"])
    assert "the test fold has no part in the choice" in results["chosen_by"]

    # Each fold's files are those of the head that is chosen for it.
    best = results["best_head"]
    accuracies = [
        json.loads((out / f"fold{i}" / "results.json").read_text())["metrics"]["accuracy"] for i in range(1, 5)
    ]
    assert best["test_accuracy_by_fold"] == pytest.approx(accuracies)
    assert best["test_accuracy"] == pytest.approx(np.mean(accuracies))
    encoders = {row["encoder"] for row in results["best_heads"] if row["among"] == "all kinds"}
    assert len(encoders) == 3
    # Each kind, layer and pooling has one row, with the settings that the inner folds choose.
    places = [(row["encoder"], row["kind"], row["layer"], row["pooling"]) for row in results["places"]]
    assert len(set(places)) == len(places)
    assert {place[0] for place in places} == encoders
    assert any(name.endswith("new weights") for name in encoders)

    rows = list(csv.DictReader((out / "heads.csv").open()))
    assert len(rows) == 2 * 36 + 1
    (forest,) = (row for row in rows if row["kind"] == "forest")
    assert float(forest["test_accuracy"]) > 0.8  # tones and noises
    tables = (out / "heads.md").read_text()
    for heading in ("## Best head by validation", "## Best head of each kind", "## All heads"):
        assert heading in tables
    assert "| MFCC + forest | forest |" in tables
    assert (out / "heads.png").stat().st_size > 10_000
    assert "MFCC + forest" in text
    # Each rival has the files of its own chosen heads.
    for rival, name in {"new_weights": "new weights", "mfcc_forest": "MFCC + forest"}.items():
        (row,) = (r for r in results["best_heads"] if r["among"] == "all kinds" and r["encoder"].endswith(name))
        files = [out / rival / f"fold{i}" / "results.json" for i in range(1, 5)]
        found = [json.loads(path.read_text())["metrics"]["accuracy"] for path in files]
        assert found == pytest.approx(row["test_accuracy_by_fold"])
        assert files[0].with_name("predictions.parquet").exists()
    assert not (out / "sweep.csv").exists()
    # A single head leaves no tables of an earlier sweep.
    run(**settings | {"poolings": "mean", "layers": "last"}, **{"head.epochs": 2})
    assert not (out / "heads.csv").exists()
    assert not (out / "mfcc_forest").exists()


def test_all_kinds_of_heads_with_validation_clips_and_several_labels(run):
    _, results = run(**ALL_KINDS, poolings="std", compare="mfcc_forest", **{"head.epochs": 2})
    assert {row["kind"] for row in results["heads"]} == {*ALL_KINDS["head.kinds"].split(","), "few_shot"}
    assert results["chosen_by"] == "The mean metric on the validation clips chooses the head."
    best = max((row for row in results["heads"] if row["kind"] != "few_shot"), key=lambda row: row["validation_map"])
    assert best == results["best_head"]
    assert results["metrics"]["map"] == pytest.approx(best["test_map"], abs=1e-5)
    assert "No model was written" in results["best_head_model"]
    (few,) = (row for row in results["heads"] if row["kind"] == "few_shot")
    assert few["test_map_spread"] > 0
    assert few["settings"] == "shots 3"


@pytest.mark.parametrize("kind", ["ridge", "layers", "attentive", "prototypes", "knn"])
def test_the_files_of_a_single_head_are_those_of_its_kind(run, kind):
    """The predictions are computed anew from the fitted head, for each kind."""
    _, results = run(poolings="std", **ALL_KINDS | {"head.kinds": kind, "few_shot.shots": 0} | ONE_OF_EACH)
    assert results["best_head"]["kind"] == kind
    assert results["metrics"]["map"] == pytest.approx(results["best_head"]["test_map"], abs=1e-5)
    assert f"of the kind {kind}," in results["best_head_model"]


def test_inner_folds_choose_among_layers(run, sounds):
    out, results = run(data=sounds, folds="fold1,fold2,fold3", layers="all", poolings="std", **{"head.epochs": 2})
    rows = list(csv.DictReader((out / "heads.csv").open()))
    assert len(rows) == NUM_LAYERS + 1
    assert (out / "sweep.csv").exists()
    assert all(0 <= row["validation_accuracy"] <= 1 for row in results["heads"])


def test_held_out_clips_replace_a_validation_split(run, sounds):
    settings = {"data": sounds, "data.split": "fold1+fold2+fold3", "test_split": "fold4"}
    _, results = run(**settings, **{"data.hold_out": 0.3, "layers": "all"})
    size = results["num_clips"]["fold4"]
    assert size["train"] + size["validation"] == 18
    assert size["test"] == 6
    assert 2 <= size["validation"] <= 9
    _, on_held_out = run("other", **settings | {"data.hold_out": 0.3, "test_split": "null"})
    assert on_held_out["num_clips"] == {"held out": size | {"test": size["validation"]}}


def test_a_share_that_holds_out_no_clip_is_refused(run, sounds):
    """Otherwise the first of several heads would count as the best by validation."""
    settings = {"data": sounds, "data.split": "fold1+fold2+fold3", "test_split": "fold4", "layers": "all"}
    with pytest.raises(SystemExit, match="hold_out=1e-06 holds out none of the 18 training clips"):
        run(**settings, **{"data.hold_out": 1e-6})


def test_published_mode_is_fine_tuning_with_a_frozen_encoder(run, encoder, capsys):
    changes = {"mode": "published", "batch_size": 8, "head.epochs": 2, "poolings": "mean"}
    out, results = run(**changes, **{"head.learning_rate": 0.02})
    assert results["mode"] == "published"
    assert "published mode" in capsys.readouterr().out
    assert set(results["metrics"]) == {"validation", "test"}
    evaluated = json.loads((out / "model" / "evaluation" / "mini-test" / "results.json").read_text())
    assert evaluated["metrics"]["map"] == results["metrics"]["test"]["map"]
    settings = (out / "config.yaml").read_text()
    for line in ("freeze_encoder: true", "learning_rate: 0.02", "warmup_updates: 0", "classifier_pooling: mean"):
        assert line in settings
    # Two epochs of 42 clips in batches of 8.
    assert "max_updates: 10\n" in settings
    before, after = (load_file(folder / "model.safetensors") for folder in (encoder, out / "model"))
    assert len(after) > 20
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) if name.startswith("sslam.") else name.startswith("classifier.")


def test_a_fine_tuned_model_gets_a_new_head(run, tmp_path, scapes):
    _, first = run("first", poolings="mean")
    _, second = run(
        "second", model=tmp_path / "first" / "model", mode="published", batch_size=21, **{"head.epochs": 1}
    )
    assert second["settings"]["model"] == str(tmp_path / "first" / "model")
    names = load_file(tmp_path / "second" / "encoder" / "model.safetensors")
    assert not any(name.startswith("classifier") for name in names)
    _, third = run("third", model=tmp_path / "first" / "model", poolings="mean")
    assert third["features"] != {}
    assert third["heads"][0]["test_map"] == pytest.approx(first["heads"][0]["test_map"], abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": "3"}, "layers: '3' is not one of 0 to 2, last, all, concat"),
        ({"layers": "concat", "head.kinds": "linear,attentive"}, "concat has no patch tokens, which attentive reads"),
        ({"poolings": "median"}, "poolings: 'median' is not one of cls, mean"),
        ({"mode": "published", "layers": "all"}, "mode=published fits one head"),
        ({"mode": "published", "head.kinds": "knn"}, "mode=published fits one linear head"),
        ({"mode": "published", "compare": "mfcc_forest"}, "mode=published fits one linear head"),
        ({"new_weights": "true", "compare": "new_weights"}, "leave new_weights out of compare"),
        ({"head.kinds": "linear,mlp"}, "must be some of linear, ridge, layers, attentive, prototypes, knn"),
        ({"head.kinds": "attentive", "token_cache_gib": 1e-6}, "token_cache_gib"),
        ({"token_cache_gib": 0}, "token_cache_gib=0.0 must be positive"),
        ({"attentive.queries": 0}, "attentive.queries=0 must be at least 1"),
        ({"prototypes.learning_rate": 0}, "prototypes.learning_rate=0.0 must be positive"),
        ({"prototypes.weight_decay": -1}, "prototypes.weight_decay=-1.0 must not be negative"),
        ({"knn.neighbours": "0,1"}, "knn.neighbours=[0, 1]"),
        ({"few_shot.draws": 0}, "draws=0 at least 1"),
        ({"forest.trees": 0}, "trees=0 must be at least 1"),
        ({"mode": "published", "poolings": "max"}, "poolings=max: mode=published has cls"),
        ({"test_split": "nowhere"}, "--test_split null"),
        ({"test_split": "validation", "validation_split": "nowhere"}, "--data.hold_out 0.1"),
        ({"problem_type": "single"}, "train clips do not have one label each"),
        ({"head.learning_rate": 1e30}, "head on layer 2, cls is not finite. Lower head.learning_rate"),
        ({"model": "/no/such/folder", "mode": "published"}, "/no/such/folder"),
        ({"model": "/no/such/folder"}, "/no/such/folder"),
    ],
)
def test_impossible_settings_end_with_one_line(run, capsys, changes, message):
    with pytest.raises(SystemExit) as exit_:
        run(**changes)
    assert message in f"{exit_.value} {capsys.readouterr().err}"


def test_configurations_of_fine_tuning_are_accepted():
    keys = {setting.key for setting in settings(LinearEvalConfig)}
    assert {setting.key for setting in settings(FinetuneConfig)} < keys
    required = ["--model", "m", "--data", "d", "--output_dir", "o", "--mode", "published"]
    for path in Path(linear_eval.__file__).parent.glob("configs/finetune_*.yaml"):
        config = parse(LinearEvalConfig, ["--config", str(path), *required])
        fitting = config.finetuning()
        assert (fitting.max_updates, fitting.epochs, fitting.warmup_fraction) == (None, 50, None)
        assert fitting.optimizer.learning_rate == config.head.learning_rate
        assert fitting.freeze_encoder


def test_results_of_another_evaluation_are_not_overwritten(run, tmp_path):
    run(poolings="mean")
    run(poolings="cls")
    before = (tmp_path / "out" / "results.json").read_bytes()
    with pytest.raises(SystemExit, match=r"is of another evaluation \(model.*output_dir"):
        run(new_weights="true")
    assert (tmp_path / "out" / "results.json").read_bytes() == before


def test_training_clips_cannot_be_test_clips(run, sounds, tmp_path):
    """A plain folder gives all its clips for every split."""
    folder = tmp_path / "plain"
    for path in sorted(sounds.parent.glob("*.flac")):
        target = folder / path.name[:-7] / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    with pytest.raises(SystemExit, match=r"would be the clips that it trains on.*test_split to null"):
        run(data=folder, **{"data.hold_out": 0.3})
    _, results = run(data=folder, test_split="null", **{"data.hold_out": 0.3})
    assert results["metric"] == "accuracy"
    with pytest.raises(SystemExit, match=r"24 of the 24 clips of fold2 are also in fold1"):
        run("folds", data=folder, folds="fold1,fold2,fold3")


def test_folds_that_overlap_are_refused(run, sounds, capsys):
    with pytest.raises(SystemExit):
        run(data=sounds, folds="fold1+fold2,fold2+fold3,fold4")
    assert "folds=fold1+fold2,fold2+fold3,fold4 has fold2 twice" in capsys.readouterr().err


def test_validation_clips_from_another_source(run, sounds):
    """The validation split has the same name as the training split."""
    rows = sounds.read_text().splitlines()
    elsewhere = sounds.with_name("elsewhere.csv")
    elsewhere.write_text("\n".join([rows[0], *(row.replace("fold4", "fold1") for row in rows if "fold4" in row)]))
    settings = {"data": sounds, "data.split": "fold1", "validation_source": elsewhere, "validation_split": "fold1"}
    _, results = run(**settings, test_split="null")
    assert results["num_clips"] == {"fold1": {"train": 6, "validation": 6, "test": 6}}
    assert read_features(Path(results["features"]["validation"])).ids == [
        row.split(",")[0] for row in sorted(rows) if "fold4" in row
    ]


def test_two_processes_give_the_results_of_one(run, launch, scapes, encoder, tmp_path):
    _, alone = run("alone", poolings="cls,mean")
    text = launch(
        *("-m", "training.linear_eval", "--model", encoder, "--data", scapes, "--output_dir", tmp_path / "both"),
        *("--cache_dir", tmp_path / "cache", "--poolings", "cls,mean", "--head.epochs", 5, "--data.num_workers", 0),
        *("--batch_size", 5, "--watch.tracker", "none"),
    )
    assert text.count("cached mode") == 1
    both = json.loads((tmp_path / "both" / "results.json").read_text())
    assert both["num_clips"] == alone["num_clips"]
    for one, other in zip(alone["heads"], both["heads"], strict=True):
        assert one["test_map"] == pytest.approx(other["test_map"], abs=1e-4)
    for split, folder in alone["features"].items():
        one, other = (read_features(Path(path)) for path in (folder, both["features"][split]))
        assert one.ids == other.ids
        np.testing.assert_allclose(one.pooled, other.pooled, rtol=0, atol=1e-5)

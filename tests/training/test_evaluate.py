"""`python -m training.evaluate` from the command line, on generated soundscapes and models without training."""

import csv
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pandas
import pytest
import torch
import yaml
from accelerate import Accelerator
from huggingface_hub import EvalResult, ModelCard
from matplotlib.image import imread
from sklearn.metrics import average_precision_score

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMForPreTraining, SSLAMModel
from training.data.config import EvaluationDataConfig
from training.data.labels import LabelSet
from training.data.loader import make_loader
from training.data.sources import open_source
from training.evaluate import EvaluateConfig, evaluate, load_classifier, main
from training.evaluation.card import write_results_to_card
from training.evaluation.metrics import compute_metrics
from training.evaluation.prediction import predict
from training.soundscapes.__main__ import write_dataset
from training.soundscapes.sounds import SOURCES

pytestmark = pytest.mark.slow

NAMES = sorted(SOURCES)
# Not a multiple of two processes or of the batch size.
NUM_CLIPS = 13


@pytest.fixture(scope="module")
def soundscapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "soundscapes"
    folder.mkdir()
    write_dataset(folder, {"test": NUM_CLIPS, "lone": 1}, 0.7, 16_000, seed=0, max_sources=3, num_processes=1)
    return folder


@pytest.fixture
def make_model(make_config, tmp_path):
    """A function that writes a model without training."""

    def make_model(name="model", cls=SSLAMForAudioClassification, names=NAMES, **changes):
        settings = {"num_mel_bins": 128, "problem_type": "multi_label_classification"} | changes
        if names is not None:
            settings |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
        cls(make_config(**settings)).save_pretrained(tmp_path / name)
        SSLAMFeatureExtractor(max_length=64).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make_model


def run(model, data, *arguments):
    main(["--model", str(model), "--data", str(data), "--data.num_workers", "0", *arguments])


def read_csv(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def read_json(path):
    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def test_several_labels_end_to_end(make_model, soundscapes, capsys):
    model = make_model()
    run(model, soundscapes)
    folder = model / "evaluation" / "soundscapes-test"
    printed = capsys.readouterr().out
    expected_files = {
        *("results.json", "predictions.parquet", "per_class.csv", "per_class.png", "by_group.csv", "by_group.png"),
    }
    assert {path.name for path in folder.iterdir()} == expected_files
    assert all(str(folder / name) in printed for name in expected_files)

    # Other tools read the predictions, and scikit-learn computes the same metrics from them.
    table = pandas.read_parquet(folder / "predictions.parquet")
    rows = datasets.load_dataset("parquet", data_files=str(folder / "predictions.parquet"), split="train")
    assert rows.column_names == ["id", "labels", "scores", "group"]
    assert rows["id"][:] == table["id"].tolist() == [f"test-{i:06d}" for i in range(NUM_CLIPS)]
    truth = datasets.load_dataset(str(soundscapes), split="test").select_columns(["id", "labels", "num_sources"])
    assert [sorted(labels) for labels in table["labels"]] == [sorted(labels) for labels in truth["labels"]]
    assert table["group"].tolist() == truth["num_sources"][:]
    scores = np.stack(table["scores"])
    targets = np.array([[name in labels for name in NAMES] for labels in table["labels"]])
    present = targets.any(axis=0)
    results = read_json(folder / "results.json")
    assert results["metrics"]["map"] == pytest.approx(
        average_precision_score(targets[:, present], scores[:, present], average="macro")
    )
    assert results["metrics"]["num_classes_left_out"] == (~present).sum() > 0
    assert (results["num_clips"], results["num_skipped"], results["num_classes"]) == (NUM_CLIPS, 0, len(NAMES))
    assert results["dataset"]["source"] == str(soundscapes)
    assert results["settings"]["data.split"] == "test"
    assert f"{results['metrics']['map']:.4f}" in printed

    classes = read_csv(folder / "per_class.csv")
    assert [row["label"] for row in classes] == NAMES
    assert [int(row["num_positives"]) for row in classes] == targets.sum(axis=0).tolist()
    assert [row["average_precision"] != "" for row in classes] == present.tolist()
    # Metrics by polyphony.
    groups = read_csv(folder / "by_group.csv")
    assert [int(row["num_sources"]) for row in groups] == sorted(set(truth["num_sources"]))
    assert sum(int(row["num_clips"]) for row in groups) == NUM_CLIPS
    among = table["group"].to_numpy() == int(groups[0]["num_sources"])
    present = targets[among].any(axis=0)
    assert float(groups[0]["map"]) == pytest.approx(
        average_precision_score(targets[among][:, present], scores[among][:, present], average="macro")
    )
    assert [row["map"] for row in results["by_group"]] == [float(row["map"]) for row in groups]
    for name in ("per_class.png", "by_group.png"):
        assert imread(folder / name)[..., :3].std() > 0.05


def test_one_label_by_the_data(make_model, make_folder, caplog):
    model = make_model(problem_type=None, names=["clips", "deeper"])
    folder = make_folder(7, first="clips")
    with caplog.at_level("INFO"):
        run(model, folder, "--output_dir", str(model / "results"))
    assert "Every clip has one label: taken for single_label_classification" in caplog.text
    results = read_json(model / "results" / "results.json")
    confusion = read_csv(model / "results" / "confusion.csv")
    counts = np.array([[int(row[name]) for name in ("clips", "deeper")] for row in confusion])
    assert counts.sum(axis=1).tolist() == [4, 3]
    assert results["metrics"]["accuracy"] == counts.trace() / 7
    table = pandas.read_parquet(model / "results" / "predictions.parquet")
    np.testing.assert_allclose(np.stack(table["scores"]).sum(axis=1), 1, atol=1e-6)
    assert (np.stack(table["scores"]).argmax(axis=1) == 0).sum() == counts[:, 0].sum()
    assert imread(model / "results" / "confusion.png")[..., :3].std() > 0.05
    assert not (model / "results" / "by_group.csv").exists()
    (result,) = ModelCard.load(model / "README.md").data.eval_results[:1]
    assert (result.metric_type, result.metric_value) == ("accuracy", results["metrics"]["accuracy"])


def test_two_processes_give_the_results_of_one(make_model, soundscapes, launch, tmp_path):
    model_dir, out = make_model(), tmp_path / "out"
    out.mkdir()
    launch(Path(__file__).parent / "scripts" / "distributed_prediction.py", model_dir, soundscapes, out)
    model, extractor = load_classifier(str(model_dir))
    for split, shares in (("test", [7, 6]), ("lone", [1, 0])):
        data = EvaluationDataConfig(str(soundscapes), split=split, num_workers=0)
        loader = make_loader(open_source(data), extractor, batch_size=4, seed=0, repeat=False)
        alone = predict(model, loader, LabelSet(NAMES), Accelerator())
        both = [np.load(out / f"{split}-{rank}.npz") for rank in range(2)]
        assert [int(found["own"]) for found in both] == shares
        for found in both:
            assert found["ids"].tolist() == alone.ids
            assert found["groups"].tolist() == alone.groups
            np.testing.assert_array_equal(found["targets"], alone.targets)
            # The batches are composed otherwise, which changes the last bits.
            np.testing.assert_allclose(found["logits"], alone.logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(both[0]["logits"], both[1]["logits"])
        if split == "test":
            expected = compute_metrics(alone, "multi_label_classification", NAMES)
    results = read_json(out / "results" / "results.json")
    assert results["num_processes"] == 2
    assert results["num_clips"] == NUM_CLIPS
    assert results["per_class"] == expected["per_class"]
    assert results["metrics"].items() <= expected.items()


def test_the_card_keeps_its_content_and_has_results_once(make_model, soundscapes):
    model = make_model()
    text = "\n# A model\r\nof mine — with `---` in it\n\n---\nlast line"
    other = {
        "task": {"type": "audio-classification"},
        "dataset": {"name": "ESC-50", "type": "ashraq/esc50", "split": "train"},
        "metrics": [{"type": "accuracy", "value": 0.9}],
    }
    before = {"license": "mit", "tags": ["audio", "x"], "model-index": [{"name": "mine", "results": [other]}]}
    (model / "README.md").write_text(f"---\n{yaml.safe_dump(before, sort_keys=False)}---\n{text}", newline="")
    run(model, soundscapes)
    first = (model / "README.md").read_bytes()
    card = ModelCard.load(model / "README.md")
    assert card.text == text
    assert card.data.to_dict().keys() == before.keys()
    assert (card.data.license, card.data.model_name) == ("mit", "mine")
    found = {(result.dataset_name, result.dataset_split, result.metric_type) for result in card.data.eval_results}
    metrics = ("map", "mean_auc", "d_prime")
    assert found == {("ESC-50", "train", "accuracy"), *(("soundscapes", "test", metric) for metric in metrics)}

    run(model, soundscapes)
    assert (model / "README.md").read_bytes() == first
    run(model, soundscapes, "--data.split", "lone")
    assert len(ModelCard.load(model / "README.md").data.eval_results) == 4 + 1  # one clip has no AUC
    run(model, soundscapes, "--update_card", "false", "--data.split", "lone+test")
    assert len(ModelCard.load(model / "README.md").data.eval_results) == 5


def test_metrics_that_became_undefined_are_removed_from_the_card(tmp_path):
    def result(metric, value, split="test"):
        place = {"task_type": "audio-classification", "dataset_type": "d", "dataset_name": "d", "dataset_split": split}
        return EvalResult(**place, metric_type=metric, metric_value=value)

    everything = [result("map", 0.5), result("d_prime", 1.0), result("d_prime", 2.0, "train"), result("wer", 3.0)]
    write_results_to_card(tmp_path, everything, set())
    write_results_to_card(tmp_path, [result("map", 1.0)], {"map", "d_prime"})
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    found = [(result.dataset_split, result.metric_type, result.metric_value) for result in results]
    assert sorted(found) == [("test", "map", 1.0), ("test", "wer", 3.0), ("train", "d_prime", 2.0)]


def test_a_perfect_model_has_no_infinity_in_its_files(make_model, make_folder):
    model = make_model(names=["clips", "deeper"])
    results = evaluate_with(model, make_folder(4, first="clips"), [[9, -9], [-9, 9]])
    assert (results["metrics"]["mean_auc"], results["metrics"]["d_prime"]) == (1, None)
    types = [result.metric_type for result in ModelCard.load(model / "README.md").data.eval_results]
    assert types == ["map", "mean_auc"]


def evaluate_with(model, folder, logits_of):
    """Return the results of a model whose logits depend on the enclosing folder."""

    def forward(self, input_values):
        # Clips are in the order of the listing: those in clips/, then those in deeper/.
        logits = torch.tensor([logits_of[i >= len(input_values) / 2] for i in range(len(input_values))])
        return type("Output", (), {"logits": logits.float()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SSLAMForAudioClassification, "forward", forward)
        run(model, folder)
    return read_json(next(model.glob("evaluation/*/results.json")))


def test_the_data_sets_table_translates_ids_of_labels(make_model, write_parquet, tmp_path):
    model = make_model(names=["wind", "rain", "speech"])
    write_parquet(tmp_path / "data", [6])
    (tmp_path / "data" / "labels.csv").write_text("index,mid,label\n0,/m/0,rain\n1,/m/1,speech\n2,/m/2,wind\n")
    run(model, tmp_path / "data", "--data.split", "train")
    table = pandas.read_parquet(model / "evaluation" / "data-train" / "predictions.parquet")
    assert [list(labels) for labels in table["labels"]] == [["rain"], ["speech"], ["wind"]] * 2


def test_a_model_without_names_takes_them_from_the_label_file(make_model, write_parquet, tmp_path):
    model = make_model(names=None, num_labels=3)
    write_parquet(tmp_path / "data", [6])
    (tmp_path / "labels.csv").write_text("0,/m/0,rain\n1,/m/1,speech\n2,/m/2,wind\n")
    run(model, tmp_path / "data", "--data.split", "train", "--label_file", str(tmp_path / "labels.csv"))
    classes = read_csv(model / "evaluation" / "data-train" / "per_class.csv")
    assert [row["label"] for row in classes] == ["rain", "speech", "wind"]


def test_skipped_clips_are_counted(make_model, soundscapes, make_folder):
    model, folder = make_model(names=["clips", "deeper"]), make_folder(4, first="clips")
    (folder / "clips" / "clip000.flac").write_bytes(b"no sound")
    run(model, folder)
    results = read_json(next(model.glob("evaluation/*/results.json")))
    assert (results["num_clips"], results["num_skipped"]) == (3, 1)
    assert sum(results["skipped"].values()) == 1


def test_parts_of_a_split_have_separate_results(make_model, soundscapes):
    model = make_model()
    for held_out in ("true", "false"):
        run(model, soundscapes, "--data.hold_out", "0.4", "--data.held_out", held_out)
    ids = [
        pandas.read_parquet(model / "evaluation" / f"soundscapes-test-{part}" / "predictions.parquet")["id"].tolist()
        for part in ("held-out", "kept")
    ]
    assert all(ids)
    assert sorted(ids[0] + ids[1]) == [f"test-{i:06d}" for i in range(NUM_CLIPS)]
    splits = {result.dataset_split for result in ModelCard.load(model / "README.md").data.eval_results}
    assert splits == {"test-held-out", "test-kept"}


def test_results_replace_only_earlier_results(make_model, soundscapes, tmp_path):
    model, out = make_model(), tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "confusion.png").write_text("of an evaluation before")
    run(model, soundscapes, "--output_dir", str(out))
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "confusion.png").exists()
    assert not list(out.glob(".*"))
    assert not (model / "evaluation").exists()


class TestErrors:
    @pytest.fixture
    def fails(self, soundscapes, tmp_path, capsys):
        def fails(model, *arguments, data=soundscapes):
            with pytest.raises(SystemExit) as ended:
                run(model, data, *arguments)
            message = str(ended.value.code)
            assert message.startswith("error: ")
            assert "\n" not in message
            assert not list(tmp_path.glob("*/evaluation"))
            return message

        return fails

    @pytest.mark.parametrize("cls", [SSLAMForPreTraining, SSLAMModel])
    def test_model_without_classifier(self, fails, make_model, cls):
        assert "without a classifier, which would be random" in fails(make_model(cls=cls))

    def test_folder_without_a_model(self, fails, make_model, tmp_path):
        assert "--output_dir" in fails("somebody/model")
        (tmp_path / "empty").mkdir()
        assert "empty" in fails(tmp_path / "empty")
        model = make_model()
        (model / "model.safetensors").write_bytes(b"\0" * 100)
        assert str(model) in fails(model)

    def test_data(self, fails, make_model, tmp_path):
        model = make_model()
        assert "nowhere" in fails(model, data=tmp_path / "nowhere")
        assert "eval" in fails(model, "--data.split", "eval")
        assert "no column 'names'" in fails(model, "--data.label_column", "names")
        assert "no column 'place'" in fails(model, "--data.group_column", "place")
        assert "without labels" in fails(model, "--data.label_column", "null")
        assert "none of the 2 classes" in fails(make_model("other", names=["a", "b"]))

    def test_results_of_other_data(self, fails, make_model, soundscapes, tmp_path):
        model, out = make_model(), tmp_path / "out"
        run(model, soundscapes, "--output_dir", str(out))
        before = (out / "results.json").read_bytes()
        assert "results on other data" in fails(model, "--data.split", "lone", "--output_dir", str(out))
        assert (out / "results.json").read_bytes() == before
        (out / "results.json").write_text("[]")
        assert "not of an evaluation" in fails(model, "--output_dir", str(out))

    def test_places_that_cannot_be_written(self, fails, make_model, tmp_path):
        (tmp_path / "file").write_text("")
        assert "cannot be made or written to" in fails(make_model(), "--output_dir", str(tmp_path / "file" / "out"))

    def test_card_that_cannot_be_read(self, fails, make_model):
        model = make_model()
        (model / "README.md").write_text("---\ntags: [\n---\n")
        assert "metadata of" in fails(model)
        assert (model / "README.md").read_text() == "---\ntags: [\n---\n"


def test_evaluate_returns_the_evaluation(make_model, soundscapes, tmp_path):
    model = make_model()
    data = EvaluationDataConfig(str(soundscapes), num_workers=0)
    evaluation = evaluate(EvaluateConfig(str(model), data, output_dir=tmp_path / "out", update_card=False))
    assert len(evaluation.predictions.ids) == NUM_CLIPS
    assert evaluation.metrics["map"] == read_json(tmp_path / "out" / "results.json")["metrics"]["map"]
    shutil.rmtree(tmp_path / "out")

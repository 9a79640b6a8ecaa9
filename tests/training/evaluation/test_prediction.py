"""Predictions, one row for each clip sorted by id, and their metrics."""

import json
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from modeling_sslam import SSLAMForAudioClassification
from training.data.config import DataConfig, DataError
from training.data.labels import LabelSet
from training.data.loader import make_loader
from training.data.sources import open_source
from training.evaluation.metrics import compute_metrics, metrics_by_group, problem_type_of
from training.evaluation.prediction import Predictions, predict

NAMES = ["/m/0", "/m/1", "/m/2"]
MULTI, SINGLE = "multi_label_classification", "single_label_classification"


@pytest.fixture
def model(make_config):
    return SSLAMForAudioClassification(
        make_config(num_mel_bins=128, max_length=32, id2label=dict(enumerate(NAMES)), label2id={})
    )


@pytest.fixture
def loader_of(extractor):
    def loader_of(folder, **changes):
        settings = {"crop": "head", "label_column": "labels", "shuffle_buffer": 0, "num_workers": 0} | changes
        source = open_source(DataConfig(str(folder), **settings))
        return make_loader(source, extractor, batch_size=4, seed=0, repeat=False)

    return loader_of


def predictions_of(logits, targets, groups=None):
    ids = [f"clip{i}" for i in range(len(logits))]
    return Predictions(ids, np.array(logits, np.float32), np.array(targets, np.float32), groups)


def test_predicts_every_clip_once_in_the_order_of_ids(model, loader_of, write_parquet, tmp_path):
    write_parquet(tmp_path / "data", [3, 4, 3])
    loader = loader_of(tmp_path / "data", num_workers=2, shuffle_buffer=5)
    found = predict(model, loader, LabelSet(NAMES), Accelerator())
    assert found.ids == [f"clip{i:03d}" for i in range(10)]
    assert found.groups is None
    assert found.targets.argmax(axis=1).tolist() == [i % 3 for i in range(10)]
    assert found.targets.sum() == 10
    # Batches do not matter: each clip alone gives the same logits.
    model.eval()
    for batch in loader_of(tmp_path / "data"):
        for id_, values in zip(batch["ids"], batch["input_values"], strict=True):
            with torch.no_grad():
                alone = model(values[None]).logits[0].numpy()
            np.testing.assert_allclose(found.logits[found.ids.index(id_)], alone, atol=1e-5)


def test_leaves_every_module_in_the_mode_it_had(model, loader_of, write_parquet, tmp_path):
    write_parquet(tmp_path / "data", [2])
    model.config.drop_path_rate = 0.5
    model.train()
    model.sslam.eval()
    seen = []
    model.classifier.register_forward_pre_hook(lambda module, _: seen.append(module.training))
    predict(model, loader_of(tmp_path / "data"), LabelSet(NAMES), Accelerator())
    assert seen == [False]
    assert model.training
    assert model.classifier.training
    assert not any(module.training for module in model.sslam.modules())


def test_groups_come_with_the_predictions(model, loader_of, write_parquet, tmp_path):
    write_parquet(tmp_path / "data", [5])
    loader = loader_of(tmp_path / "data", group_column="video_id")
    assert predict(model, loader, LabelSet(NAMES), Accelerator()).groups == [f"clip{i:03d}" for i in range(5)]


def test_unusable_clips_are_rejected(model, loader_of, write_parquet, tmp_path):
    write_parquet(tmp_path / "data" / "a", [4])
    write_parquet(tmp_path / "data" / "b", [2])

    def check(message, names=NAMES, **changes):
        with pytest.raises(DataError, match=message):
            predict(model, loader_of(tmp_path / "data", **changes), LabelSet(names), Accelerator())

    check("2 ids name more than one clip, such as clip000, clip001")
    check("'/m/2', which is none of the 2 classes", names=NAMES[:2])
    check("come without labels", label_column=None)
    with torch.no_grad():
        model.classifier.dense.bias[1] = math.nan
    write_parquet(tmp_path / "short", [2], seconds=0.01)
    with pytest.raises(DataError, match="4 of 4 clips are not finite, such as of clip000, clip001"):
        predict(model, loader_of(tmp_path / "data" / "a"), LabelSet(NAMES), Accelerator())
    with pytest.raises(DataError, match="no usable clip"):
        predict(model, loader_of(tmp_path / "short"), LabelSet(NAMES), Accelerator())


def test_metrics_can_be_written_as_json():
    metrics = compute_metrics(predictions_of([[3, 0], [1, 0], [2, 0]], [[1, 0], [0, 0], [1, 0]]), MULTI, ["a", "b"])
    assert next(iter(metrics)) == "map"
    assert (metrics["map"], metrics["mean_auc"], metrics["d_prime"]) == (1, 1, None)
    assert metrics["num_classes_left_out"] == 1
    assert metrics["per_class"] == [
        {"label": "a", "num_positives": 2, "average_precision": 1, "auc": 1},
        {"label": "b", "num_positives": 0, "average_precision": None, "auc": None},
    ]
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_metrics_of_one_label():
    metrics = compute_metrics(predictions_of([[3, 0], [1, 0]], [[1, 0], [0, 1]]), SINGLE, ["a", "b"])
    assert next(iter(metrics)) == "accuracy"
    assert metrics["accuracy"] == 0.5
    assert metrics["confusion_matrix"] == [[1, 0], [1, 0]]
    assert metrics["per_class"][1] == {"label": "b", "num_clips": 1, "recall": 0, "precision": None}
    assert json.loads(json.dumps(metrics, allow_nan=False)) == metrics


def test_large_logits_are_not_tied():
    """The sigmoids of these logits all round to 1."""
    assert compute_metrics(predictions_of([[40], [50], [60]], [[0], [0], [1]]), MULTI, ["a"])["map"] == 1


@pytest.mark.parametrize(
    ("targets", "problem_type", "message"),
    [
        ([[0, 0], [0, 0]], MULTI, "None of the 2 clips has a label"),
        ([[1, 1], [1, 0]], SINGLE, "1 clips do not have one label each, such as clip0"),
        ([[1, 0], [0, 0]], SINGLE, "such as clip1"),
    ],
)
def test_unmeasurable_predictions_are_rejected(targets, problem_type, message):
    with pytest.raises(DataError, match=message):
        compute_metrics(predictions_of([[1, 2], [3, 4]], targets), problem_type, ["a", "b"])


def test_the_problem_type_is_the_models_or_inferred_from_the_data():
    one, several = (predictions_of([[1, 2], [3, 4]], [[1, 0], row]) for row in ([0, 1], [0, 0]))
    assert problem_type_of(None, one) == SINGLE
    assert problem_type_of(None, several) == MULTI
    assert problem_type_of(MULTI, one) == MULTI
    assert problem_type_of(SINGLE, several) == SINGLE
    with pytest.raises(DataError, match="problem_type='regression' has no metric"):
        problem_type_of("regression", one)


def test_each_group_is_measured_on_its_own():
    logits, targets = [[3, 1], [1, 2], [2, 2], [0, 1]], [[1, 0], [0, 1], [0, 0], [1, 0]]
    groups = metrics_by_group(predictions_of(logits, targets, [10, 2, 2, 10]), MULTI, ["a", "b"])
    assert list(groups) == [2, 10]
    # Means are over the classes with a positive clip in the group.
    assert groups[2]["num_clips"] == groups[10]["num_clips"] == 2
    assert groups[2]["per_class"][0]["average_precision"] is None
    assert groups[2]["map"] == groups[2]["per_class"][1]["average_precision"] == 0.5
    assert groups[10]["map"] == groups[10]["per_class"][0]["average_precision"] == 1
    assert metrics_by_group(predictions_of(logits, targets), MULTI, ["a", "b"]) == {}


def test_a_group_without_labels_has_clips_and_no_map():
    groups = metrics_by_group(predictions_of([[1], [2]], [[1], [0]], [1, 0]), MULTI, ["a"])
    assert (groups[0]["num_clips"], groups[0]["map"]) == (1, None)
    assert groups[1]["map"] == 1


@pytest.mark.parametrize(
    ("groups", "order"),
    [
        (["10", "9", "2"], ["2", "9", "10"]),
        (["park", None, "3"], ["3", None, "park"]),
        ([math.nan, 2.0, float("nan")], [2.0, None]),
    ],
)
def test_groups_are_ordered(groups, order):
    logits = [[1]] * len(groups)
    assert list(metrics_by_group(predictions_of(logits, logits, groups), MULTI, ["a"])) == order


@pytest.mark.parametrize(("groups", "message"), [([["a"]] * 101, "holds lists"), (list(range(101)), "101 values")])
def test_columns_that_are_not_groups_are_rejected(groups, message):
    logits = [[1]] * len(groups)
    with pytest.raises(DataError, match=message):
        metrics_by_group(predictions_of(logits, logits, groups), MULTI, ["a"])

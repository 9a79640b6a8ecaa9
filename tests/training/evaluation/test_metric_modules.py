"""The `evaluate` modules in training/evaluation: their values, and how they are loaded."""

import itertools
import math
import multiprocessing
import shutil
import socket
import sys

import evaluate
import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from training.evaluation.metrics import METRICS_FOLDER, load_metric


def tag(scores, targets):
    return load_metric("audio_tagging").compute(predictions=scores, references=targets)


def classify(found, true, num_classes):
    return load_metric("clip_accuracy").compute(predictions=found, references=true, num_classes=num_classes)


class TestAudioTagging:
    def test_classes_equal_scikit_learns_values_also_with_ties(self):
        rng = np.random.default_rng(0)
        # Four values for 60 clips: ties within and between positives and negatives.
        scores = rng.integers(0, 4, (60, 5)).astype(np.float32)
        targets = (rng.random((60, 5)) < 0.3).astype(np.int8)
        result = tag(scores, targets)
        for k in range(5):
            assert result["average_precision"][k] == average_precision_score(targets[:, k], scores[:, k])
            assert result["auc"][k] == roc_auc_score(targets[:, k], scores[:, k])
        assert result["map"] == pytest.approx(average_precision_score(targets, scores, average="macro"))
        assert result["mean_auc"] == pytest.approx(roc_auc_score(targets, scores, average="macro"))
        assert result["num_positives"] == targets.sum(axis=0).tolist()

    def test_by_hand(self):
        # Positives have ranks 1 and 3 of 4, with precisions 1/1 and 2/3. Of 4 positive-negative pairs, 3 are ordered.
        result = tag([[4.0], [3.0], [2.0], [1.0]], [[1], [0], [1], [0]])
        assert result["map"] == pytest.approx((1 + 2 / 3) / 2)
        assert result["mean_auc"] == 0.75
        assert result["d_prime"] == pytest.approx(math.sqrt(2) * 0.6744897501960817)

    def test_equal_scores_are_one_threshold(self):
        result = tag(np.zeros((8, 1)), [[1], [0], [0], [0], [0], [0], [0], [1]])
        assert result["map"] == 2 / 8
        assert result["mean_auc"] == 0.5
        assert result["d_prime"] == 0

    def test_the_order_of_clips_does_not_matter(self):
        rng = np.random.default_rng(1)
        scores = rng.integers(0, 3, (30, 4)).astype(np.float32)
        targets = (rng.random((30, 4)) < 0.4).astype(np.int8)
        order = rng.permutation(30)
        assert tag(scores, targets) == tag(scores[order], targets[order])

    def test_classes_without_positives_are_left_out_and_counted(self):
        scores = [[0.9, 0.1, 0.5], [0.2, 0.8, 0.5], [0.1, 0.3, 0.5]]
        result = tag(scores, [[1, 0, 1], [0, 0, 1], [0, 0, 1]])
        assert result["average_precision"][0] == 1
        assert math.isnan(result["average_precision"][1])
        # All clips are positive: the precision is 1 at any threshold, but the AUC has no pair.
        assert result["average_precision"][2] == 1
        assert math.isnan(result["auc"][2])
        assert result["map"] == 1
        assert (result["num_classes_left_out"], result["num_classes_left_out_of_auc"]) == (1, 2)
        assert result["d_prime"] == math.inf

    def test_targets_without_positives(self):
        result = tag(np.ones((3, 2)), np.zeros((3, 2)))
        assert all(math.isnan(result[name]) for name in ("map", "chance_map", "mean_auc", "d_prime"))
        assert result["num_classes_left_out"] == 2

    def test_one_clip(self):
        result = tag([[0.1, 0.9]], [[1, 0]])
        assert result["map"] == result["chance_map"] == 1
        assert math.isnan(result["mean_auc"])
        assert math.isnan(result["d_prime"])

    def test_the_worst_order(self):
        result = tag([[0.0], [1.0]], [[1], [0]])
        assert (result["map"], result["mean_auc"], result["d_prime"]) == (0.5, 0, -math.inf)

    @pytest.mark.parametrize("num_positives", [1, 2, 5])
    def test_chance_map_is_the_mean_over_all_orders(self, num_positives):
        targets = np.array([1] * num_positives + [0] * (5 - num_positives))
        orders = [average_precision_score(targets, order) for order in itertools.permutations(range(5))]
        assert tag(np.zeros((5, 1)), targets[:, None])["chance_map"] == pytest.approx(np.mean(orders))

    @pytest.mark.parametrize(
        ("scores", "targets", "message"),
        [
            ([[0.1], [math.nan]], [[1], [0]], "1 clips have scores that are not finite"),
            ([[0.1], [math.inf]], [[1], [0]], "not finite"),
            ([[0.1, 0.2]], [[1]], "one shape"),
            ([[0.1, 0.2], [0.1]], [[1, 0], [1, 0]], "differ in the number of classes"),
            ([[0.1]], [[2]], "0 or 1"),
        ],
    )
    def test_wrong_values_are_rejected(self, scores, targets, message):
        with pytest.raises(ValueError, match=message):
            tag(scores, targets)


class TestClipAccuracy:
    def test_by_hand(self):
        result = classify([0, 1, 1, 2, 0], [0, 1, 0, 2, 2], num_classes=4)
        assert result["accuracy"] == 3 / 5
        assert result["confusion_matrix"] == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
        assert result["recall"][:3] == [0.5, 1, 0.5]
        assert math.isnan(result["recall"][3])
        assert result["precision"][:3] == [0.5, 0.5, 1]
        assert math.isnan(result["precision"][3])
        assert result["balanced_accuracy"] == pytest.approx(2 / 3)
        assert result["num_clips"] == [2, 1, 2, 0]
        assert result["num_classes_left_out"] == 1

    def test_one_clip(self):
        result = classify([1], [0], num_classes=2)
        assert (result["accuracy"], result["balanced_accuracy"]) == (0, 0)

    @pytest.mark.parametrize(("found", "true"), [([3], [0]), ([0], [-1])])
    def test_classes_out_of_range_are_rejected(self, found, true):
        with pytest.raises(ValueError, match="must be 0 to 2"):
            classify(found, true, num_classes=3)


def load_twice(folder, start, results):
    """Load a private copy of a module when all processes are ready, then edit it and load it again."""
    for name in [name for name in sys.modules if name.startswith("evaluate_modules")]:
        del sys.modules[name]  # imported by earlier tests
    start.wait()
    values = []
    for replacement in ("_mean(precision)", "7.0"):
        script = folder / "audio_tagging.py"
        script.write_text(script.read_text().replace('"map": _mean(precision)', f'"map": {replacement}'))
        metric = evaluate.load(str(folder), keep_in_memory=True)
        values.append(metric.compute(predictions=[[0.0], [1.0]], references=[[0], [1]])["map"])
    results.put(values)


def test_modules_load_offline_in_parallel_and_anew_after_an_edit(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("network access")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(evaluate.config.HF_MODULES_CACHE)])
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    # Forked processes need not import everything again.
    context, count = multiprocessing.get_context("fork"), 3
    start, results = context.Barrier(count), context.Queue()
    processes = []
    for i in range(count):
        folder = tmp_path / str(i) / "audio_tagging"
        shutil.copytree(METRICS_FOLDER / "audio_tagging", folder, ignore=shutil.ignore_patterns("__pycache__"))
        processes.append(context.Process(target=load_twice, args=(folder, start, results)))
        processes[-1].start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * count
    assert [results.get(timeout=60) for _ in processes] == [[1, 7]] * count
    assert list(tmp_path.glob("modules/**/audio_tagging.py"))

"""Nearest neighbours and few-shot means against scikit-learn and plain loops."""

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid

from training.linear.neighbours import draw_shots, few_shot_logits, neighbour_logits, standardized


@pytest.fixture
def data():
    """Features and one-hot targets of 40 training clips, and features of 25 others."""
    generator = torch.Generator().manual_seed(0)
    classes = torch.arange(40) % 4
    centres = 2 * torch.randn(4, 6, generator=generator)
    features = centres[classes] + torch.randn(40, 6, generator=generator)
    return features, torch.eye(4)[classes], torch.randn(25, 6, generator=generator)


def test_one_neighbour_equals_scikit_learns(data):
    features, targets, others = data
    (logits,) = neighbour_logits(features, targets, others, [1])
    training, queries = standardized(features, others)
    reference = KNeighborsClassifier(1, metric="cosine").fit(training.numpy(), targets.argmax(1).numpy())
    np.testing.assert_array_equal(logits.argmax(1), reference.predict(queries.numpy()))


def test_all_neighbours_give_the_frequencies_of_classes_weighted_by_similarity(data):
    features, targets, others = data
    (logits,) = neighbour_logits(features, targets, others, [1000])
    training, queries = standardized(features, others)
    weights = (1 + queries @ training.T) / 2
    torch.testing.assert_close(logits, weights @ targets / len(targets), atol=1e-6, rtol=1e-5)


def test_numbers_of_neighbours_together_equal_each_alone(data):
    together = neighbour_logits(*data, [1, 3, 20])
    for k, logits in zip([1, 3, 20], together, strict=True):
        torch.testing.assert_close(neighbour_logits(*data, [k])[0], logits)


def test_a_constant_feature_has_no_effect(data):
    features, targets, others = data
    wider = [torch.cat((part, torch.full((len(part), 1), 0.3)), dim=1) for part in (features, others)]
    expected = neighbour_logits(features, targets, others, [5])
    torch.testing.assert_close(neighbour_logits(wider[0], targets, wider[1], [5]), expected)


def test_draws_have_distinct_clips_of_each_class_and_depend_on_the_seed(data):
    _, targets, _ = data
    drawn = draw_shots(targets, 3, 20, seed=5)
    for rows in drawn:
        for label, of in enumerate(rows):
            assert len(set(of.tolist())) == 3
            assert targets[of, label].all()
    assert len({tuple(torch.cat(rows).tolist()) for rows in drawn}) == 20
    again = draw_shots(targets, 3, 20, seed=5)
    assert all(torch.equal(torch.cat(a), torch.cat(b)) for a, b in zip(drawn, again, strict=True))
    other = draw_shots(targets, 3, 20, seed=6)
    assert not torch.equal(torch.cat(drawn[0]), torch.cat(other[0]))


def test_few_shot_scores_are_cosines_to_the_class_means(data):
    features, targets, others = data
    drawn = draw_shots(targets, 5, 3, seed=0)
    logits = few_shot_logits(features, others, drawn)
    assert logits.shape == (3, 25, 4)
    for rows, scores in zip(drawn, logits, strict=True):
        support, queries = standardized(features[torch.cat(rows)], others)
        reference = NearestCentroid().fit(support.numpy(), np.repeat(np.arange(4), 5))
        means = torch.from_numpy(reference.centroids_)
        expected = torch.nn.functional.cosine_similarity(queries[:, None], means[None], dim=-1)
        torch.testing.assert_close(scores, expected.float(), atol=1e-5, rtol=1e-5)


def test_a_class_without_clips_gets_the_least_similarity(data):
    features, targets, others = data
    targets = torch.cat((targets, torch.zeros(40, 1)), dim=1)
    (logits,) = few_shot_logits(features, others, draw_shots(targets, 50, 1, seed=0))
    assert (logits[:, 4] == -1).all()
    assert (logits[:, :4] > -1).all()

"""Linear heads: their optimum against closed forms and scikit-learn, their independence, and their metrics."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score

from modeling_sslam.modeling_sslam import SSLAMClassifier
from training.linear.heads import (
    Head,
    HeadConfig,
    InMemory,
    LayerSumHeads,
    LinearHeads,
    accuracy,
    fit_heads,
    head_logits,
    logits_of,
    mean_average_precision,
    train_heads,
)
from training.run.losses import loss_sum

MULTI, SINGLE = "multi_label_classification", "single_label_classification"
WIDTH, NUM_CLASSES = 16, 3


@pytest.fixture
def fit():
    def fit(features, targets, validation=None, problem_type=MULTI, **settings):
        loss = {MULTI: "bce_per_target", SINGLE: "cross_entropy"}[problem_type]
        fixed = {"eps": 1e-6, "std": 0.02, "loss": loss, "seed": settings.pop("seed", 0)}
        return fit_heads(features, targets, validation, problem_type, HeadConfig(**settings), **fixed)

    return fit


def separable(num_clips, problem_type, seed=0, scale=1.0):
    """Return features `(1, N, WIDTH)` and targets that are a linear function of them."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(1, num_clips, WIDTH, generator=generator)
    directions = torch.eye(WIDTH)[:NUM_CLASSES]
    scores = features[0] @ directions.T
    if problem_type == SINGLE:
        targets = torch.eye(NUM_CLASSES)[scores.argmax(1)]
        features[0] += 2 * targets @ directions
    else:
        targets = (scores > 0.5).float()
        features[0] += 2 * (2 * targets - 1) @ directions
    return scale * features, targets


@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("problem_type", [MULTI, SINGLE])
def test_separable_clips_are_separated(fit, problem_type, standardize):
    features, targets = separable(200, problem_type)
    held_out = separable(100, problem_type, seed=1)
    fitted = fit(features, targets, held_out, problem_type, standardize=standardize, learning_rate=1e-2, epochs=30)
    assert fitted.scores == [1.0]
    assert fitted.losses[-1] < 0.3 * fitted.losses[0]


def test_loss_reaches_that_of_logistic_regression(fit):
    """Without weight decay, on clips that are not separable, the optimum is the maximum likelihood estimate."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 400, 6, generator=generator)
    normalised = torch.nn.functional.layer_norm(features[0], (6,), eps=1e-6)
    noise = torch.randn(400, generator=generator)
    targets = (normalised[:, 0] - 0.5 * normalised[:, 3] + noise > 0).float()[:, None]
    best = LogisticRegression(C=np.inf, tol=1e-8, max_iter=1000).fit(normalised.numpy(), targets[:, 0].numpy())
    logits = torch.from_numpy(best.decision_function(normalised.numpy())).float()[:, None]
    expected = (loss_sum(logits, targets, "bce_per_target") / targets.sum()).item()

    fitted = fit(features, targets, epochs=300, batch_size=400, learning_rate=3e-2, weight_decay=0.0)
    assert fitted.losses[-1].item() == pytest.approx(expected, rel=1e-6)
    assert fitted.losses[-1] < fitted.losses[0]


def test_constant_features_give_the_classes_frequencies(fit):
    """Only the bias can learn, and its optimum is the logit of the frequency. Rounding errors are not scaled up."""
    targets = (torch.arange(200)[:, None] % torch.tensor([2, 4, 5]) == 0).float()
    features = torch.randn(1, 1, WIDTH).repeat(1, 200, 1) + 1e-6 * torch.randn(1, 200, WIDTH)
    fitted = fit(features, targets, epochs=300, batch_size=200, learning_rate=3e-2, weight_decay=0.0)
    probabilities = fitted.heads(features).sigmoid()[0]
    torch.testing.assert_close(probabilities.mean(0), targets.mean(0), atol=1e-6, rtol=0)
    assert probabilities.std(0).max() < 1e-6


@pytest.mark.parametrize("problem_type", [MULTI, SINGLE])
def test_each_head_ends_as_it_would_alone(fit, problem_type):
    generator = torch.Generator().manual_seed(5)
    parts = [separable(n, problem_type, seed) for seed, n in ((0, 90), (1, 40))]
    (features, targets), (others, other_targets) = parts
    # The heads see the features, noise, and the features at another scale.
    features = torch.cat((features, torch.randn(1, 90, WIDTH, generator=generator), features.flip(2) * 7 + 3))
    others = torch.cat((others, torch.randn(1, 40, WIDTH, generator=generator), others.flip(2) * 7 + 3))
    together = fit(features, targets, (others, other_targets), problem_type, epochs=6)
    assert len(set(together.best_epochs)) > 1
    for i in range(3):
        alone = fit(features[i : i + 1], targets, (others[i : i + 1], other_targets), problem_type, epochs=6)
        torch.testing.assert_close(alone.losses[:, 0], together.losses[:, i], atol=1e-6, rtol=1e-6)
        assert alone.best_epochs == together.best_epochs[i : i + 1]
        assert alone.scores == pytest.approx(together.scores[i : i + 1], abs=1e-6)
        for name, value in alone.heads.classifier_state(0).items():
            torch.testing.assert_close(value, together.heads.classifier_state(i)[name], atol=1e-6, rtol=1e-5)


def test_the_best_epoch_has_the_best_score(fit):
    """With wrong validation targets, the best head is the one that has learnt least."""
    features, targets = separable(100, SINGLE)
    shifted = targets.roll(1, dims=1)
    fitted = fit(features, targets, (features, shifted), SINGLE, epochs=8, learning_rate=1e-2)
    assert fitted.best_epochs[0] < 8
    assert fitted.scores[0] == pytest.approx(accuracy(fitted.heads(features), shifted).item())
    last = fit(features, targets, None, SINGLE, epochs=8, learning_rate=1e-2)
    assert last.best_epochs == [8]
    assert last.scores is None
    assert accuracy(last.heads(features), shifted).item() < fitted.scores[0]


def test_the_seed_determines_the_weights(fit):
    features, targets = separable(60, MULTI)
    weights = [fit(features, targets, epochs=2, seed=seed).heads.weight for seed in (0, 0, 1)]
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=0)
    assert not torch.allclose(weights[0], weights[2], atol=1e-3)


def test_head_is_the_models_classifier(make_config, fit):
    config = make_config(hidden_size=WIDTH, num_labels=NUM_CLASSES, classifier_norm_eps=1e-6, classifier_pooling="cls")
    features, targets = separable(50, MULTI, scale=3.0)
    fitted = fit(features, targets, epochs=3)
    classifier = SSLAMClassifier(config)
    classifier.load_state_dict(fitted.heads.classifier_state(0))
    with torch.no_grad():
        expected = classifier(features[0][:, None])
        torch.testing.assert_close(fitted.heads(features)[0], expected, atol=1e-6, rtol=1e-6)
        state = fitted.heads.classifier_state(0)
        torch.testing.assert_close(head_logits(features[0], state, 1e-6), expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("standardize", [True, False])
def test_the_norm_starts_standardised_if_configured(fit, standardize):
    features, targets = separable(100, MULTI)
    features = features + torch.arange(WIDTH) * 0.3
    fitted = fit(features, targets, epochs=1, learning_rate=1e-9, standardize=standardize)
    expected = LinearHeads(1, WIDTH, NUM_CLASSES, 1e-6, 0.02, torch.Generator().manual_seed(0))
    if standardize:
        expected.standardize(features)
        assert not torch.allclose(expected.norm_weight, torch.ones(()), atol=0.1)
    # An update changes a weight by at most its learning rate: 0.25e-6, 0.75e-6 and 1e-6 in the three updates.
    for name, value in expected.named_parameters():
        torch.testing.assert_close(fitted.heads.get_parameter(name), value, atol=3e-6, rtol=0)


def test_standardize_gives_features_mean_0_and_deviation_1():
    generator = torch.Generator().manual_seed(0)
    features = 5 + torch.randn(2, 300, WIDTH, generator=generator) * torch.arange(1.0, WIDTH + 1)
    heads = LinearHeads(2, WIDTH, NUM_CLASSES, 1e-6, 0.02, generator)
    heads.standardize(features)
    normalised = torch.nn.functional.layer_norm(features, (WIDTH,), eps=1e-6)
    standard = normalised * heads.norm_weight + heads.norm_bias
    torch.testing.assert_close(standard.mean(1), torch.zeros(2, WIDTH), atol=1e-6, rtol=0)
    torch.testing.assert_close(standard.std(1, correction=0), torch.ones(2, WIDTH), atol=1e-6, rtol=0)


@pytest.mark.parametrize("levels", [2, 7, 10_000])
def test_average_precision_equals_scikit_learns_with_ties(levels):
    rng = np.random.default_rng(levels)
    scores = rng.integers(levels, size=(3, 50, 6)).astype(np.float32)
    targets = rng.random((50, 6)) < np.array([0.02, 0.1, 0.5, 0.9, 1.0, 0.0])
    targets[0, 0] = True
    assert not targets[:, 5].any()
    expected = [np.mean([average_precision_score(targets[:, k], s[:, k]) for k in range(5)]) for s in scores]
    computed = mean_average_precision(torch.from_numpy(scores), torch.from_numpy(targets).float())
    np.testing.assert_allclose(computed, expected, rtol=0, atol=3e-7)


def test_a_head_reads_the_columns_of_its_poolings():
    assert Head(3, "max").columns == [3]
    assert Head(0, "mean+cls").columns == [1, 0]


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"learning_rate": 0.0}, {"batch_size": 0}, {"weight_decay": -1.0}])
def test_wrong_settings_are_rejected(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HeadConfig(**wrong)


@pytest.mark.parametrize(
    "wrong", [{"learning_rates": [1e-3, 0.0]}, {"weight_decays": [-0.1]}, {"kinds": ["linear", "mlp"]}, {"kinds": []}]
)
def test_wrong_lists_of_settings_are_rejected(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HeadConfig(**wrong)


def test_a_sum_over_layers_weights_the_layer_that_tells_the_classes():
    features, targets = separable(200, SINGLE)
    noise = torch.randn(200, 2, WIDTH, generator=torch.Generator().manual_seed(9))
    layers = torch.stack((noise[:, 0], features[0], noise[:, 1]), dim=1)[None]
    heads = LayerSumHeads(layers, NUM_CLASSES, 1e-6, 0.02, torch.Generator().manual_seed(0))
    torch.testing.assert_close(heads.layer_weights(), torch.full((1, 3), 1 / 3))
    train_heads(
        heads,
        InMemory(layers),
        targets,
        None,
        SINGLE,
        HeadConfig(learning_rate=3e-2, epochs=20),
        generator=torch.Generator().manual_seed(0),
        loss="cross_entropy",
        label_smoothing=0.0,
        description="Fitting",
    )
    weights = heads.layer_weights()[0]
    assert weights.argmax() == 1
    assert weights.sum().item() == pytest.approx(1)
    assert accuracy(logits_of(heads, InMemory(layers)), targets)[0] > 0.95


def test_the_scale_of_a_layer_has_no_effect_on_a_sum_over_layers():
    features = torch.randn(2, 30, 3, WIDTH, generator=torch.Generator().manual_seed(0))
    scaled = features * torch.tensor([1.0, 50.0, 0.1])[:, None] + 7
    logits = []
    for layers in (features, scaled):
        heads = LayerSumHeads(layers, NUM_CLASSES, 1e-6, 0.02, torch.Generator().manual_seed(0))
        logits.append(heads(layers))
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-3)


def test_names_of_heads():
    assert str(Head(3, "max")) == "layer 3, max"
    assert str(Head("all", "mean", "layers", (("lr", 0.01),))) == "sum of layers, mean, layers, lr 0.01"
    assert str(Head(0, "mfcc", "forest")) == "MFCC and random forest"

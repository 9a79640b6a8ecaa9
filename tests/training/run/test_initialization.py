"""Tests of the patch projection's initialisation from data."""

import pytest
import torch

from modeling_sslam import SSLAMConfig
from modeling_sslam.modeling_sslam import SSLAMPatchEmbeddings
from training.run.initialization import patches_of, whiten_patches


@pytest.fixture
def batches():
    """Frames whose patches share a strong common level, as log-mel frames do."""
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(8, 8, 1, 2, 1, generator=generator).expand(8, 8, 16, 2, 16).reshape(8, 128, 32)
    return [2.0 + 3.0 * level + torch.randn(8, 128, 32, generator=generator) for _ in range(4)]


def embeddings_for(hidden_size: int) -> SSLAMPatchEmbeddings:
    """Return new embeddings of patches of 16 x 16."""
    config = SSLAMConfig(hidden_size=hidden_size, num_attention_heads=4, num_mel_bins=32, max_length=128)
    return SSLAMPatchEmbeddings(config)


def outputs_of(embeddings: SSLAMPatchEmbeddings, batches: list[torch.Tensor]) -> torch.Tensor:
    """Return the projected patches `(patches, hidden_size)`, without positions."""
    patches = [embeddings(batch) - embeddings.position_embeddings[: batch.shape[1] // 16 * 2] for batch in batches]
    return torch.cat(patches).flatten(0, 1).detach().double()


@pytest.mark.parametrize("hidden_size", [32, 256, 320])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_variances_follow_the_data_s_eigenvalues(batches, hidden_size, strength):
    embeddings = embeddings_for(hidden_size)
    whiten_patches(embeddings, batches, strength, torch.Generator().manual_seed(1))
    outputs = outputs_of(embeddings, batches)
    assert outputs.mean(0).abs().max() < 1e-4
    kept = min(hidden_size, 256)
    patches = torch.cat([patches_of(batch, 16) for batch in batches]).double()
    expected = torch.linalg.eigvalsh(patches.T.cov(correction=0)).flip(0)[:kept] ** (1 - strength)
    got = torch.linalg.eigvalsh(outputs.T.cov(correction=0)).flip(0)[:kept]
    torch.testing.assert_close(got / got.sum(), expected / expected.sum(), rtol=1e-3, atol=1e-6)
    assert outputs.var(correction=0, dim=0).mean() == pytest.approx(1.0, rel=1e-3)


def test_new_weights_hand_on_few_directions(batches):
    """The fault that this initialisation mends: one direction holds most of the variance."""
    shares = []
    embeddings = embeddings_for(64)
    for whiten in (False, True):
        if whiten:
            whiten_patches(embeddings, batches, 1.0, torch.Generator().manual_seed(1))
        eigenvalues = torch.linalg.eigvalsh(outputs_of(embeddings, batches).T.cov())
        shares.append(float(eigenvalues[-1] / eigenvalues.sum()))
    assert shares[0] > 0.5
    assert shares[1] < 0.03


def test_the_generator_determines_the_projection(batches):
    weights = []
    for seed in (1, 1, 2):
        embeddings = embeddings_for(32)
        whiten_patches(embeddings, batches, 0.5, torch.Generator().manual_seed(seed))
        weights.append(embeddings.projection.weight.detach())
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_silence_is_an_error():
    with pytest.raises(ValueError, match="all alike"):
        whiten_patches(embeddings_for(32), [torch.zeros(2, 128, 32)], 0.5, torch.Generator())

"""Fixtures of the models' tests."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn

from modeling_sslam import SSLAMConfig, SSLAMForAudioClassification

# Substrings of published names, and their replacements in this package.
RENAMED = {
    "model.": "sslam.",
    "local_encoder.proj.": "patch_embeddings.projection.",
    "extra_tokens": "encoder.cls_token",
    "pre_norm.": "encoder.layernorm.",
    "blocks.": "encoder.layers.",
    "attn.qkv.": "attention.qkv.",
    "attn.proj.": "attention.output.",
    "norm1.": "attention_layernorm.",
    "norm2.": "mlp_layernorm.",
    "sslam.fc_norm.": "classifier.layernorm.",
    "sslam.head.": "classifier.dense.",
}
PUBLISHED_POSITIONS = "model.fixed_positional_encoder.positions"


@pytest.fixture(scope="session")
def load_published(golden_dir: Path) -> Callable[..., tuple[SSLAMForAudioClassification, torch.Tensor]]:
    """`load_published("hub_finetuned", **config)` returns a model with a published checkpoint's weights, in eval mode,
    and that checkpoint's own position table."""

    def load(name: str, **config) -> tuple[SSLAMForAudioClassification, torch.Tensor]:
        published = load_file(golden_dir / name / "model.safetensors")
        positions = published.pop(PUBLISHED_POSITIONS)
        weights = {}
        for key, value in published.items():
            for old, new in RENAMED.items():
                key = key.replace(old, new)
            weights[key] = value
        size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 128}
        model = SSLAMForAudioClassification(SSLAMConfig(num_labels=12, **(size | config))).eval()
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected
        assert all(key.startswith("classifier.") for key in missing)
        return model, positions

    return load


@pytest.fixture
def transformers_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Capture the records that transformers logs. By default transformers hides them from the root logger."""
    transformers.utils.logging.enable_propagation()
    yield caplog
    transformers.utils.logging.disable_propagation()


@pytest.fixture
def assert_rounds_like() -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]:
    """`assert_rounds_like(found, plain, exact)` for float32 results of the same computation in another order.

    The Euclidean distance of torch's own float32 result `plain` from `exact`, the float64 result, is the rounding of
    the computation. `found` may lie twice as far from `exact`.
    """

    def check(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> None:
        assert found.dtype == plain.dtype == torch.float32
        assert exact.dtype == torch.float64
        error, rounding = (found.double() - exact).norm().item(), (plain.double() - exact).norm().item()
        assert error <= 2 * rounding, f"{error:.3g} from the exact result; plain torch's is {rounding:.3g} from it"

    return check


@pytest.fixture
def results_and_gradients() -> Callable[..., list[torch.Tensor]]:
    """`results_and_gradients(function, module, *inputs)`: the result for the inputs, then the gradients of
    the inputs and of the module's parameters."""

    def compute(function: Callable, module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
        inputs = tuple(x.detach().clone().requires_grad_() for x in inputs)
        module.zero_grad()
        output = function(*inputs)
        # Drawn in float32, so that every dtype gets the same gradient.
        gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        output.backward(gradient.to(output.dtype))
        return [output.detach(), *(x.grad for x in (*inputs, *module.parameters()))]

    return compute

"""The objective compiles into one graph that equals the plain code and serves all masks and windows."""

import copy
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modeling_sslam import SSLAMForPreTraining
from modeling_sslam.modeling_sslam_pretraining import Draws, mean_deviations


@pytest.fixture(autouse=True)
def _new_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def make_model(make_config):
    def make(objective: str, memory: str = "auto") -> SSLAMForPreTraining:
        torch.manual_seed(0)
        model = SSLAMForPreTraining(make_config(pretraining_objective=objective, num_hidden_layers=1)).train()
        model.set_memory(memory)
        return model

    return make


def step(model: SSLAMForPreTraining, seed: int, precision: torch.dtype) -> dict[str, torch.Tensor]:
    """Return the scalars and the gradients of a step whose batch, masks, windows and noise follow from the seed."""
    torch.manual_seed(seed)
    clips = torch.randn(3, 64, 32)
    model.zero_grad()
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        output = model(clips, generator=torch.Generator().manual_seed(seed))
    output.loss.backward()
    gradients = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return {name: value.detach() for name, value in output.items()} | gradients


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference, as a share of what is expected."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "memory", "precision"),
    [
        ("ua", "fast", torch.float32),
        ("pma", "fast", torch.bfloat16),
        ("ua+pma", "small", torch.float32),
        ("sslam", "small", torch.bfloat16),
        ("sslam", "fast", torch.float32),
        ("sslam", "fast", torch.bfloat16),
    ],
)
def test_one_graph_serves_all_batches(objective, memory, precision, make_model):
    """The backend runs torch's own operators, so a graph's rounding is that of the plain code."""
    model, counter = make_model(objective, memory), CompileCounterWithBackend("aot_eager")
    expected = [step(model, seed, precision) for seed in range(3)]
    model.compile(fullgraph=True, dynamic=False, backend=counter)
    for seed, values in enumerate(expected):
        found = step(model, seed, precision)
        assert found.keys() == values.keys()
        for name, value in values.items():
            assert distance(found[name], value) <= 10 * torch.finfo(precision).eps, name
        model.update_teacher(1.0)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_inductor_compiles_the_objective(make_model):
    """On a CPU the mode of CUDA graphs runs the same kernels without graphs."""
    model = make_model("sslam", "fast")
    model.config.mask_noise_std = 0.0  # inductor draws other noise
    expected = step(model, 0, torch.float32)
    model.compile(fullgraph=True, dynamic=False, mode="reduce-overhead")
    torch.compiler.cudagraph_mark_step_begin()
    found = step(model, 0, torch.float32)
    for name, value in expected.items():
        assert distance(found[name], value) <= 1e-5, name


def test_copies_and_pickles_are_not_compiled(make_model):
    model, counter = make_model("ua"), CompileCounterWithBackend("eager")
    model.compile(backend=counter)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        step(twin, 0, torch.float32)
    assert counter.frame_count == 0
    step(model, 0, torch.float32)
    assert counter.frame_count == 1


@pytest.mark.parametrize("objective", ["ua", "sslam"])
def test_shapes_of_draws_do_not_depend_on_their_values(objective, make_model):
    model = make_model(objective)
    shapes = set()
    for seed in range(20):
        draws = model._draw(3, 8, None, None, torch.Generator().manual_seed(seed)).to(torch.device("cpu"))
        assert isinstance(draws, Draws)
        shapes.add(tuple(None if tensor is None else tensor.shape for tensor in draws))
    assert len(shapes) == 1


class Elsewhere(TorchDispatchMode):
    """Collect the operators whose results lie on another device than "meta"."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        if devices - {"meta"}:
            self.operators.append(str(func))
        return result


@pytest.mark.parametrize("objective", ["ua", "sslam"])
def test_the_objective_makes_no_tensor_on_another_device(objective, make_model):
    """A tensor on the CPU would make a GPU wait and forbid CUDA graphs. A device without values shows it here."""
    meta = torch.device("meta")
    model = make_model(objective).to(meta)
    draws = model._draw(3, 4, None, None, None).to(meta)
    with Elsewhere() as elsewhere:
        terms, moments, _ = model._objective(torch.randn(3, 64, 32, device=meta), draws)
        terms["loss"].backward()
        mean_deviations(*moments)
        model.update_teacher(0.5)
    assert elsewhere.operators == []

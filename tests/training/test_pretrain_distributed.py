"""Pre-training in several processes (accelerate's launcher, gloo) gives the results of a single process."""

import importlib.util
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_sslam import SSLAMForPreTraining
from modeling_sslam.modeling_sslam_pretraining import inverse_block_masks
from training.run.checkpointing import list_checkpoints
from training.run.metrics_log import read_metrics
from training.soundscapes.__main__ import make_row

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "scripts" / "distributed_update.py"


@pytest.fixture
def script():
    """The program that the processes run, as a module."""
    spec = importlib.util.spec_from_file_location("distributed_update", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def expected(script):
    """The published gradient of 2 batches: the gradient of the summed losses over the number of masked tokens."""
    model, generator = script.make_model(), script.mask_generator(0)
    outputs = [model(script.micro_batch(i), generator=generator) for i in range(2)]
    summed = sum(output.loss * output.num_masked_tokens for output in outputs)
    (summed / sum(output.num_masked_tokens for output in outputs)).backward()
    return {
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "losses": torch.stack([output.loss.detach() for output in outputs]),
    }


def assert_all_close(found, wanted, **tolerances) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            found[name], wanted[name], msg=lambda text, name=name: f"{name}: {text}", **tolerances
        )


def test_processes_accumulation_and_sharding_give_the_published_gradient(launch, script, expected, tmp_path):
    launch(SCRIPT, tmp_path)
    results = {kind: torch.load(tmp_path / f"{kind}.pt", weights_only=True) for kind in ("ddp", "fsdp")}
    (tmp_path / "one").mkdir()
    script.update(tmp_path / "one", "ddp", num_micro_batches=2)
    results["one"] = torch.load(tmp_path / "one" / "ddp.pt", weights_only=True)

    scale = max(gradient.abs().max() for gradient in expected["gradients"].values()).item()
    for result in results.values():
        torch.testing.assert_close(result["losses"].flatten(), expected["losses"])
        assert_all_close(result["gradients"], expected["gradients"], rtol=1e-4, atol=1e-6 * scale)
        # AdamW's moments survive a checkpoint.
        assert_all_close(result["loaded_moments"], result["moments"], rtol=0, atol=0)
    assert_all_close(results["fsdp"]["weights"], results["ddp"]["weights"], rtol=1e-4, atol=1e-6)
    # The deviation is computed over all processes, so it is the same in each.
    for kind in ("ddp", "fsdp"):
        assert len(set(results[kind]["pred_var"].tolist())) == 1


@pytest.mark.parametrize("kind", ["objective", "blocks"])
def test_compiled_processes_accumulate_the_published_gradient(kind, launch, script, tmp_path):
    """Two processes with two passes each give the gradient of one process with four, which is not compiled."""
    launch(SCRIPT, tmp_path, 2, kind)
    found = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
    script.update(tmp_path, "ddp", num_micro_batches=4)
    expected = torch.load(tmp_path / "ddp.pt", weights_only=True)
    scale = max(gradient.abs().max() for gradient in expected["gradients"].values()).item()
    assert_all_close(found["gradients"], expected["gradients"], rtol=1e-4, atol=1e-6 * scale)
    torch.testing.assert_close(found["losses"].flatten(), expected["losses"].flatten())


def test_a_larger_batch_needs_a_smaller_weight_of_the_global_loss(make_config):
    """Two devices with two clips each equal one device with four only if the global loss has half the weight."""
    model = SSLAMForPreTraining(make_config(pretraining_objective="ua", mask_noise_std=0.0)).train()
    clips, masks = torch.randn(4, 64, 32), inverse_block_masks(4, 4, model.config)
    (sum(model(clips[part], bool_masked_pos=masks[part]).loss for part in (slice(2), slice(2, 4))) / 2).backward()
    expected = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    model.zero_grad()

    def matches() -> bool:
        model.zero_grad()
        model(clips, bool_masked_pos=masks).loss.backward()
        found = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        return all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in zip(found, expected, strict=True))

    assert not matches()
    model.config.global_loss_weight = 0.5
    assert matches()


def test_two_processes_train_resume_and_share_the_clips(launch, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    for i in range(16):
        row = make_row(("train", i), seed=0, duration=0.8, rate=16_000, max_sources=2)
        (clips / f"clip{i:02d}.flac").write_bytes(row["audio"]["bytes"])
    model = (
        "hidden_size=32 num_hidden_layers=2 num_attention_heads=4 intermediate_size=64 num_mel_bins=32 max_length=64"
    )
    arguments = [
        *(
            "-m",
            "training.pretrain",
            "--data.source",
            clips,
            "--data.num_workers=0",
            "--batch_size=2",
            "--watch.every=2",
        ),
        *("--optimizer.warmup_updates=2", "--watch.tracker=none", "--resume=auto", "--checkpoint.every=2"),
        *(f"--model.{setting}" for setting in [*model.split(), "num_clones=2", "decoder_num_layers=2"]),
    ]
    launch(*arguments, "--output_dir", tmp_path / "straight", "--max_updates=4")
    last = list_checkpoints(tmp_path / "straight")[-1]
    ranks = [torch.load(last / f"rank-0000{i}.pt", weights_only=True) for i in range(2)]
    assert ranks[0]["clips_digest"] != ranks[1]["clips_digest"]
    assert not torch.equal(ranks[0]["generators"]["masks"], ranks[1]["generators"]["masks"])
    assert not torch.equal(ranks[0]["rng"]["torch"], ranks[1]["rng"]["torch"])
    assert read_metrics(tmp_path / "straight" / "metrics.jsonl")[-1]["clips"] == 16

    # As if the processes had been killed after update 2.
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(list_checkpoints(tmp_path / "resumed")[-1])
    launch(*arguments, "--output_dir", tmp_path / "resumed", "--max_updates=4")
    again = list_checkpoints(tmp_path / "resumed")[-1]
    assert again.name == last.name == "step-00000004"
    weights, expected = (load_file(path / "model.safetensors") for path in (again, last))
    assert_all_close(weights, expected, rtol=0, atol=0)
    for i, rank in enumerate(ranks):
        assert torch.load(again / f"rank-0000{i}.pt", weights_only=True)["clips_digest"] == rank["clips_digest"]

"""Sources that cannot be converted are refused in one line that names the fault. They leave nothing behind."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMModel
from modeling_sslam.common.files import temporary_path

pytestmark = pytest.mark.slow

IMAGE = "modality_encoders.IMAGE."


@pytest.mark.parametrize(
    ("tensors", "options", "named"),
    [
        ({"blocks.1.extra.weight": torch.zeros(2)}, (), "blocks.1.extra.weight"),
        ({"recon_proj.weight": torch.zeros(2)}, (), "recon_proj.weight"),
        ({"blocks.1.norm1.bias": None}, (), "lacks blocks.1.norm1.bias"),
        ({f"{IMAGE}extra_tokens": None}, (), f"lacks {IMAGE}extra_tokens"),
        ({"_ema.blocks.2.mlp.fc1.bias": None}, ("--head", "pretraining"), "lacks _ema.blocks.2.mlp.fc1.bias"),
        ({"_ema.blocks.2.mlp.fc1.bias": None}, ("--weights", "teacher"), "lacks _ema.blocks.2.mlp.fc1.bias"),
        ({f"_ema.{IMAGE}local_encoder.proj.weight": None}, ("--weights", "teacher"), "have no patch projection"),
        ({f"{IMAGE}decoder.proj.bias": None}, ("--head", "pretraining"), f"lacks {IMAGE}decoder.proj.bias"),
        ({"blocks.1.mlp.fc1.weight": torch.zeros(128, 31)}, (), "blocks.1.mlp.fc1.weight has shape (128, 31)"),
        ({f"{IMAGE}extra_tokens": torch.zeros(1, 2, 32)}, (), f"{IMAGE}extra_tokens has shape (1, 2, 32)"),
        ({f"{IMAGE}local_encoder.proj.weight": torch.zeros(32, 3, 16, 16)}, (), "has shape (32, 3, 16, 16)"),
        ({f"{IMAGE}local_encoder.proj.weight": torch.zeros(32, 256)}, (), "has shape (32, 256)"),
        ({"blocks.0.attn.qkv.weight": torch.zeros(96, 32, dtype=torch.int8)}, (), "holds torch.int8"),
        ({"blocks.0.norm1.weight": torch.full((32,), torch.nan)}, (), "blocks.0.norm1.weight holds NaN"),
        (
            {f"{IMAGE}fixed_positional_encoder.positions": torch.zeros(1, 6144, 32)},
            (),
            "position_embeddings differs from the fixed sines and cosines",
        ),
        (
            {f"{IMAGE}fixed_positional_encoder.positions": torch.full((1, 6144, 32), torch.nan)},
            (),
            "position_embeddings differs from the fixed sines and cosines of SSLAM by up to nan",
        ),
        ({f"{IMAGE}fixed_positional_encoder.positions": torch.zeros(1, 6143, 32)}, (), "has shape (1, 6143, 32)"),
        ({"module.blocks.0.norm1.weight": torch.zeros(32)}, (), "holds tensors twice: blocks.0.norm1.weight"),
    ],
)
def test_weights_that_do_not_fit_are_named(tensors, options, named, pretrained, save, run, tmp_path):
    source = save(pretrained, tensors)
    outcome = run(source, tmp_path / "out", *options)
    assert outcome.code == 1
    assert named in outcome.error
    assert outcome.error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "settings",
    [
        {"model.num_heads": "many"},
        {"model.num_heads": [4]},
        {"model.modalities.image.target_length": 1000},
        {"model.modalities.image.target_length": {"a": 1}},
        {"model.ema_decay": 7.0},
    ],
)
def test_invalid_settings_are_refused(settings, pretrained, save, run, tmp_path):
    outcome = run(save(pretrained, settings=settings), tmp_path / "out")
    assert outcome.code == 1
    assert outcome.error.startswith("error: The checkpoint's settings describe no valid model.")
    assert outcome.error.count("\n") == 1


def test_circular_references_in_settings_are_refused(pretrained, save, run, tmp_path):
    circle = {"model.norm_eps": "${model.num_heads}", "model.num_heads": "${model.norm_eps}"}
    outcome = run(save(pretrained, settings=circle), tmp_path / "out")
    assert outcome.code == 1
    assert "in a circle: model." in outcome.error


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"mel_bins": 0}, "no valid model"),
        ({"img_size": 1024}, "no valid model"),
        ({"num_heads": 5}, "num_attention_heads"),
        ({"stride": 10}, "stride=10"),
        ({"layer_norm_first": True}, "layer_norm_first=True"),
    ],
)
def test_invalid_hub_settings_are_refused(changes, named, golden_dir, run, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(golden_dir / "hub_pretrained", source)
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | changes))
    outcome = run(source, tmp_path / "out")
    assert outcome.code == 1
    assert named in outcome.error


def test_missing_block_is_named(pretrained, save, run, tmp_path):
    block = {name: None for name in pretrained.tensors if name.startswith("blocks.1.")}
    outcome = run(save(pretrained, block), tmp_path / "out")
    assert outcome.code == 1
    assert "blocks.1.attn.proj.bias" in outcome.error
    assert "and 4 more" in outcome.error


def vision_transformer() -> dict[str, torch.Tensor]:
    names = ["norm1.weight", "attn.qkv.weight", "attn.proj.weight", "norm2.weight", "mlp.fc1.weight", "mlp.fc2.weight"]
    state = {f"blocks.{i}.{name}": torch.zeros(4, 4) for i in range(3) for name in names}
    return state | {
        "cls_token": torch.zeros(1, 1, 4),
        "pos_embed": torch.zeros(1, 5, 4),
        "head.weight": torch.zeros(2, 4),
    }


OTHER_MODELS = {
    "vision transformer": (vision_transformer, "cls_token, pos_embed"),
    "residual network": (
        lambda: {"conv1.weight": torch.zeros(2, 3, 7, 7), "layer1.0.bn1.weight": torch.zeros(2)},
        "conv1.weight, layer1.0.bn1.weight",
    ),
    "spectrogram transformer": (
        lambda: {"audio_spectrogram_transformer.embeddings.cls_token": torch.zeros(1, 1, 4)},
        "audio_spectrogram_transformer.embeddings.cls_token",
    ),
    "numbered layers": (lambda: nn.Sequential(nn.Linear(2, 2)).state_dict(), "0.weight, 0.bias"),
    "nothing": (dict, "0 of its 0 tensors"),
}


@pytest.mark.parametrize(("state", "named"), OTHER_MODELS.values(), ids=OTHER_MODELS)
def test_checkpoint_of_another_model_is_refused(state, named, run, tmp_path):
    torch.save(state(), tmp_path / "other.pt")
    outcome = run(tmp_path / "other.pt", tmp_path / "out")
    assert outcome.code == 1
    assert "other.pt is not a checkpoint of SSLAM or EAT" in outcome.error
    assert named in outcome.error
    assert not (tmp_path / "out").exists()


def test_unknown_number_of_heads_is_refused_with_the_remedy(pretrained, run, tmp_path):
    torch.save(pretrained.tensors, tmp_path / "bare.pt")
    outcome = run(tmp_path / "bare.pt", tmp_path / "out")
    assert outcome.code == 1
    assert "pass --num-attention-heads" in outcome.error
    outcome = run(tmp_path / "bare.pt", tmp_path / "out", "--num-attention-heads", 5)
    assert outcome.code == 1
    assert "num_attention_heads" in outcome.error


def test_missing_source_is_refused(run, tmp_path):
    outcome = run(tmp_path / "nowhere.pt", tmp_path / "out")
    assert outcome.code == 1
    assert "nowhere.pt does not exist" in outcome.error
    outcome = run(tmp_path / "nowhere.pt", tmp_path / "out", "--revision", "main")
    assert outcome.code == 1
    assert "--revision needs a repository on the Hub" in outcome.error


def test_error_is_one_line_and_exit_status_1(tmp_path):
    (tmp_path / "file.pt").write_text("nothing")
    result = subprocess.run(
        [sys.executable, "-m", "conversion", tmp_path / "file.pt", tmp_path / "out"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


# Replacing an earlier result


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_existing_result_is_replaced_only_on_request(golden_dir, run, tmp_path):
    out = tmp_path / "out"
    assert run(golden_dir / "sslam_pretrained.pt", out).code == 0
    before = snapshot(out)
    outcome = run(golden_dir / "sslam_finetuned.pt", out)
    assert outcome.code == 1
    assert "--overwrite" in outcome.error
    assert snapshot(out) == before
    assert run(golden_dir / "sslam_finetuned.pt", out, "--overwrite").code == 0
    assert SSLAMConfig.from_pretrained(out).architectures == ["SSLAMForAudioClassification"]
    assert list(tmp_path.iterdir()) == [out]


def test_existing_file_is_replaced_only_on_request(golden_dir, run, tmp_path):
    out = tmp_path / "out.pt"
    out.write_text("mine")
    assert run(golden_dir / "sslam_finetuned.pt", out, "--to", "fairseq").code == 1
    assert out.read_text() == "mine"
    assert run(golden_dir / "sslam_finetuned.pt", out, "--to", "fairseq", "--overwrite").code == 0
    assert run(out, tmp_path / "back").code == 0


def test_result_may_replace_its_source(golden_dir, run, tmp_path):
    shutil.copy(golden_dir / "sslam_finetuned.pt", tmp_path / "same.pt")
    assert run(tmp_path / "same.pt", tmp_path / "same.pt", "--to", "fairseq", "--overwrite").code == 0
    assert run(tmp_path / "same.pt", tmp_path / "back").code == 0


def test_empty_folder_is_filled(golden_dir, run, tmp_path):
    (tmp_path / "out").mkdir()
    assert run(golden_dir / "hub_pretrained", tmp_path / "out").code == 0


def test_folder_without_a_model_is_never_replaced(golden_dir, run, tmp_path):
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    outcome = run(golden_dir / "hub_pretrained", out, "--overwrite")
    assert outcome.code == 1
    assert "a folder without a model" in outcome.error
    assert snapshot(out) == {"thesis.txt": b"precious"}


def break_with(error: Exception):
    def broken(*_, **__):
        raise error

    return broken


@pytest.mark.parametrize("when", ["writing", "reading back"])
def test_failure_keeps_the_earlier_result(when, golden_dir, run, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(golden_dir / "sslam_pretrained.pt", out).code == 0
    before = snapshot(tmp_path)
    if when == "writing":
        monkeypatch.setattr(
            SSLAMFeatureExtractor, "save_pretrained", break_with(OSError(28, "No space left on device"))
        )
    else:
        monkeypatch.setattr(SSLAMModel, "from_pretrained", break_with(OSError(5, "Input/output error")))
    assert run(golden_dir / "hub_pretrained", out, "--overwrite").code == 1
    assert snapshot(tmp_path) == before
    assert run(golden_dir / "hub_pretrained", tmp_path / "new").code == 1
    assert snapshot(tmp_path) == before


def test_result_that_differs_when_read_back_is_not_kept(golden_dir, run, tmp_path, monkeypatch):
    save = SSLAMModel.save_pretrained

    def save_wrong(self: SSLAMModel, folder: Path, **kwargs) -> None:
        with torch.no_grad():
            self.encoder.layers[0].mlp.fc1.bias[0] += 1
        save(self, folder, **kwargs)
        with torch.no_grad():
            self.encoder.layers[0].mlp.fc1.bias[0] -= 1

    monkeypatch.setattr(SSLAMModel, "save_pretrained", save_wrong)
    outcome = run(golden_dir / "sslam_pretrained.pt", tmp_path / "out")
    assert outcome.code == 1
    assert outcome.error == ("error: out, read back, differs from what was written: encoder.layers.0.mlp.fc1.bias.\n")
    assert list(tmp_path.iterdir()) == []


def test_errors_name_the_result_and_not_the_hidden_path(golden_dir, run, tmp_path, monkeypatch):
    def write_damaged(folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"damaged")

    monkeypatch.setattr(SSLAMModel, "save_pretrained", lambda self, folder: write_damaged(folder))
    outcome = run(golden_dir / "sslam_pretrained.pt", tmp_path / "out")
    assert outcome.error.startswith(f"error: {tmp_path / 'out' / 'model.safetensors'} ")
    monkeypatch.setattr(SSLAMModel, "save_pretrained", lambda self, folder: (folder / "missing" / "x").touch())
    outcome = run(golden_dir / "sslam_pretrained.pt", tmp_path / "out")
    assert str(tmp_path / "out" / "missing" / "x") in outcome.error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["transformers", "fairseq", "hub-eat", "onnx"])
def test_results_do_not_hold_the_name_of_the_hidden_path(to, golden_dir, run, tmp_path):
    lines = run(golden_dir / "sslam_finetuned.pt", tmp_path / "result", "--to", to).lines
    assert "sslam-tmp" not in "".join(lines)
    content = snapshot(tmp_path)
    assert content
    assert not any(b"sslam-tmp-result" in name.encode() + data for name, data in content.items())


KILLED = """
import os, signal, sys
from conversion.__main__ import main
from modeling_sslam import SSLAMFeatureExtractor
SSLAMFeatureExtractor.save_pretrained = lambda self, folder: os.kill(os.getpid(), signal.SIGKILL)
main(sys.argv[1:])
"""


def test_killed_conversion_is_cleaned_up_by_the_next(golden_dir, run, tmp_path):
    out = tmp_path / "out"
    assert run(golden_dir / "sslam_pretrained.pt", out).code == 0
    before = snapshot(out)
    arguments = [golden_dir / "sslam_finetuned.pt", out, "--overwrite"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], cwd=Path(__file__).parents[2])
    assert killed.returncode == -signal.SIGKILL
    assert snapshot(out) == before
    hidden = temporary_path(out)
    (hidden / "left behind").touch()
    assert run(*arguments).code == 0
    assert SSLAMConfig.from_pretrained(out).architectures == ["SSLAMForAudioClassification"]
    assert "left behind" not in snapshot(out)
    assert list(tmp_path.iterdir()) == [out]

"""No class loads an encoder with missing weights."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling_sslam import SSLAMConfig, SSLAMForAudioClassification, SSLAMForPreTraining, SSLAMModel

CLASSES = (SSLAMModel, SSLAMForAudioClassification, SSLAMForPreTraining)


@pytest.fixture
def saved(tiny_config, tmp_path):
    """Save a classifier in our own layout and return the folder."""
    SSLAMForAudioClassification(tiny_config).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def replace_weights(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


@pytest.mark.parametrize("cls", CLASSES)
def test_one_missing_weight(cls, saved):
    replace_weights(saved, lambda weights: {k: v for k, v in weights.items() if not k.endswith("1.mlp.fc1.weight")})
    with pytest.raises(
        ValueError, match=r"lacks 1 weights of the encoder: (sslam\.)?encoder\.layers\.1\.mlp\.fc1\.weight"
    ):
        cls.from_pretrained(saved)


@pytest.mark.parametrize("cls", CLASSES)
def test_weights_of_other_names(cls, saved):
    replace_weights(saved, lambda weights: {f"student.{key}": value for key, value in weights.items()})
    with pytest.raises(ValueError, match=r"It holds student\.classifier\.dense\.bias.* `sslam convert .*saved OUT`"):
        cls.from_pretrained(saved)


@pytest.mark.parametrize("cls", CLASSES)
def test_published_weights_without_a_block(cls, golden_dir, tmp_path):
    shutil.copytree(golden_dir / "hub_finetuned", tmp_path / "cut")
    replace_weights(tmp_path / "cut", lambda w: {k: v for k, v in w.items() if not k.startswith("model.blocks.2.")})
    with pytest.raises(ValueError, match=r"lacks 12 weights of the encoder: (sslam\.)?encoder\.layers\.2\."):
        cls.from_pretrained(tmp_path / "cut")


@pytest.mark.parametrize("cls", CLASSES)
def test_a_state_dict(cls, tiny_config):
    with pytest.raises(ValueError, match=r"The state_dict lacks .* It holds weight, which this model does not have"):
        cls.from_pretrained(None, config=tiny_config, state_dict={"weight": torch.zeros(1)})


def test_a_configuration_of_more_layers(saved, make_config):
    with pytest.raises(ValueError, match=r"lacks 12 weights of the encoder: encoder\.layers\.3\."):
        SSLAMModel.from_pretrained(saved, config=make_config(num_hidden_layers=4))


def test_a_new_head_is_a_warning(tiny_config, tmp_path):
    SSLAMModel(tiny_config).save_pretrained(tmp_path)
    _, info = SSLAMForAudioClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert all(key.startswith("classifier.") for key in info["missing_keys"])


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("name", ["sslam_pretrained.pt", "sslam_finetuned.pt"])
def test_a_fairseq_file(cls, golden_dir, name):
    with pytest.raises(OSError, match=rf"`sslam convert .*{name} OUT`"):
        cls.from_pretrained(golden_dir / name)
    with pytest.raises(OSError, match=rf"`sslam convert .*{name} OUT`"):
        cls.from_pretrained(golden_dir / name, config=SSLAMConfig())


def test_a_folder_with_a_fairseq_file(golden_dir, tmp_path):
    shutil.copy(golden_dir / "sslam_pretrained.pt", tmp_path)
    with pytest.raises(OSError, match=r"`sslam convert .* OUT`"):
        SSLAMModel.from_pretrained(tmp_path)


def test_a_folder_of_the_earth_species_project(golden_dir, tmp_path):
    weights = load_file(golden_dir / "hub_pretrained" / "model.safetensors")
    save_file({f"backbone.{key}": value for key, value in weights.items()}, tmp_path / "esp-aves2-sl-eat.safetensors")
    with pytest.raises(OSError, match=r"`sslam convert .* OUT`.*Earth Species Project"):
        SSLAMModel.from_pretrained(tmp_path)
    # The same holds with a config.json and under the usual name.
    shutil.copy(golden_dir / "hub_pretrained" / "config.json", tmp_path)
    (tmp_path / "esp-aves2-sl-eat.safetensors").rename(tmp_path / "model.safetensors")
    replace_weights(tmp_path, lambda weights: weights)
    with pytest.raises(ValueError, match=r"It holds backbone\.model\."):
        SSLAMModel.from_pretrained(tmp_path)


def test_default_configuration_of_an_empty_config_json(golden_dir, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32, "num_hidden_layers": 3}))
    shutil.copy(golden_dir / "hub_pretrained" / "model.safetensors", tmp_path)
    with pytest.raises((ValueError, RuntimeError)):
        SSLAMModel.from_pretrained(tmp_path)

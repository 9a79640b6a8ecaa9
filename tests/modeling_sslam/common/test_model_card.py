"""The model card's metadata and table hold exactly what was passed."""

import pytest
import torch
from huggingface_hub import ModelCard

import modeling_sslam
from modeling_sslam.common.model_card import USAGES, render_card


def card(**changes) -> ModelCard:
    arguments = {
        "title": "A model",
        "summary": "It hears.",
        "facts": {"Clips": 3},
        "model_class": "SSLAMModel",
        "sampling_rate": 16_000,
        "sections": {"Notes": "- None."},
    }
    return ModelCard(render_card(**(arguments | changes)))


def test_metadata_of_the_hub():
    data = card(tags=["eat"], license_name="mit").data
    assert data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "feature-extraction",
        "license": "mit",
        "tags": ["audio", "sslam", "eat"],
    }
    assert "license" not in card().data.to_dict()


def test_parts_stand_in_order():
    text = card().text
    places = [
        text.index(part) for part in ("# A model", "It hears.", "| Clips | 3 |", "## Use", "## Notes\n\n- None.")
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("value", ["one\ntwo", "one\r\ntwo", "one|two", "| a |\n|---|"])
def test_a_fact_stays_in_its_cell(value):
    (row,) = [line for line in card(facts={"Key": value}).text.splitlines() if "Key" in line]
    assert row.replace(r"\|", "").count("|") == 3


@pytest.mark.parametrize("model_class", USAGES)
def test_usage_example_runs_as_printed(model_class, tmp_path, make_config):
    folder = tmp_path / "model"
    getattr(modeling_sslam, model_class)(make_config(num_mel_bins=32)).save_pretrained(folder)
    modeling_sslam.SSLAMFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(folder)
    text = card(model_class=model_class).text
    code = text.partition("```python\n")[2].partition("```")[0].replace("PATH_OR_NAME", repr(str(folder)))
    names = {"waveform": list(torch.randn(2, 16_000).numpy() / 10)}
    exec(code, names)
    assert type(names["model"]).__name__ == model_class
    assert {"outputs", "logits", "loss"} & names.keys()

"""The published repositories by their ids, from a stand-in of the Hub, with every other connection refused."""

import json

import pytest
import torch
from safetensors.torch import load_file

from modeling_sslam import SSLAMForAudioClassification
from modeling_sslam.common.labels import audioset_labels

SSLAM, SSLAM_AS2M = "ta012/SSLAM_pretrain", "ta012/SSLAM_AS2M_Finetuned"
EAT, EAT_AS2M = "worstchan/EAT-base_epoch30_pretrain", "worstchan/EAT-base_epoch30_finetune_AS2M"


@pytest.mark.slow
def test_python(run, tmp_path, golden_dir, as2m, audio_dir):
    script = f"""
import json
import modeling_sslam
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, AutoModelForPreTraining, pipeline
)
from modeling_sslam import *

out = {str(tmp_path)!r}
states = load_file({str(golden_dir / "encoder.safetensors")!r})["input_512"].float()
facts, tensors = {{}}, {{}}
for name in {[SSLAM, EAT]}:
    for cls in (SSLAMModel, AutoModel):
        with torch.no_grad():
            tensors[f"{{name}} {{cls.__name__}}"] = cls.from_pretrained(name)(states).last_hidden_state
for name in {[SSLAM_AS2M, EAT_AS2M]}:
    for cls in (SSLAMForAudioClassification, AutoModelForAudioClassification):
        with torch.no_grad():
            tensors[f"{{name}} {{cls.__name__}}"] = cls.from_pretrained(name)(states).logits
    wave, rate = soundfile.read({str(sorted(audio_dir.glob("*.flac"))[0])!r}, dtype="float32", always_2d=True)
    facts[f"pipeline {{name}}"] = pipeline("audio-classification", name)(wave.mean(1))
for name in {[SSLAM, EAT, SSLAM_AS2M, EAT_AS2M]}:
    for cls in (SSLAMConfig, AutoConfig):
        facts[f"{{cls.__name__}} {{name}}"] = cls.from_pretrained(name).to_dict() | {{"_name_or_path": name}}
    for cls in (SSLAMFeatureExtractor, AutoFeatureExtractor):
        facts[f"{{cls.__name__}} {{name}}"] = cls.from_pretrained(name).to_dict()
assert type(AutoModelForPreTraining.from_pretrained({SSLAM!r})).__name__ == "SSLAMForPreTraining"
try:
    SSLAMModel.from_pretrained("them/fairseq")
except OSError as error:
    facts["fairseq"] = str(error)
json.dump(facts, open(out + "/facts.json", "w"))
save_file(tensors, out + "/outputs.safetensors")
"""
    run(script)
    outputs = load_file(tmp_path / "outputs.safetensors")
    facts = json.loads((tmp_path / "facts.json").read_text())
    assert len(outputs) == 8

    golden = load_file(golden_dir / "encoder.safetensors")
    expected = SSLAMForAudioClassification.from_pretrained(golden_dir / "hub_finetuned")
    with torch.no_grad():
        pooled = expected.classifier.layernorm(expected.sslam(golden["input_512"].float()).last_hidden_state[:, 0])
    logits = torch.nn.functional.linear(pooled, as2m["model.head.weight"], as2m["model.head.bias"])
    for name, output in outputs.items():
        reference = golden["last_hidden_state_512"] if "pretrain" in name else logits
        torch.testing.assert_close(output, reference, atol=1e-5, rtol=1e-5)

    labels = audioset_labels()
    for name in (SSLAM_AS2M, EAT_AS2M):
        assert {score["label"] for score in facts[f"pipeline {name}"]} <= set(labels)
        assert facts[f"AutoConfig {name}"]["id2label"] == {str(index): label for index, label in enumerate(labels)}
    for name in (SSLAM, EAT, SSLAM_AS2M, EAT_AS2M):
        for kind in ("Config", "FeatureExtractor"):
            assert facts[f"SSLAM{kind} {name}"] == facts[f"Auto{kind} {name}"]
        extractor = facts[f"AutoFeatureExtractor {name}"]
        assert (extractor["mean"], extractor["std"], extractor["max_length"]) == (-4.268, 4.569, 1024)
    assert "`sslam convert them/fairseq OUT`" in facts["fairseq"]


@pytest.mark.slow
def test_commands(sslam, tmp_path, audio_dir):
    sound = sorted(audio_dir.glob("*.flac"))[0]
    tagged = json.loads(sslam("tag", sound, "--model", SSLAM_AS2M, "--format", "json", "--top-k", 3))
    assert {entry["label"] for entry in tagged[0]["labels"]} <= set(audioset_labels())
    sslam("timeline", sound, "--model", EAT_AS2M, "--out", tmp_path / "events.csv")
    assert (tmp_path / "events.csv").is_file()
    error = sslam("tag", sound, "--model", SSLAM, status=1)
    assert "has no weights for classifier" in error
    assert error.count("\n") == 1

    sslam("convert", SSLAM_AS2M, tmp_path / "converted", "--quiet")
    again = json.loads(sslam("tag", sound, "--model", tmp_path / "converted", "--format", "json", "--top-k", 3))
    assert again == tagged

    aves = "EarthSpeciesProject/esp-aves2-sl-eat-all-ssl-all"
    report = sslam("convert", aves, tmp_path / "aves", "--num-attention-heads", 4)
    assert "note: Inputs are normalised as avex does" in report
    extractor = json.loads((tmp_path / "aves" / "preprocessor_config.json").read_text())
    assert (extractor["mean"], extractor["std"], extractor["max_length"]) == (-5.553, 4.606, 1024)
    config = json.loads((tmp_path / "aves" / "config.json").read_text())
    assert config["id2label"] == {str(index): f"species {index}" for index in range(5)}
    sslam("tag", sound, "--model", tmp_path / "aves")
    error = sslam("tag", sound, "--model", aves, status=1)
    assert f"sslam convert {aves} OUT" in error

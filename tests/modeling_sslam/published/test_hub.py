"""The published repositories by their ids, from a stand-in of the Hub, with every other connection refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from modeling_sslam import SSLAMForAudioClassification
from modeling_sslam.common.labels import audioset_labels

SSLAM, SSLAM_AS2M = "ta012/SSLAM_pretrain", "ta012/SSLAM_AS2M_Finetuned"
EAT, EAT_AS2M = "worstchan/EAT-base_epoch30_pretrain", "worstchan/EAT-base_epoch30_finetune_AS2M"
AUTO_MAP = {"AutoConfig": "configuration_eat.EATConfig", "AutoModel": "modeling_eat.EATModel"}
# Code that must not run.
STRANGER = b"import os, pathlib\npathlib.Path(os.environ['MARKER']).touch()\n"

# Only the stand-in can be reached, and timm is not there.
ISOLATED = """
import socket, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("timm", "fairseq", "omegaconf"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NotInstalled())
connect = socket.socket.connect

def only_here(self, address):
    if address[0] != "127.0.0.1":
        raise OSError(f"the network is off, but {address} was asked for")
    return connect(self, address)

socket.socket.connect = only_here
"""


@pytest.fixture(scope="module")
def as2m(golden_dir) -> dict[str, torch.Tensor]:
    """Return the weights of a classifier with AudioSet's 527 classes."""
    generator = torch.Generator().manual_seed(0)
    head = {"weight": torch.randn(527, 32, generator=generator), "bias": torch.randn(527, generator=generator)}
    tensors = load_file(golden_dir / "hub_finetuned" / "model.safetensors")
    return tensors | {f"model.head.{name}": value for name, value in head.items()}


@pytest.fixture(scope="module")
def hub(golden_dir, serve_hub, as2m):
    def config(folder: str, **settings) -> bytes:
        content = json.loads((golden_dir / folder / "config.json").read_text())
        return json.dumps(content | {"auto_map": AUTO_MAP} | settings).encode()

    code = {f"{name}.py": STRANGER for name in ("configuration_eat", "modeling_eat", "model_core")}
    card = {"README.md": b"---\nlicense: mit\n---\n"}
    encoder = code | card | {"config.json": config("hub_pretrained", num_classes=527)}
    encoder["model.safetensors"] = (golden_dir / "hub_pretrained" / "model.safetensors").read_bytes()
    classifier = code | card | {"config.json": config("hub_finetuned", num_classes=527)}
    classifier["model.safetensors"] = save(as2m, {"format": "pt"})
    fairseq = (golden_dir / "sslam_pretrained.pt").read_bytes()

    backbone = {
        f"backbone.{name}": value for name, value in as2m.items() if not name.startswith(("model.fc_", "model.h"))
    }
    supervised = backbone | {
        f"classifier.{name}": as2m[f"model.head.{name}"][:5].clone() for name in ("weight", "bias")
    }
    species = {f"species {index}": index for index in reversed(range(5))}
    repositories = {
        SSLAM: encoder,
        EAT: encoder,
        SSLAM_AS2M: classifier,
        EAT_AS2M: classifier,
        "them/fairseq": {"SSLAM_Pretrained.pt": fairseq},
        "EarthSpeciesProject/esp-aves2-sl-eat-all-ssl-all": card
        | {
            "esp-aves2-sl-eat-all-ssl-all.safetensors": save(supervised),
            "label_map.json": json.dumps(species).encode(),
        },
    }
    with serve_hub(repositories) as hub:
        yield hub


@pytest.fixture
def run(hub, hub_environment, tmp_path):
    """Return a function that runs Python against the stand-in, and returns what it prints."""
    environment = hub_environment(hub, tmp_path / "home") | {
        "MARKER": str(tmp_path / "a stranger's code ran"),
        "TRANSFORMERS_VERBOSITY": "error",
    }

    def run(*arguments: object, status: int = 0) -> str:
        hub.requests.clear()
        result = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=Path(__file__).parents[3],
            env=environment,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert result.returncode == status, result.stderr
        assert not (tmp_path / "a stranger's code ran").exists()
        assert not [request for request in hub.requests if request.endswith(".py") and request.startswith("GET")]
        return result.stdout if status == 0 else result.stderr

    return run


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
    run("-c", ISOLATED + script)
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
def test_commands(run, tmp_path, audio_dir):
    sound = sorted(audio_dir.glob("*.flac"))[0]
    sslam = "from modeling_sslam.__main__ import main; import sys; sys.exit(main(sys.argv[1:]))"

    def command(*arguments: object, status: int = 0) -> str:
        return run("-c", ISOLATED + sslam, *arguments, status=status)

    tagged = json.loads(command("tag", sound, "--model", SSLAM_AS2M, "--format", "json", "--top-k", 3))
    assert {entry["label"] for entry in tagged[0]["labels"]} <= set(audioset_labels())
    command("timeline", sound, "--model", EAT_AS2M, "--out", tmp_path / "events.csv")
    assert (tmp_path / "events.csv").is_file()
    error = command("tag", sound, "--model", SSLAM, status=1)
    assert "has no weights for classifier" in error
    assert error.count("\n") == 1

    command("convert", SSLAM_AS2M, tmp_path / "converted", "--quiet")
    again = json.loads(command("tag", sound, "--model", tmp_path / "converted", "--format", "json", "--top-k", 3))
    assert again == tagged

    aves = "EarthSpeciesProject/esp-aves2-sl-eat-all-ssl-all"
    report = command("convert", aves, tmp_path / "aves", "--num-attention-heads", 4)
    assert "note: Inputs are normalised as avex does" in report
    extractor = json.loads((tmp_path / "aves" / "preprocessor_config.json").read_text())
    assert (extractor["mean"], extractor["std"], extractor["max_length"]) == (-5.553, 4.606, 1024)
    config = json.loads((tmp_path / "aves" / "config.json").read_text())
    assert config["id2label"] == {str(index): f"species {index}" for index in range(5)}
    command("tag", sound, "--model", tmp_path / "aves")
    error = command("tag", sound, "--model", aves, status=1)
    assert f"sslam convert {aves} OUT" in error


@pytest.mark.slow
def test_embeddings(run, tmp_path, audio_dir):
    pytest.importorskip("datasets", reason="needs a newer Hub client than transformers 4.57 allows")
    sslam = "from modeling_sslam.__main__ import main; import sys; sys.exit(main(sys.argv[1:]))"
    run("-c", ISOLATED + sslam, "embed", audio_dir, "--model", SSLAM, "--out", tmp_path / "embeddings")
    assert list((tmp_path / "embeddings").rglob("*.parquet"))

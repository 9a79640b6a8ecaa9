"""transformers' Auto classes, with this package and without it, where the code beside the weights is used."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForPreTraining,
)

from modeling_sslam import (
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForPreTraining,
    SSLAMModel,
)

pytestmark = pytest.mark.slow

SOURCES = {
    "configuration_sslam.py",
    "feature_extraction_sslam.py",
    "filter_bank_sslam.py",
    "modeling_sslam.py",
    "transfers_sslam.py",
}

# Simulates a machine without this package and without a network.
ISOLATED = """
import socket, sys

class NotInstalled:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("modeling_sslam", "conversion", "training"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def no_network(*args, **kwargs):
    raise OSError("the network is off")

sys.meta_path.insert(0, NotInstalled())
socket.socket.connect = socket.create_connection = socket.getaddrinfo = no_network
"""


@pytest.fixture
def saved(tmp_path, make_config) -> Path:
    """Folder of a classifier with its feature extractor."""
    folder = tmp_path / "saved"
    config = make_config(
        num_mel_bins=128,
        num_labels=3,
        id2label={0: "crow", 1: "cowbell", 2: "choir"},
        problem_type="multi_label_classification",
    )
    SSLAMForAudioClassification(config).eval().save_pretrained(folder)
    SSLAMFeatureExtractor(max_length=64).save_pretrained(folder)
    return folder


def run_isolated(script: str, folder: Path, tmp_path: Path) -> str:
    """Run a script as if this package were not installed. Its argument is `folder`. Return its output."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Keep paths that put another version of transformers before the installed one; drop the repository's.
    paths = [Path(path).resolve() for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    overlay = [str(path) for path in paths if (path / "transformers").is_dir()]
    environment = {
        **inherited,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "hub"),
        "PYTHONPATH": os.pathsep.join(overlay),
        "TRANSFORMERS_VERBOSITY": "warning",
    }
    result = subprocess.run(
        [sys.executable, "-c", ISOLATED + script, str(folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "not supported" not in result.stderr
    return result.stdout


def test_registered(saved):
    assert type(AutoConfig.from_pretrained(saved)) is SSLAMConfig
    assert type(AutoConfig.for_model("sslam", hidden_size=96)) is SSLAMConfig
    assert type(AutoFeatureExtractor.from_pretrained(saved)) is SSLAMFeatureExtractor
    assert type(AutoModel.from_pretrained(saved)) is SSLAMModel
    assert type(AutoModelForAudioClassification.from_pretrained(saved)) is SSLAMForAudioClassification
    assert type(AutoModel.from_config(SSLAMConfig(num_hidden_layers=1))) is SSLAMModel


def test_folder_carries_its_code(saved):
    assert {path.name for path in saved.glob("*.py")} == SOURCES
    config = json.loads((saved / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_sslam.SSLAMConfig",
        "AutoModel": "modeling_sslam.SSLAMModel",
        "AutoModelForAudioClassification": "modeling_sslam.SSLAMForAudioClassification",
    }
    extractor = json.loads((saved / "preprocessor_config.json").read_text())
    assert extractor["auto_map"] == {"AutoFeatureExtractor": "feature_extraction_sslam.SSLAMFeatureExtractor"}
    for cls in (SSLAMModel, SSLAMForAudioClassification):
        cls.from_pretrained(saved).save_pretrained(saved / cls.__name__)
        resaved = json.loads((saved / cls.__name__ / "config.json").read_text())
        assert resaved["auto_map"] == config["auto_map"]


def test_carried_code_imports_nothing_but_torch_transformers_and_numpy(saved):
    allowed = {"torch", "transformers", "numpy"}
    for path in saved.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = {node.module.split(".")[0]}
            else:
                continue
            assert names <= allowed | sys.stdlib_module_names, f"{path.name}: {names}"


def test_loads_without_this_package(saved, tmp_path):
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, 8000).astype(np.float32)
    save_file({"wave": torch.from_numpy(wave)}, saved / "wave.safetensors")
    script = """
import torch, transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline

folder = sys.argv[1]
wave = load_file(folder + "/wave.safetensors")["wave"].numpy()

def load(folder):
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    extractor = AutoFeatureExtractor.from_pretrained(folder, trust_remote_code=True)
    encoder = AutoModel.from_pretrained(folder, trust_remote_code=True)
    classifier = AutoModelForAudioClassification.from_pretrained(folder, trust_remote_code=True)
    for thing in (config, extractor, encoder, classifier):
        assert type(thing).__module__.startswith("transformers_modules."), type(thing)
    inputs = extractor(wave, sampling_rate=16_000, return_tensors="pt")
    with torch.no_grad():
        outputs = {"states": encoder(**inputs).last_hidden_state, "logits": classifier(**inputs).logits}
    return extractor, classifier, inputs | outputs

extractor, classifier, outputs = load(folder)
save_file(dict(outputs), "outputs.safetensors")
scores = pipeline("audio-classification", folder, trust_remote_code=True)(wave, function_to_apply="sigmoid")
assert [score["label"] for score in scores] == [
    classifier.config.id2label[i] for i in outputs["logits"][0].argsort(descending=True).tolist()
]

classifier.save_pretrained("resaved")
extractor.save_pretrained("resaved")
resaved = load("resaved")[2]
assert torch.equal(resaved["logits"], outputs["logits"]) and torch.equal(resaved["states"], outputs["states"])

import os
print(sorted(name for name in os.listdir("resaved") if name.endswith(".py")))
print(transformers.__version__)
"""
    files, version = run_isolated(script, saved, tmp_path).splitlines()
    assert files == str(sorted(SOURCES))
    assert version == transformers.__version__

    outputs = load_file(tmp_path / "outputs.safetensors")
    inputs = SSLAMFeatureExtractor.from_pretrained(saved)(wave, sampling_rate=16_000, return_tensors="pt")
    assert torch.equal(outputs["input_values"], inputs["input_values"])
    with torch.no_grad():
        states = SSLAMModel.from_pretrained(saved)(**inputs).last_hidden_state
        logits = SSLAMForAudioClassification.from_pretrained(saved)(**inputs).logits
    # The other process may use more threads, which changes the order of sums.
    torch.testing.assert_close(outputs["states"], states, atol=1e-6, rtol=0)
    torch.testing.assert_close(outputs["logits"], logits, atol=1e-6, rtol=0)


def test_isolation_works(saved, tmp_path):
    """The tests above rely on this isolation."""
    script = """
try:
    import modeling_sslam
except ModuleNotFoundError as error:
    print(error)
try:
    socket.create_connection(("127.0.0.1", 80))
except OSError as error:
    print(error)
"""
    assert run_isolated(script, saved, tmp_path) == "No module named 'modeling_sslam'\nthe network is off\n"


def test_code_runs_only_when_trusted(saved, tmp_path):
    script = """
from transformers import AutoConfig
try:
    AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=False)
except ValueError as error:
    print("refused")
"""
    assert run_isolated(script, saved, tmp_path) == "refused\n"


def test_pretraining_loads_without_this_package(tmp_path, make_config):
    folder = tmp_path / "saved"
    model = SSLAMForPreTraining(make_config(mask_noise_std=0.0)).train()
    model.update_teacher(0.5)
    model.save_pretrained(folder)
    assert type(AutoModelForPreTraining.from_pretrained(folder)) is SSLAMForPreTraining
    assert {path.name for path in folder.glob("*.py")} == {
        "configuration_sslam.py",
        "modeling_sslam.py",
        "modeling_sslam_pretraining.py",
        "transfers_sslam.py",
    }
    script = """
import torch
from transformers import AutoModel, AutoModelForPreTraining

model = AutoModelForPreTraining.from_pretrained(sys.argv[1], trust_remote_code=True).train()
assert type(model).__module__.startswith("transformers_modules."), type(model)
encoder = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
assert torch.equal(encoder.encoder.cls_token, model.sslam.encoder.cls_token)
clips = torch.arange(2 * 64 * 32).view(2, 64, 32).sin()
output = model(clips, generator=torch.Generator().manual_seed(0))
output.loss.backward()
print(repr(output.loss.item()))
"""
    loss = float(run_isolated(script, folder, tmp_path))
    clips = torch.arange(2 * 64 * 32).view(2, 64, 32).sin()
    assert loss == pytest.approx(model(clips, generator=torch.Generator().manual_seed(0)).loss.item(), rel=1e-5)

"""A stand-in of the Hub with the published repositories, and processes that reach nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

SSLAM, SSLAM_AS2M = "ta012/SSLAM_pretrain", "ta012/SSLAM_AS2M_Finetuned"
EAT, EAT_AS2M = "worstchan/EAT-base_epoch30_pretrain", "worstchan/EAT-base_epoch30_finetune_AS2M"
AUTO_MAP = {"AutoConfig": "configuration_eat.EATConfig", "AutoModel": "modeling_eat.EATModel"}
# Code that must not run.
STRANGER = b"import os, pathlib\npathlib.Path(os.environ['MARKER']).touch()\n"

# Only the stand-in can be reached, and timm is missing.
ISOLATED = """
import socket, sys

sys.modules |= dict.fromkeys(("timm", "fairseq", "omegaconf"))
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
    """Return a function that runs Python against the stand-in, and returns its output.

    The first argument is a script.
    """
    environment = hub_environment(hub, tmp_path / "home") | {
        "MARKER": str(tmp_path / "a stranger's code ran"),
        "TRANSFORMERS_VERBOSITY": "error",
    }

    def run(script: str, *arguments: object, status: int = 0) -> str:
        hub.requests.clear()
        result = subprocess.run(
            [sys.executable, "-c", ISOLATED + script, *map(str, arguments)],
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


@pytest.fixture
def sslam(run):
    """Return a function that runs the command `sslam` against the stand-in."""
    program = "from modeling_sslam.__main__ import main; import sys; sys.exit(main(sys.argv[1:]))"
    return lambda *arguments, status=0: run(program, *arguments, status=status)

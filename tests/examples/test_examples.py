"""The commands in the docstrings of examples/ run, on a tiny model and fewer clips."""

import importlib
import shlex
import shutil
import subprocess
import sys

import datasets
import numpy as np
import pandas as pd
import pytest

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification
from modeling_sslam.__main__ import main as sslam

pytestmark = pytest.mark.slow

MODEL = "outputs/quickstart/classifier/model"


@pytest.fixture
def run_docstring(make_config, audio_dir, tmp_path, monkeypatch):
    """Return a function that runs the commands in an example's docstring, in a folder with a model and recordings."""
    config = make_config(num_labels=3, num_mel_bins=128, max_length=128, problem_type="multi_label_classification")
    SSLAMForAudioClassification(config).save_pretrained(tmp_path / MODEL)
    SSLAMFeatureExtractor(max_length=128).save_pretrained(tmp_path / MODEL)
    shutil.copytree(audio_dir, tmp_path / "tests" / "fixtures" / "audio")
    monkeypatch.chdir(tmp_path)

    def run(example):
        commands = [line.strip() for line in importlib.import_module(example).__doc__.splitlines()]
        commands = [shlex.split(line) for line in commands if line.startswith(("python -m ", "sslam "))]
        assert len(commands) == 2
        for program, *arguments in commands:
            if program == "sslam":
                assert sslam(arguments) == 0
                continue
            for option, fewer in (("--clips", "24"), ("--seconds", "0.6")):
                if option in arguments:
                    arguments[arguments.index(option) + 1] = fewer
            module = importlib.import_module(arguments[1])
            if hasattr(module, "__path__"):  # a package
                module = importlib.import_module(f"{arguments[1]}.__main__")
            monkeypatch.setattr(sys, "argv", [module.__file__, *arguments[2:]])
            module.main()

    return run


def test_classify_with_features(run_docstring, capsys):
    run_docstring("examples.classify_with_features")
    printed = capsys.readouterr().out
    summary, *classes = printed[printed.index("mAP ") :].splitlines()
    # The few test clips have some of the 28 classes.
    assert 1 <= len(classes) == int(summary.split()[3]) <= 5


def test_similarity_search(run_docstring, capsys):
    run_docstring("examples.similarity_search")
    first, *others = capsys.readouterr().out.splitlines()
    # The query is one of the recordings.
    assert first.startswith("1.000  tests/fixtures/audio/misc_crow.flac  0.00 to 0.4")
    similarities = [float(line.split()[0]) for line in others]
    assert len(similarities) == 4
    assert similarities == sorted(similarities, reverse=True)


def test_datasets_map(run_docstring):
    run_docstring("examples.datasets_map")
    dataset = datasets.load_from_disk("with_embeddings")
    assert dataset.column_names[0] == "id"
    assert np.asarray(dataset["embedding"]).shape == (len(dataset), 32)


def test_tag_folder(run_docstring, repository, tmp_path, monkeypatch):
    script = (repository / "examples" / "tag_folder.sh").read_text()
    (command,) = (line[1:].strip() for line in script.splitlines() if line.startswith("#     sh"))
    # An installed package has the programs `sslam` and `python`.
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, module in (("sslam", "-m modeling_sslam"), ("python", "")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(repository))
    monkeypatch.setenv("THRESHOLD", "0")
    (tmp_path / "examples").symlink_to(repository / "examples")
    (tmp_path / "tests" / "fixtures" / "audio" / "broken.wav").write_bytes(b"")
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    tags = pd.read_csv("tags.csv")
    assert len(tags["path"].unique()) == 5
    assert done.stdout.split()[:3] == ["files", "score", "best"]

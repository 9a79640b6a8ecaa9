"""The quickstart runs from its scenes to its labels, with fewer and smaller steps, and its recordings are in order."""

import importlib
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from examples import quickstart
from modeling_sslam import SSLAMFeatureExtractor
from training.data.mixing.settings import SceneSettings
from training.data.sources import open_scene_pools

SMALLER = {
    "training.soundscapes": ("--clips", 48, "--processes", 1),
    "training.pretrain": ("--max_updates", 2, "--optimizer.warmup_updates", 1, "--batch_size", 4),
    "training.finetune": ("--max_updates", 2, "--optimizer.warmup_updates", 1, "--evaluate_every", 2),
    "training.linear_eval": ("--head.epochs", 1, "--forest.trees", 5),
}


class Clip(NamedTuple):
    """The part of an embedding that the quickstart reads."""

    name: str
    embedding: np.ndarray


@pytest.fixture
def pools(repository):
    """The recordings of each split."""
    settings = SceneSettings(sounds=str(repository / quickstart.SOUNDS), splits=list(quickstart.SPLITS))
    return {split: pool.mixer.sounds for split, pool in open_scene_pools(settings).items()}


def test_recordings_are_short_and_listed_with_their_authors(repository):
    folder = repository / quickstart.SOUNDS
    rows = re.findall(
        r"^\| (\w+/\w+\.flac) \| (\d\.\d\d) \| [^|]+, http\S+/sounds/\d+/ \|$",
        (folder / "README.md").read_text(),
        re.M,
    )
    files = sorted(folder.glob("*/*"))
    assert [name for name, _ in rows] == [str(path.relative_to(folder)) for path in files]
    assert sum(path.stat().st_size for path in files) < 2e6
    for path, (_, seconds) in zip(files, rows, strict=True):
        info = soundfile.info(path)
        assert (info.samplerate, info.channels) == (16_000, 1)
        assert info.duration == pytest.approx(float(seconds), abs=0.006)
        assert info.duration <= 2.5


def test_every_class_has_held_out_recordings(pools):
    assert not set(pools["train"].ids) & set(pools["test"].ids)
    for recordings in pools.values():
        assert set(recordings.labels) == set(pools["train"].labels)
    assert len(set(pools["train"].labels)) == 8


def test_readme_says_how_many_recordings_are_trained_on_and_held_out(repository, pools):
    text = " ".join((repository / "README.md").read_text().split())
    assert f"trained for minutes on scenes from {len(pools['train'])} recordings" in text
    assert f"{len(pools['test'])} of the recordings are held out" in text


@pytest.mark.slow
def test_quickstart_runs_and_continues(repository, tmp_path, monkeypatch, capsys, pools):
    commands = []

    def run(module, *arguments):
        commands.append(module)
        words = list(map(str, (*arguments, *SMALLER[module])))
        program = importlib.import_module(f"{module}.__main__" if module == "training.soundscapes" else module)
        program.main(words)

    monkeypatch.chdir(repository)
    monkeypatch.setattr(quickstart, "run", run)
    monkeypatch.setattr(sys, "argv", ["quickstart", str(tmp_path / "out")])
    printed = []
    for _ in range(2):
        quickstart.main()
        printed.append(capsys.readouterr().out.partition("Test scenes")[2])
    # The second call finds the scenes and the complete runs.
    assert commands.count("training.soundscapes") == 1
    assert printed[0] == printed[1]

    scenes, recordings, neighbours, files = re.split(r"Held-out recordings:|Nearest neighbours of|Files:", printed[0])
    # Scenes with one, two and three sources have as many labels.
    assert len(re.findall(r"^    [01]\.\d\d  \w+", scenes, re.M)) == 1 + 2 + 3
    for name, sources in re.findall(r"(test-\d+)\.flac contains (.+)", scenes):
        assert (tmp_path / "out" / f"{name}.flac").exists()
        assert sources
    for name, label in zip(pools["test"].ids, pools["test"].labels, strict=True):
        (line,) = re.findall(rf"^  examples/sounds/{re.escape(name)} .*", recordings, re.M)
        assert line.endswith(f"  {label}") != line.endswith("  (wrong)")
    num_right = len(pools["test"]) - recordings.count("(wrong)")
    assert f"right for {num_right} of {len(pools['test'])} held-out recordings." in recordings
    assert neighbours.startswith(f" examples/sounds/{pools['test'].ids[0]} among the other 57 recordings:")
    assert len(re.findall(r"^  -?[01]\.\d{3}  examples/sounds/(\w+)/\w+\.flac +\1$", neighbours, re.M)) == 3
    # Short recordings are padded with silence, as the configuration of pre-training says.
    extractor = SSLAMFeatureExtractor.from_pretrained(tmp_path / "out" / "classifier" / "model")
    assert extractor.padding_value == -15.94
    for line in files.strip().splitlines():
        assert Path(line.split()[0]).exists(), line


def test_neighbours_of_a_recording_are_the_most_similar_ones(monkeypatch, capsys):
    paths = [Path(f"examples/sounds/{name}") for name in ("bell/a.flac", "bell/b.flac", "drum/c.flac", "drum/d.flac")]
    vectors = [(2, 0), (1, 0.1), (0, 1), (1, 0)]
    clips = [Clip(str(path), np.array(vector, float)) for path, vector in zip(paths, vectors, strict=True)]
    monkeypatch.setattr(quickstart, "embed", lambda sources, model, pooling: clips)
    quickstart.print_neighbours({"encoder": Path("model")}, {paths[0]: "bell", paths[2]: "drum"}, top_k=2)
    lines = capsys.readouterr().out.split("\n\n")[1:]
    assert [line.split()[1:] for line in lines[0].splitlines()] == [
        ["examples/sounds/drum/d.flac", "drum"],
        ["examples/sounds/bell/b.flac", "bell"],
    ]
    # The nearest neighbour of bell/a is drum/d; that of drum/c is bell/b.
    assert lines[1].splitlines()[1] == "    by embeddings of the encoder: 0 of 2"


def test_share_of_sources_found(tmp_path, capsys):
    rows = [
        {"labels": ["a"], "scores": [0.9, 0.1, 0.2], "group": 1},
        {"labels": ["a", "c"], "scores": [0.2, 0.9, 0.8], "group": 2},
        {"labels": ["a", "b"], "scores": [0.2, 0.3, 0.1], "group": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "predictions.parquet")
    quickstart.print_share_found(tmp_path / "predictions.parquet", ["a", "b", "c"])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "    1 source: 100% in 1 scenes",
        "    2 sources: 75% in 2 scenes",
    ]

"""Every data set's preparation, on a miniature in its format on disk with the faults that downloads have."""

import json

import datasets
import pytest

from conversion.labels import read_labels
from training import prepare
from training.data import DataConfig, make_loader
from training.preparation import esc50


@pytest.fixture
def put(tmp_path, encode):
    """Writes files of a miniature: `put("audio/a.wav")` a sound, `put("meta.csv", text)` a text."""
    seeds = iter(range(1000))

    def put(name, content=None, seconds=0.2):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            content = encode(next(seeds), seconds, file_format={".wav": "WAV", ".flac": "FLAC"}[path.suffix])
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return put


@pytest.fixture
def make(tmp_path):
    """Prepares the miniature; gives the folder and the report."""

    def make(name, source=None, **options):
        out = tmp_path / f"out-{name}"
        return out, prepare.prepare(name, source or tmp_path / "source", out, **options)

    return make


def counts(report):
    return {kind: entry["count"] for kind, entry in report["findings"].items()}


def read(folder, split, extractor):
    """Labels by id, as the training programs' loader gives them."""
    config = DataConfig(str(folder), split=split, label_column="labels", num_workers=0)
    loader = make_loader(config, extractor, batch_size=2, seed=0, repeat=False)
    read = {id_: tuple(labels) for batch in loader for id_, labels in zip(batch["ids"], batch["labels"], strict=True)}
    assert not loader.skipped
    return read


# ------------------------------------------------------------------------------------------------------------ ESC-50


@pytest.fixture
def esc50_miniature(put):
    header = "filename,fold,target,category,esc10,src_file,take\n"
    rows = [
        "1-1-A-0.wav,1,0,dog,True,1,A",
        "1-2-A-49.wav,1,49,hand_saw,False,2,A",
        "2-3-A-1.wav,2,1,rooster,True,3,A",
        "3-4-A-2.wav,3,2,pig,True,4,A",
        "4-5-A-3.wav,4,3,cow,True,5,A",
        "5-6-A-4.wav,5,4,frog,True,6,A",
    ]
    faults = [
        "1-7-A-5.wav,1,5,cat,False,7,A",  # no file
        "1-8-A-6.wav,1,6,hen,False,8,A",  # no header
        "1-9-A-7.wav,1,7,unicorn,False,9,A",  # no class
        rows[0],  # again
        "2-3-A-1.wav,2,2,pig,True,3,A",  # again, otherwise
        "5-10-A-4.wav,5,8,frog,True,10,A",  # target of another class
    ]
    put("meta/esc50.csv", header + "\n".join(rows + faults) + "\n")
    for row in (*rows, faults[2], faults[5]):
        put(f"audio/{row.split(',')[0]}")
    put("audio/1-8-A-6.wav", b"RIFF....")
    put("audio/extra.wav")
    put("audio/empty.wav", b"")


ESC50_LABELS = {
    "fold1": {"1-1-A-0": ("dog",), "1-2-A-49": ("hand_saw",)},
    "fold2": {"2-3-A-1": ("rooster",)},
    "fold3": {"3-4-A-2": ("pig",)},
    "fold4": {"4-5-A-3": ("cow",)},
    "fold5": {"5-6-A-4": ("frog",), "5-10-A-4": ("frog",)},
}


@pytest.mark.usefixtures("esc50_miniature")
def test_esc50(make, extractor, tmp_path, capsys):
    folder, report = make("esc50")
    assert {split: read(folder, split, extractor) for split in ESC50_LABELS} == ESC50_LABELS
    assert counts(report) == {
        "missing_files": 1,
        "unlisted_files": 2,
        "unreadable_files": 1,
        "duplicated_rows": 1,
        "conflicting_rows": 2,
        "unknown_labels": 1,
        "clips_without_known_label": 1,
        "classes_without_clip": 44,
    }
    assert report["findings"]["missing_files"]["first"] == ["audio/1-7-A-5.wav"]
    assert report["splits"]["fold1"]["clips"] == 2
    assert report["splits"]["fold1"]["classes"]["hand_saw"] == 1
    assert json.loads((folder / "report.json").read_text()) == report
    assert "missing files (listed, but not there; left out): 1, audio/1-7-A-5.wav" in capsys.readouterr().out
    assert read_labels(folder / "labels.csv") == esc50.CLASSES

    loaded = datasets.load_dataset(str(folder), streaming=True)
    assert sorted(loaded) == sorted(ESC50_LABELS)
    row = next(iter(loaded["fold2"].cast_column("audio", datasets.Audio(decode=False))))
    assert row["audio"]["bytes"] == (tmp_path / "source/audio/2-3-A-1.wav").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-esc50", "source"]


def test_esc50_has_fifty_classes_in_the_published_order():
    assert len(set(esc50.CLASSES)) == 50
    assert [esc50.CLASSES[i] for i in (0, 1, 10, 20, 30, 36, 40, 49)] == [
        "dog", "rooster", "rain", "crying_baby", "door_wood_knock", "vacuum_cleaner", "helicopter", "hand_saw",
    ]  # fmt: skip

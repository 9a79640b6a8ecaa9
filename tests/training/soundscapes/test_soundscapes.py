"""The generator of soundscapes: its classes, its labels, and that it gives the same data whatever makes them."""

import csv
import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from modeling_sslam import SSLAMFeatureExtractor
from training.data.config import DataConfig
from training.data.loader import make_loader
from training.data.seeding import generator_for
from training.data.sources import open_source
from training.soundscapes import __main__ as soundscapes

RATE = 16_000


def level(waveform):
    return np.sqrt(np.mean(np.square(waveform)))


def test_there_are_many_classes():
    assert len(soundscapes.SOURCES) >= 20


@pytest.mark.parametrize("label", soundscapes.SOURCES)
def test_a_class_sounds_and_varies(label):
    function = soundscapes.SOURCES[label]
    one, again, other = (function(generator_for(seed, label), 2 * RATE, RATE) for seed in (0, 0, 1))
    assert one.shape == (2 * RATE,)
    assert np.isfinite(one).all()
    assert level(one) > 1e-3
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one / level(one), other / level(other), atol=0.1)
    assert np.isfinite(function(generator_for(2, label), RATE // 2, RATE)).all()


def test_classes_can_be_told_apart():
    """Nearest neighbour over the mean and spread of the log-mel bins; by chance 1 class in 28 would be right."""
    extractor = SSLAMFeatureExtractor(max_length=192)

    def describe(label, seed):
        waveform = soundscapes.SOURCES[label](generator_for(seed, label), 2 * RATE, RATE)
        features = extractor(0.1 * waveform / level(waveform), sampling_rate=RATE)["input_values"][0]
        return np.concatenate([features.mean(0), features.std(0)])

    labels = list(soundscapes.SOURCES)
    known = np.array([[describe(label, seed) for seed in range(8)] for label in labels])
    right = 0
    for k, label in enumerate(labels):
        distances = np.abs(known - describe(label, 99)).sum(-1).min(1)
        right += distances.argmin() == k
    print(f"{right} of {len(labels)} classes")
    assert right / len(labels) > 0.8


def test_events_are_where_their_labels_say():
    """Against the background: louder by about the stated ratio between onset and offset, silent elsewhere."""
    for seed in range(5):
        rng = generator_for(seed, "test")
        waveform, (event,) = soundscapes.soundscape(rng, 4.0, RATE, labels=["organ_chord"])
        assert waveform.shape == (4 * RATE,)
        assert waveform.dtype == np.float32
        assert np.abs(waveform).max() <= soundscapes.PEAK + 1e-6
        assert 0 <= event.onset < event.offset <= 4
        start, stop = round(event.onset * RATE), round(event.offset * RATE)
        outside = np.concatenate([waveform[:start], waveform[stop:]])
        inside = waveform[start:stop]
        if len(outside) > RATE // 4:
            snr = 10 * np.log10(max(level(inside) ** 2 / level(outside) ** 2 - 1, 1e-3))
            assert snr == pytest.approx(event.snr, abs=1.5)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The same data from one process and from two."""
    folders = [tmp_path_factory.mktemp("soundscapes") / f"{n}" for n in (1, 2)]
    for processes, folder in enumerate(folders, 1):
        arguments = ["--clips=24", "--seconds=1.5", "--held-out=0.25", "--seed=7", "--max-sources=3"]
        plot = ["--plot"] if processes == 1 else []
        soundscapes.main([str(folder), *arguments, "--processes", str(processes), *plot])
    return folders


def test_the_data_do_not_depend_on_the_number_of_processes(made):
    one, two = made
    assert (one / "soundscapes.png").stat().st_size > 10_000
    (one / "soundscapes.png").unlink()
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert [str(f) for f in files if f.suffix == ".parquet"] == [
        f"data/{split}-00000-of-00001.parquet" for split in ("test", "train", "validation")
    ]
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes()
    assert not list(one.parent.glob("*.unfinished"))


def test_columns_and_tables(made):
    folder = made[1]
    dataset = datasets.load_dataset(str(folder), streaming=True)
    assert {split: len(list(rows.select_columns("id"))) for split, rows in dataset.items()} == {
        "train": 12,
        "validation": 6,
        "test": 6,
    }
    assert isinstance(dataset["train"].features["audio"], datasets.Audio)
    with open(folder / "events.csv") as file:
        table = list(csv.DictReader(file))
    with open(folder / "labels.csv") as file:
        assert [row["label"] for row in csv.DictReader(file)] == sorted(soundscapes.SOURCES)
    seen = set()
    for split, rows in dataset.items():
        for row in rows.select_columns(["id", "labels", "events", "num_sources"]):
            assert row["id"].startswith(split)
            assert 1 <= row["num_sources"] == len(row["labels"]) == len(set(row["labels"])) <= 3
            assert row["labels"] == [event["label"] for event in row["events"]]
            lines = [line for line in table if line["id"] == row["id"]]
            assert [
                {"label": e["label"], **{k: str(e[k]) for k in ("onset", "offset", "snr")}} for e in row["events"]
            ] == [{name: line[name] for name in ("label", "onset", "offset", "snr")} for line in lines]
            seen.update(row["labels"])
    assert len(seen) > 12


def test_the_loader_reads_them(made):
    config = DataConfig(str(made[1]), split="validation", label_column="labels", num_workers=0)
    loader = make_loader(
        open_source(config), SSLAMFeatureExtractor(max_length=128), batch_size=4, seed=0, repeat=False
    )
    batches = list(loader)
    assert sorted(id_ for batch in batches for id_ in batch["ids"]) == [f"validation-{i:06d}" for i in range(6)]
    assert {label for batch in batches for labels in batch["labels"] for label in labels} <= set(soundscapes.SOURCES)
    assert not loader.skipped


def test_the_audio_is_flac_of_the_stated_length():
    row = soundscapes.make_row(("train", 3), seed=0, duration=1.0, rate=RATE, max_sources=2)
    samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
    assert (rate, samples.shape) == (RATE, (RATE,))
    assert row["audio"]["path"] == "train-000003.flac"


def test_an_existing_folder_and_nonsense_are_refused(tmp_path, capsys):
    for arguments, message in [
        ([str(tmp_path)], "exists"),
        ([str(Path(tmp_path) / "new"), "--max-sources", "99"], "--max-sources 99"),
        ([str(Path(tmp_path) / "new"), "--held-out", "0.5"], "no clip to train on"),
        ([str(Path(tmp_path) / "new"), "--seconds", "0.1"], "--seconds 0.1"),
        ([str(Path(tmp_path) / "new"), "--sampling-rate", "8000"], "--sampling-rate 8000"),
    ]:
        with pytest.raises(SystemExit):
            soundscapes.main(arguments)
        assert message in capsys.readouterr().err

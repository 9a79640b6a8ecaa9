"""Synthesised soundscapes: the sound classes, the events, and data that depend on the seed alone."""

import csv
import io

import datasets
import numpy as np
import pytest
import soundfile

from modeling_sslam import SSLAMFeatureExtractor
from training.data.config import DataConfig
from training.data.loader import make_loader
from training.data.seeding import generator_for
from training.data.sources import open_source
from training.soundscapes.__main__ import main
from training.soundscapes.scene import PEAK, make_row, soundscape
from training.soundscapes.sounds import SOURCES

pytestmark = pytest.mark.slow
RATE = 16_000


def level(waveform):
    return np.sqrt(np.mean(np.square(waveform)))


@pytest.mark.parametrize("label", SOURCES)
def test_a_class_is_audible_and_varies_with_the_generator(label):
    synthesise = SOURCES[label]
    one, again, other = (synthesise(generator_for(seed, label), 2 * RATE, RATE) for seed in (0, 0, 1))
    assert one.shape == (2 * RATE,)
    assert np.isfinite(one).all()
    assert level(one) > 1e-3
    np.testing.assert_array_equal(one, again)
    assert not np.allclose(one / level(one), other / level(other), atol=0.1)
    assert np.isfinite(synthesise(generator_for(2, label), RATE // 2, RATE)).all()


def test_classes_can_be_told_apart():
    """Nearest neighbours by mean and deviation of the log-mel bins find the class. Chance is 1 in 28."""
    extractor = SSLAMFeatureExtractor(max_length=192)

    def describe(label, seed):
        waveform = SOURCES[label](generator_for(seed, label), 2 * RATE, RATE)
        features = extractor(0.1 * waveform / level(waveform), sampling_rate=RATE)["input_values"][0]
        return np.concatenate([features.mean(0), features.std(0)])

    labels = list(SOURCES)
    known = np.array([[describe(label, seed) for seed in range(8)] for label in labels])
    right = 0
    for k, label in enumerate(labels):
        distances = np.abs(known - describe(label, 99)).sum(-1).min(1)
        right += distances.argmin() == k
    assert len(labels) == 28
    assert right >= 26


@pytest.mark.parametrize("seed", range(5))
def test_an_event_has_the_place_and_the_level_of_its_label(seed):
    """The same draws without an event give the background, so the event is the difference from it."""
    background, _ = soundscape(generator_for(seed, "test"), 4.0, RATE, labels=[])
    waveform, (event,) = soundscape(generator_for(seed, "test"), 4.0, RATE, labels=["organ_chord"])
    assert waveform.shape == (4 * RATE,)
    assert waveform.dtype == np.float32
    assert np.abs(waveform).max() <= PEAK * (1 + 1e-7)
    assert 0 <= event.onset < event.offset <= 4
    # Labels round times to 0.1 ms, which is 1.6 samples.
    start, stop = round(event.onset * RATE) - 1, round(event.offset * RATE) + 1
    outside = np.r_[0 : max(start, 0), stop : len(waveform)]
    assert len(outside) > RATE / 10
    gain = np.dot(waveform[outside], background[outside]) / np.dot(background[outside], background[outside])
    assert gain <= 1 + 1e-6
    np.testing.assert_allclose(waveform[outside], gain * background[outside], rtol=1e-5, atol=1e-9)
    sound = waveform.astype(np.float64) - gain * background
    energy = np.square(sound).sum() / ((event.offset - event.onset) * RATE)
    snr = 10 * np.log10(energy / np.square(gain * background.astype(np.float64)).mean())
    # An event is at least 8000 samples long, so a sample more or less is 0.0005 dB.
    assert snr == pytest.approx(event.snr, abs=1e-3)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Make the same data set with one process and with two."""
    folders = [tmp_path_factory.mktemp("soundscapes") / f"{n}" for n in (1, 2)]
    for processes, folder in enumerate(folders, 1):
        arguments = ["--clips=24", "--seconds=1.5", "--held-out=0.25", "--seed=7", "--max-sources=3"]
        plot = ["--plot"] if processes == 1 else []
        main([str(folder), *arguments, "--processes", str(processes), *plot])
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
    assert sorted(path.name for path in one.parent.iterdir()) == ["1"]


def test_the_columns_agree_with_the_tables(made):
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
        assert [row["label"] for row in csv.DictReader(file)] == sorted(SOURCES)
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


def test_the_loader_reads_the_data_set(made):
    config = DataConfig(str(made[1]), split="validation", label_column="labels", num_workers=0)
    loader = make_loader(
        open_source(config), SSLAMFeatureExtractor(max_length=128), batch_size=4, seed=0, repeat=False
    )
    batches = list(loader)
    assert sorted(id_ for batch in batches for id_ in batch["ids"]) == [f"validation-{i:06d}" for i in range(6)]
    assert {label for batch in batches for labels in batch["labels"] for label in labels} <= set(SOURCES)
    assert not loader.skipped


def test_the_audio_is_flac_of_the_stated_length():
    row = make_row(("train", 3), seed=0, duration=1.0, rate=RATE, max_sources=2)
    samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
    assert (rate, samples.shape) == (RATE, (RATE,))
    assert row["audio"]["path"] == "train-000003.flac"


def test_an_existing_folder_and_wrong_values_are_rejected(tmp_path, capsys):
    for arguments, message in [
        ([str(tmp_path)], "exists already"),
        ([str(tmp_path / "new"), "--max-sources", "99"], "--max-sources 99"),
        ([str(tmp_path / "new"), "--held-out", "0.5"], "leave no clip for training"),
        ([str(tmp_path / "new"), "--seconds", "0.1"], "--seconds 0.1"),
        ([str(tmp_path / "new"), "--sampling-rate", "8000"], "--sampling-rate 8000"),
    ]:
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err

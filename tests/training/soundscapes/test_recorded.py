"""`python -m training.soundscapes OUT --sounds FOLDER`: the data set, its tables, and what it refuses."""

import csv
import io
import json
import subprocess
import sys
import time

import datasets
import numpy as np
import pytest
import soundfile
import yaml

from modeling_sslam import SSLAMFeatureExtractor
from training.data.config import LabelledDataConfig
from training.data.labels import find_label_set
from training.data.loader import make_loader
from training.data.mixing.settings import read_settings
from training.data.sources import open_scene_pools, open_source
from training.soundscapes.__main__ import main
from training.soundscapes.jams import jams_of
from training.soundscapes.recorded import EVENT_COLUMNS

pytestmark = pytest.mark.slow
RATE = 16_000
CLASSES = ["high", "low", "middle"]


@pytest.fixture(scope="module")
def sounds(write_sounds, tmp_path_factory):
    folder = write_sounds(tmp_path_factory.mktemp("sounds") / "sounds")
    (folder / "low" / "take0-0.flac").write_bytes(b"not a sound")
    return folder


def options(sounds, *more):
    settings = ["--clips=40", "--seconds=1", "--max-sources=2", "--group-by", r"\w+/take\d", "--pitch", "-2", "2"]
    return ["--sounds", str(sounds), *settings, "--splits", "train=0.5", "test=0.5", *more]


@pytest.fixture(scope="module")
def made(sounds, tmp_path_factory):
    """Make the same data set with one process and with two."""
    folders = [tmp_path_factory.mktemp("scenes") / f"{n}" for n in (1, 2)]
    for processes, folder in enumerate(folders, 1):
        plot = ["--plot"] if processes == 1 else []
        main([str(folder), *options(sounds, "--processes", str(processes), *plot)])
    return folders


def test_the_data_do_not_depend_on_the_number_of_processes(made):
    one, two = made
    assert (one / "soundscapes.png").stat().st_size > 10_000
    (one / "soundscapes.png").unlink()
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert {path.name for path in one.iterdir()} == {
        *("README.md", "data", "events.csv", "jams", "labels.csv", "report.json", "scenes.yaml"),
    }
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes()


def test_rows_tables_and_annotations_agree(made):
    folder = made[1]
    with open(folder / "events.csv") as file:
        table = list(csv.DictReader(file))
    assert list(table[0])[:8] == ["file", "onset", "offset", "label", "snr_db", "source_file", "pitch", "stretch"]
    owners: dict[str, set[str]] = {}
    for split, rows in datasets.load_dataset(str(folder), streaming=True).items():
        assert isinstance(rows.features["audio"], datasets.Audio)
        rows = list(rows.cast_column("audio", datasets.Audio(decode=False)))
        assert [row["id"] for row in rows] == [f"{split}-{i:06d}" for i in range(20)]
        for row in rows:
            samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]))
            assert (rate, samples.shape) == (RATE, (RATE,))
            assert row["num_sources"] == len(row["events"])
            assert row["labels"] == [event["label"] for event in row["events"]]
            lines = [line for line in table if line["file"] == row["id"]]
            for event, line in zip(row["events"], lines, strict=True):
                for column, name in EVENT_COLUMNS.items():
                    assert line[column] == ("" if event[name] is None else str(event[name]))
                owners.setdefault(event["source_group"], set()).add(split)
            assert row["source_groups"] == sorted({event["source_group"] for event in row["events"]})
            annotation = json.loads((folder / "jams" / split / f"{row['id']}.jams").read_text())
            assert annotation == json.loads(json.dumps(jams_of(row, 1.0)))
    assert len(owners) == 12
    assert all(len(splits) == 1 for splits in owners.values())


def test_annotations_have_the_fields_of_jams(made):
    annotation = json.loads((made[1] / "jams" / "train" / "train-000000.jams").read_text())
    assert annotation["file_metadata"]["duration"] == 1.0
    scaper, segments, tags = annotation["annotations"]
    assert [part["namespace"] for part in (scaper, segments, tags)] == ["scaper", "segment_open", "tag_open"]
    background, *events = scaper["data"]
    assert (background["value"]["role"], background["value"]["source_file"]) == ("background", "noise")
    assert scaper["sandbox"]["scaper"]["n_events"] == len(events) == len(segments["data"])
    for event, segment in zip(events, segments["data"], strict=True):
        assert event["value"]["role"] == "foreground"
        assert event["value"]["event_duration"] == event["duration"] == segment["duration"] > 0
        assert (event["time"], event["value"]["label"]) == (segment["time"], segment["value"])
    assert {tag["value"] for tag in tags["data"]} == {event["value"]["label"] for event in events}


def test_the_report_counts_and_names_unusable_recordings(made):
    report = json.loads((made[1] / "report.json").read_text())
    with open(made[1] / "events.csv") as file:
        labels = [line["label"] for line in csv.DictReader(file)]
    assert sum(sum(facts["events"].values()) for facts in report["splits"].values()) == len(labels)
    assert {split: facts["scenes"] for split, facts in report["splits"].items()} == {"train": 20, "test": 20}
    assert list(report["unusable_recordings"]) == ["low/take0-0.flac"]
    assert report["unusable_recordings"]["low/take0-0.flac"].startswith("undecodable")
    assert report["skipped_scenes"] == {}


def test_training_reads_the_scenes_and_mixes_the_same_on_the_fly(made):
    """The first epoch of a stream with the same seed, length and rate is the data set."""
    extractor = SSLAMFeatureExtractor(max_length=112)

    def read(source):
        config = LabelledDataConfig(str(source), num_workers=0, front_end="device")
        opened = open_source(config)
        assert find_label_set(opened).names == CLASSES
        loader = make_loader(opened, extractor, batch_size=4, seed=0, repeat=False)
        batches = list(loader)
        return [
            {id_: values for batch in batches for id_, values in zip(batch["ids"], batch[name], strict=True)}
            for name in ("labels", "groups", "waveforms")
        ]

    (*stored, waveforms), (*streamed, mixed) = read(made[1]), read(made[1] / "scenes.yaml")
    assert len(mixed) == 20
    assert stored == streamed
    for id_, waveform in waveforms.items():
        assert waveform.shape == (RATE,)
        assert (waveform - mixed[id_]).abs().max() <= 1 / 32_768


def test_the_settings_beside_the_data_give_the_same_scenes(made):
    settings = read_settings(made[1] / "scenes.yaml")
    assert yaml.safe_load((made[1] / "scenes.yaml").read_text())["clips"] == 40
    assert {split: pool.num_scenes for split, pool in open_scene_pools(settings).items()} == {"train": 20, "test": 20}


def test_a_scene_without_a_usable_recording_is_skipped_and_named(write_sounds, tmp_path, capsys):
    folder = write_sounds(tmp_path / "sounds", count=2)
    for file in (folder / "low").iterdir():
        file.write_bytes(b"not a sound")
    arguments = ["--clips=12", "--seconds=0.5", "--max-sources=1", "--splits", "train=1", "--processes=1"]
    main([str(tmp_path / "out"), "--sounds", str(folder), *arguments])
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    skipped = len(report["skipped_scenes"])
    assert 0 < skipped < 12
    assert report["splits"]["train"]["scenes"] == 12 - skipped
    printed = capsys.readouterr().out
    assert f"{skipped} skipped scenes" in printed
    assert f"Wrote {12 - skipped} scenes" in printed
    for file in folder.rglob("*.flac"):
        file.write_bytes(b"not a sound")
    with pytest.raises(SystemExit, match="No scene of train could be mixed"):
        main([str(tmp_path / "none"), "--sounds", str(folder), *arguments])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "sounds"]


def test_backgrounds_rooms_and_another_rate(sounds, tmp_path):
    for name in ("streets", "rooms"):
        (tmp_path / name).mkdir()
    for i in range(4):
        noise = np.random.default_rng(i).standard_normal(4000)
        soundfile.write(tmp_path / "streets" / f"{i}.flac", 0.1 * noise, 8000)
        soundfile.write(tmp_path / "rooms" / f"{i}.flac", 0.1 * noise * 0.99 ** np.arange(4000), 8000)
    more = ["--background", str(tmp_path / "streets"), "--impulse-responses", str(tmp_path / "rooms")]
    main([str(tmp_path / "out"), *options(sounds, *more, "--sampling-rate=8000", "--processes=1")])
    for split, rows in datasets.load_dataset(str(tmp_path / "out"), streaming=True).items():
        rows = list(rows.select_columns(["events", "background", "level"]))
        assert {row["background"] for row in rows} <= {f"{i}.flac" for i in range(4)}
        assert {event["impulse_response"] for row in rows for event in row["events"]} <= {
            f"{i}.flac" for i in range(4)
        }, split
        assert all(-50 <= row["level"] <= -30 for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--held-out=0.2"], "--held-out is for synthesised clips"),
        (["--snr", "5", "1"], "snr=5,1 must be a range"),
        (["--snr", "5", "loud"], "--snr takes"),
        (["--sampling-rate=4000"], "--sampling-rate 4000 must be at least 8000"),
        (["--splits", "train=2"], "add up to 1"),
        (["--seconds=nan"], "seconds=nan must lie within 0.05 to 3600"),
        (["--seed=-1"], "--seed -1 must not be negative"),
    ],
)
def test_wrong_options_are_named(sounds, tmp_path, capsys, arguments, message):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out"), "--sounds", str(sounds), *arguments])
    assert message in capsys.readouterr().err


def test_scenes_are_not_written_among_the_recordings(sounds, capsys):
    """They would count as recordings in the next call."""
    with pytest.raises(SystemExit):
        main([str(sounds / "low" / "scenes"), "--sounds", str(sounds)])
    assert "where its files would count as recordings" in capsys.readouterr().err
    assert not (sounds / "low" / "scenes").exists()


def test_a_terminated_program_leaves_nothing(tmp_path):
    out = tmp_path / "out"
    words = [sys.executable, "-m", "training.soundscapes", str(out), "--clips=100000", "--processes=2"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        while not list(tmp_path.glob(".*/events.csv")):
            assert process.poll() is None
            time.sleep(0.05)
        process.terminate()
        # The pipe ends when the worker processes have ended too.
        assert "ended by SIGTERM" in process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert not list(tmp_path.glob(".*/*"))
    assert not out.exists()


def test_options_of_recordings_need_recordings(sounds, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "out"), "--group-by", "x"])
    assert "--group-by is for scenes from recordings; it needs --sounds" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="max_sources=5, but there are 3 classes"):
        main([str(tmp_path / "out"), "--sounds", str(sounds)])
    with pytest.raises(SystemExit, match=r"error: .*missing"):
        main([str(tmp_path / "out"), "--sounds", str(tmp_path / "missing")])
    assert not (tmp_path / "out").exists()

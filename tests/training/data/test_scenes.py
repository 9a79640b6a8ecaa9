"""Scenes that are mixed while they are read: a YAML file of settings as a data source."""

import os
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch
import yaml

from modeling_sslam import SSLAMFeatureExtractor
from training.data.config import DataConfig, DataError, LabelledDataConfig
from training.data.labels import find_label_set, survey
from training.data.loader import make_loader
from training.data.mixing.settings import SceneSettings, read_settings
from training.data.seeding import generator_for
from training.data.sources import is_one_split, open_scene_pools, open_source

SPLITS = ["train=0.5", "validation=0.25", "test=0.25"]
CLASSES = ["high", "low", "middle"]


@pytest.fixture(scope="module")
def sounds(write_sounds, tmp_path_factory):
    return write_sounds(tmp_path_factory.mktemp("sounds") / "sounds")


@pytest.fixture
def write_settings(sounds, tmp_path):
    """A function that writes a settings file of 24 scenes, of which 12 are for training."""

    def write_settings(**changes):
        path = tmp_path / "scenes.yaml"
        changes = {"sounds": str(sounds), "clips": 24, "seconds": 0.5, "max_sources": 2, "splits": SPLITS} | changes
        path.write_text(yaml.safe_dump(changes))
        return path

    return write_settings


def load(path, extractor=None, rank=0, world_size=1, repeat=True, batch_size=3, seed=0, **changes):
    settings = {"num_workers": 0, "shuffle_buffer": 4} | changes
    source = open_source(LabelledDataConfig(str(path), **settings))
    extractor = extractor or SSLAMFeatureExtractor(max_length=32)
    return make_loader(
        source, extractor, batch_size=batch_size, seed=seed, rank=rank, world_size=world_size, repeat=repeat
    )


def take(loader, count):
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


def contents(batches):
    """Return features and labels by epoch and name."""
    return {
        (epoch, id_): (values.numpy().tobytes(), tuple(labels), group)
        for batch in batches
        for epoch, id_, values, labels, group in zip(
            batch["epochs"], batch["ids"], batch["input_values"], batch["labels"], batch["groups"], strict=True
        )
    }


def test_every_epoch_has_other_scenes_of_the_same_number(write_settings):
    batches = take(load(write_settings()), 8)
    scenes = contents(batches)
    names = [f"train-{i:06d}" for i in range(12)]
    assert sorted(scenes) == [(epoch, name) for epoch in range(2) for name in names]
    assert len({features for features, _, _ in scenes.values()}) == 24
    assert {label for _, labels, _ in scenes.values() for label in labels} == set(CLASSES)
    assert all(len(labels) == group for _, labels, group in scenes.values())
    assert {group for _, _, group in scenes.values()} == {1, 2}


def test_a_scene_depends_on_seed_epoch_and_name_alone(write_settings):
    path = write_settings()
    scenes = contents(take(load(path), 8))
    assert contents(take(load(path, shuffle_buffer=0, batch_size=4), 6)) == scenes
    other = contents(take(load(path, seed=1), 8))
    assert not {value[0] for value in other.values()} & {value[0] for value in scenes.values()}


@pytest.mark.slow
def test_workers_and_ranks_share_the_scenes_without_repeats(write_settings):
    path = write_settings()
    scenes = contents(take(load(path, repeat=False), 99))
    shared = [load(path, rank=rank, world_size=2, num_workers=2, repeat=False) for rank in range(2)]
    parts = [contents(take(loader, 99)) for loader in shared]
    assert not set(parts[0]) & set(parts[1])
    assert all(parts)
    assert parts[0] | parts[1] == scenes


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [0, 3, 5])
def test_a_resumed_loader_continues_with_the_same_scenes(write_settings, num_workers, stop):
    path = write_settings(pitch=[-2, 2], stretch=[0.9, 1.2])
    whole = take(load(path, num_workers=num_workers), 9)
    first = load(path, num_workers=num_workers)
    batches = iter(first)
    for _ in range(stop):
        next(batches)
    state = first.state_dict()
    resumed = load(path, num_workers=num_workers)
    resumed.load_state_dict(state)
    for batch, expected in zip(take(resumed, 9 - stop), whole[stop:], strict=True):
        assert batch["ids"] == expected["ids"]
        assert batch["labels"] == expected["labels"]
        assert torch.equal(batch["input_values"], expected["input_values"])


def test_changed_settings_cannot_be_resumed(write_settings):
    state = load(write_settings()).state_dict()
    with pytest.raises(ValueError, match="scenes="):
        load(write_settings(snr=[5, 6])).load_state_dict(state)
    with pytest.raises(ValueError, match="seconds="):
        load(write_settings(seconds=0.4)).load_state_dict(state)
    load(write_settings(cache_mib=1)).load_state_dict(state)


def test_splits_have_recordings_of_their_own(write_settings):
    settings = read_settings(write_settings(group_by=r"\w+/take\d", clips=60))
    pools = open_scene_pools(settings)
    assert {split: pool.num_scenes for split, pool in pools.items()} == {"train": 30, "validation": 15, "test": 15}
    owners: dict[str, set[str]] = {}
    for split, pool in pools.items():
        assert pool.mixer.labels == CLASSES
        for i in range(pool.num_scenes):
            for event in pool.mixer.mix(generator_for(0, split, i), 8000, 16_000).events:
                assert event.source_group == event.source_file.rpartition("-")[0]
                owners.setdefault(event.source_group, set()).add(split)
    assert len(owners) == 12
    assert all(len(splits) == 1 for splits in owners.values())
    assert {split for (split,) in owners.values()} == set(pools)


def test_labels_and_classes_are_known_before_training(write_settings):
    path = write_settings()
    source = open_source(LabelledDataConfig(str(path)))
    assert find_label_set(source).names == CLASSES
    found = survey(source)
    assert (found.num_clips, found.is_single_label) == (12, False)
    first = contents(take(load(path, repeat=False), 99))
    assert {id_: set(labels) for id_, labels in source.ids_and_labels()} == {
        id_: set(labels) for (_, id_), (_, labels, _) in first.items()
    }
    assert survey(open_source(LabelledDataConfig(str(write_settings(max_sources=1))))).is_single_label
    assert not is_one_split(LabelledDataConfig(str(path), split="validation"))


def test_without_labels_batches_have_none(write_settings):
    source = open_source(DataConfig(str(write_settings()), num_workers=0))
    loader = make_loader(source, SSLAMFeatureExtractor(max_length=32), batch_size=2, seed=0)
    assert set(next(iter(loader))) == {"ids", "epochs", "input_values"}


def test_a_scene_is_no_longer_than_the_models_clips(write_settings):
    loader = load(write_settings(seconds=60.0), front_end="device")
    extractor = SSLAMFeatureExtractor(max_length=32)
    assert next(iter(loader))["num_samples"].tolist() == [extractor.num_samples(32)] * 3


def test_the_audio_of_a_prepared_data_set_is_read_from_its_rows(write_parquet, write_settings, tmp_path):
    write_parquet(tmp_path / "data", [9, 9], seconds=0.3)
    path = write_settings(sounds=str(tmp_path / "data"), splits=["train=1"], label_column="human_labels", clips=6)
    scenes = contents(take(load(path, repeat=False), 99))
    assert len(scenes) == 6
    assert {label for _, labels, _ in scenes.values() for label in labels} <= {f"class {i}" for i in range(3)}


def test_a_table_gives_labels_originals_and_named_splits(sounds, tmp_path, write_settings):
    rows = [
        f"{file},{file.parent.name},{file.stem[:5]}{file.parent.name},fold{int(file.stem[4]) % 2}"
        for file in sorted(sounds.rglob("*.flac"))
    ]
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,label,take,split", *rows]))
    changes = {"sounds": "table.csv", "group_column": "take", "splits": ["train=fold0", "test=fold1"]}
    pools = open_scene_pools(read_settings(write_settings(**changes)))
    assert {split: len(pool.mixer.sounds) for split, pool in pools.items()} == {"train": 12, "test": 12}
    assert {split: pool.num_scenes for split, pool in pools.items()} == {"train": 12, "test": 12}
    assert not set(pools["train"].mixer.sounds.groups) & set(pools["test"].mixer.sounds.groups)
    # The original of each file is now in both folds.
    table.write_text("\n".join(["path,label,take,split", *(row.replace(",take1", ",take0") for row in rows)]))
    with pytest.raises(ValueError, match="original recording 'take0high' is in the splits train and test"):
        open_scene_pools(read_settings(write_settings(**changes)))


def test_backgrounds_are_divided_unless_there_are_too_few(write_settings, tmp_path, caplog):
    for i in range(8):
        (tmp_path / "streets").mkdir(exist_ok=True)
        noise = 0.1 * np.random.default_rng(i).standard_normal(16_000)
        soundfile.write(tmp_path / "streets" / f"{i}.flac", noise, 16_000)
    pools = open_scene_pools(read_settings(write_settings(background="streets")))
    names = [name for pool in pools.values() for name in pool.mixer.background.ids]
    assert sorted(names) == [f"{i}.flac" for i in range(8)]
    for i in range(2, 8):
        (tmp_path / "streets" / f"{i}.flac").unlink()
    pools = open_scene_pools(read_settings(write_settings(background="streets")))
    assert [pool.mixer.background.ids for pool in pools.values()] == [["0.flac", "1.flac"]] * 3
    assert "fewer recordings than splits" in caplog.text


def test_an_unusable_recording_is_logged_once_and_skips_no_scene(write_sounds, write_settings, tmp_path, caplog):
    folder = write_sounds(tmp_path / "damaged", count=2)
    (folder / "low" / "take0-0.flac").write_bytes(b"no sound")
    loader = load(write_settings(sounds=str(folder), splits=["train=1"]), repeat=False)
    assert len(contents(take(loader, 99))) == 24
    assert loader.unusable_recordings == {"low/take0-0.flac"}
    assert not loader.skipped
    assert caplog.text.count("low/take0-0.flac is unusable (1 so far)") == 1


def test_a_source_of_unusable_recordings_stops(write_sounds, write_settings, tmp_path):
    folder = write_sounds(tmp_path / "damaged", count=2)
    for file in folder.rglob("*.flac"):
        file.write_bytes(b"no sound")
    loader = load(write_settings(sounds=str(folder), splits=["train=1"], clips=120))
    with pytest.raises(DataError, match="unusable"):
        next(iter(loader))
    assert loader.skipped["no_source"] >= 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"snr": [5, 1]}, r"scenes\.yaml: snr=5,1 must be a range"),
        ({"pitches": 1}, r"scenes\.yaml: unknown key 'pitches'; did you mean 'pitch'"),
        ({"splits": ["train=0.5"]}, "add up to 1"),
        ({"splits": ["train=0.5", "test=fold1"]}, "add up to 1, or only names"),
        ({"splits": ["train"]}, "must be NAME=SHARE"),
        ({"splits": ["train=a+b", "test=b"]}, "'b' twice"),
        ({"group_by": "("}, "no regular expression"),
        ({"group_by": "x", "group_column": "y"}, "give one of them"),
        ({"group_by": "nothing"}, "matches no name"),
        ({"max_sources": 9}, "there are 3 classes"),
        ({"min_sources": 3}, "min_sources=3 and max_sources=2"),
        ({"clips": 0}, "clips=0 must be at least 1"),
        ({"trim": 0}, "trim=0 must be positive"),
        ({"seconds": float("inf")}, "seconds=inf"),
    ],
)
def test_wrong_settings_are_named(write_settings, changes, message):
    with pytest.raises(ValueError, match=message):
        open_source(DataConfig(str(write_settings(**changes))))


def test_a_wrong_split_and_selections_of_clips_are_refused(write_settings):
    path = write_settings()
    with pytest.raises(ValueError, match="no split 'fold1'; it has train, validation, test"):
        open_source(DataConfig(str(path), split="fold1"))
    with pytest.raises(ValueError, match="leave out hold_out"):
        open_source(DataConfig(str(path), hold_out=0.1))
    changes = {"splits": [f"{name}=0.1" for name in "abcdefghij"], "group_by": "take."}
    with pytest.raises(ValueError, match="too few original recordings for the split e"):
        open_source(DataConfig(str(write_settings(**changes))))


def test_a_table_without_rows_is_named(write_settings, tmp_path):
    (tmp_path / "empty.csv").write_text("path,label\n")
    with pytest.raises(ValueError, match=r"empty\.csv has too few original recordings for the split train"):
        open_source(DataConfig(str(write_settings(sounds="empty.csv", group_by="take."))))


def test_names_that_group_by_does_not_match_are_originals_and_named(write_settings, caplog):
    pools = open_scene_pools(read_settings(write_settings(group_by=r"(?:low|middle)/(take\d)")))
    assert "does not match 8 of 24 names, such as 'high/take0-0.flac'" in caplog.text
    groups = {group for pool in pools.values() for group in pool.mixer.sounds.groups}
    assert {name for name in groups if name.startswith("high/")} == {
        f"high/take{take}-{i}.flac" for take in range(4) for i in range(2)
    }


@pytest.mark.parametrize("clips", [1, 10, 11, 14, 25])
def test_the_splits_have_the_number_of_scenes_together(write_settings, clips):
    pools = open_scene_pools(read_settings(write_settings(clips=clips, splits=["a=0.7", "b=0.15", "c=0.15"])))
    counts = [pool.num_scenes for pool in pools.values()]
    assert sum(counts) == clips
    assert abs(counts[0] - 0.7 * clips) < 1


def test_paths_in_the_settings_are_relative_to_their_file(write_settings, sounds, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    monkeypatch.chdir(tmp_path / "deep")
    relative = os.path.relpath(sounds, tmp_path)
    settings = read_settings(write_settings(sounds=relative))
    assert open_scene_pools(settings)["train"].mixer.labels == CLASSES
    assert replace(settings, sounds=str(sounds)) == SceneSettings(
        sounds=str(sounds), clips=24, seconds=0.5, max_sources=2, splits=SPLITS
    )

"""Cached features equal the model's, are reused while nothing changes, and are complete or absent."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from modeling_sslam.common.audio import read_waveform
from training.data.config import DataConfig, DataError
from training.data.sources import open_source
from training.linear import features as features_module
from training.linear.features import (
    FEATURE_POOLINGS,
    cached_features,
    cached_tokens,
    check_room,
    data_digest,
    pooled_states,
    read_features,
)

SIZES, MAX_LENGTH = (5, 4), 48


@pytest.fixture
def feature_extractor():
    return SSLAMFeatureExtractor(num_mel_bins=32, max_length=MAX_LENGTH)


@pytest.fixture
def encoder(tiny_config):
    return SSLAMModel(tiny_config).eval()


@pytest.fixture
def data(tmp_path, encode):
    """Nine unsorted clips in two shards, of 0.2 to 0.6 s. The model reads 0.5 s."""
    folder = tmp_path / "data"
    folder.mkdir()
    for shard, size in enumerate(SIZES):
        rows = [
            {
                "id": f"clip{(7 * (i + 10 * shard)) % 31:02d}",
                "audio": {"bytes": encode(i + 10 * shard, 0.2 + 0.1 * i), "path": None},
                "labels": [f"class {i % 3}"] if i else [],
                "num_sources": i % 3,
            }
            for i in range(size)
        ]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"train-{shard:05d}-of-00002.parquet")
    return DataConfig(str(folder), num_workers=0, label_column="labels", group_column="num_sources")


@pytest.fixture
def cache(tmp_path, encoder, feature_extractor, data):
    """A function that returns the features of the encoder and data, or of others."""

    def cache(data=data, **changes):
        arguments = {
            "encoder": encoder,
            "feature_extractor": feature_extractor,
            "source": open_source(data),
            "cache_dir": tmp_path / "cache",
            "accelerator": Accelerator(),
        }
        return cached_features(**(arguments | changes))

    return cache


@pytest.fixture
def no_extraction(monkeypatch):
    def forbid(*arguments):
        raise AssertionError("features were computed")

    return lambda: monkeypatch.setattr(features_module, "pooled_states", forbid)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_features_equal_the_models_for_each_clip(cache, data, encoder, feature_extractor, batch_size):
    features = cache(batch_size=batch_size)

    assert features.pooled.shape == (sum(SIZES), 4, len(FEATURE_POOLINGS), 32)
    assert features.pooled.dtype == np.float32
    assert features.ids == sorted(features.ids)
    tables = [pq.read_table(path).to_pylist() for path in sorted((features.folder.parents[1] / "data").iterdir())]
    rows = {row["id"]: row for table in tables for row in table}
    assert features.ids == sorted(rows)
    assert features.labels == [rows[id_]["labels"] for id_ in features.ids]
    assert features.groups == [rows[id_]["num_sources"] for id_ in features.ids]
    for id_, pooled in zip(features.ids, features.pooled, strict=True):
        waveform = read_waveform(rows[id_]["audio"]["bytes"], 16_000, max_samples=10**6, min_samples=1, position=0.0)
        # The loader crops a longer clip before the feature extractor subtracts its mean.
        waveform = waveform[: feature_extractor.num_samples(MAX_LENGTH)]
        inputs = feature_extractor(waveform, sampling_rate=16_000, return_tensors="pt")
        with torch.no_grad():
            states = encoder(**inputs, output_hidden_states=True).hidden_states
        expected = np.stack([[s[0, 0], s[0, 1:].mean(0), s[0, 1:].amax(0)] for s in states])
        own = pooled[:, [FEATURE_POOLINGS.index(name) for name in ("cls", "mean", "max")]]
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean", "lin_softmax"])
def test_last_layer_is_what_the_classifier_pools(make_config, pooling):
    """Poolings are compared by name, which checks the order of their axis."""
    model = SSLAMForAudioClassification(make_config(classifier_pooling=pooling, num_labels=5)).eval()
    inputs = torch.randn(3, 64, 32)
    with torch.no_grad():
        pooled = pooled_states(model.sslam, inputs)[:, -1, FEATURE_POOLINGS.index(pooling)]
        logits = model.classifier.dense(model.classifier.layernorm(pooled))
        torch.testing.assert_close(logits, model(inputs).logits, rtol=0, atol=1e-5)


def test_same_model_and_data_are_found_again(cache, tmp_path, encoder, no_extraction):
    first = cache()
    no_extraction()

    SSLAMForAudioClassification(SSLAMConfig(**encoder.config.to_diff_dict())).save_pretrained(tmp_path / "other")
    encoder.save_pretrained(tmp_path / "saved")
    again = cache(encoder=SSLAMModel.from_pretrained(tmp_path / "saved").eval(), batch_size=3)

    assert again.folder == first.folder
    np.testing.assert_array_equal(again.pooled, first.pooled)
    with pytest.raises(AssertionError, match="computed"):
        cache(encoder=SSLAMModel.from_pretrained(tmp_path / "other").eval())


def test_a_change_of_anything_that_determines_features_makes_new_ones(cache, data, encoder, tmp_path, encode):
    folders = [cache().folder, cache(dtype="float16").folder]
    folders.append(cache(feature_extractor=SSLAMFeatureExtractor(num_mel_bins=32, max_length=64)).folder)
    folders.append(cache(feature_extractor=SSLAMFeatureExtractor(num_mel_bins=32, max_length=48, mean=-3.0)).folder)
    with torch.no_grad():
        encoder.encoder.layers[-1].mlp.fc2.bias[3] += 1e-4
    folders.append(cache().folder)
    path = next((tmp_path / "data").iterdir())
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[0]["audio"]["bytes"] = encode(77, 0.2)
    pq.write_table(pa.Table.from_pylist(rows), path)
    changed = cache()
    folders.append(changed.folder)

    assert len(set(folders)) == len(folders)
    before, after = read_features(folders[-2]), changed
    differ = [id_ for id_, a, b in zip(after.ids, before.pooled, after.pooled, strict=True) if not np.allclose(a, b)]
    assert differ == [rows[0]["id"]]


def test_a_changed_file_of_a_listing_makes_new_features(tmp_path, make_folder, cache):
    """The manifest itself does not change."""
    folder = make_folder(3)
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.flac"))
    manifest = tmp_path / "train.tsv"
    manifest.write_text("\n".join([str(folder), *(f"{name}\t0" for name in names)]))
    manifest.with_suffix(".lbl").write_text("".join(f"{name.split('/')[-1][:-5]}\ta,b\n" for name in names))
    data = DataConfig(str(manifest), num_workers=0, label_column="auto")

    first = cache(data=data)
    assert first.ids == names
    assert first.labels == [["a", "b"]] * 3
    assert first.groups is None
    assert cache(data=data).folder == first.folder
    (folder / names[1]).write_bytes((folder / names[0]).read_bytes())
    second = cache(data=data)
    assert second.folder != first.folder
    np.testing.assert_allclose(second.pooled[1], first.pooled[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("listing", ["folder", "table"])
def test_a_changed_recording_makes_new_features_of_scenes(tmp_path, write_sounds, listing):
    """The same names can have other sounds."""
    folder = write_sounds(tmp_path / "sounds")
    (recording, *_) = files = sorted(folder.rglob("*.flac"))
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,label", *(f"{file},{file.parent.name}" for file in files)]))
    settings = tmp_path / "scenes.yaml"
    sounds = folder if listing == "folder" else table
    settings.write_text(f"{{sounds: {sounds}, max_sources: 2, splits: [train=1]}}")
    data = DataConfig(str(settings))
    before = data_digest(open_source(data))
    assert data_digest(open_source(data)) == before
    recording.write_bytes(recording.read_bytes() + b" ")
    assert data_digest(open_source(data)) != before


def test_float16_features_are_the_rounded_float32_ones(cache):
    full, half = cache(), cache(dtype="float16")
    assert half.pooled.dtype == np.float16
    np.testing.assert_array_equal(half.pooled, full.pooled.astype(np.float16))


@pytest.mark.parametrize("killed_in", ["_write_part", "_merge_parts", "publish"])
def test_a_killed_extraction_leaves_no_features(cache, monkeypatch, tmp_path, killed_in):
    original = getattr(features_module, killed_in)

    def killed(*arguments):
        if killed_in != "publish":
            original(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(features_module, killed_in, killed)
    with pytest.raises(KeyboardInterrupt):
        cache()
    assert not [path for path in (tmp_path / "cache").iterdir() if not path.name.startswith(".")]
    monkeypatch.setattr(features_module, killed_in, original)
    features = cache()
    assert len(features.ids) == sum(SIZES)
    assert sorted(path.name for path in features.folder.iterdir()) == ["clips.json", "features.npy", "key.json"]
    assert [path for path in (tmp_path / "cache").iterdir() if not path.name.endswith(".lock")] == [features.folder]


def test_the_error_names_clips_whose_features_are_not_finite(cache, encoder):
    with torch.no_grad():
        encoder.encoder.layers[1].mlp.fc1.weight[0, 0] = torch.nan
    with pytest.raises(DataError, match=r"clip.*not finite"):
        cache()


def test_names_must_be_unique(cache, data, tmp_path):
    path = next((tmp_path / "data").iterdir())
    rows = pq.read_table(path).to_pylist()
    rows[1]["id"] = rows[0]["id"]
    pq.write_table(pa.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=f"{rows[0]['id']}.*twice.*id_column"):
        cache()


def test_unusable_clips_are_counted(cache, tmp_path):
    path = next((tmp_path / "data").iterdir())
    rows = pq.read_table(path).to_pylist()
    rows[1]["audio"]["bytes"] = b"no sound"
    pq.write_table(pa.Table.from_pylist(rows), path)
    features = cache()
    assert len(features.ids) == sum(SIZES) - 1
    assert rows[1]["id"] not in features.ids
    assert sum(features.skipped.values()) == 1


def test_files_of_several_processes_are_merged(cache, data, encoder, feature_extractor, tmp_path):
    """One of the processes has no clips."""
    whole = cache()
    folder = tmp_path / "parts"
    folder.mkdir()
    shape, ids = whole.pooled.shape[1:], whole.ids
    for part, rows in enumerate([[4, 0, 8], [], [7, 1, 2, 6, 3, 5]]):
        path = folder / f"part-{part:05d}"
        path.with_suffix(".bin").write_bytes(whole.pooled[rows].tobytes())
        content = {"shape": shape, "dtype": "float32", "skipped": {"silent": part}, "groups": rows}
        content["group_column"] = "num_sources"
        content |= {"ids": [ids[i] for i in rows], "labels": [whole.labels[i] for i in rows]}
        path.with_suffix(".json").write_text(json.dumps(content))
    features_module._merge_parts(folder, 3, "data")
    merged = read_features(folder)
    assert merged.ids == ids
    assert merged.labels == whole.labels
    assert merged.groups == list(range(9))
    assert merged.skipped == {"silent": 3}
    np.testing.assert_array_equal(merged.pooled, whole.pooled)


def test_patch_tokens_equal_the_models(cache, encoder, feature_extractor, data, tmp_path):
    features = cache()
    source, accelerator = open_source(data), Accelerator()
    arguments = (features, encoder, feature_extractor, source, tmp_path / "cache", accelerator)
    tokens = cached_tokens(*arguments, layers=[1, 3], batch_size=4, max_bytes=2**20)
    assert tokens.ids == features.ids
    assert tokens.token_layers == (1, 3)
    assert tokens.tokens.dtype == np.float16
    assert tokens.tokens.shape[:2] == (sum(SIZES), 2)
    mean = tokens.tokens.astype(np.float32).mean(2)
    np.testing.assert_allclose(mean, features.pooled[:, [1, 3], FEATURE_POOLINGS.index("mean")], atol=2e-3)
    deviation = tokens.tokens.astype(np.float32).std(2)
    np.testing.assert_allclose(deviation, features.pooled[:, [1, 3], FEATURE_POOLINGS.index("std")], atol=2e-3)
    again = cached_tokens(*arguments, layers=[1, 3], batch_size=2, max_bytes=2**20)
    np.testing.assert_array_equal(again.tokens, tokens.tokens)


def test_patch_tokens_that_take_too_much_room_are_refused(cache, encoder, feature_extractor, data, tmp_path):
    features = cache()
    arguments = (features, encoder, feature_extractor, open_source(data), tmp_path / "cache", Accelerator())
    folders = set((tmp_path / "cache").iterdir())
    with pytest.raises(ValueError, match=r"9 clips \(2 layers, \d+ patches, width 32\) take .*token_cache_gib"):
        cached_tokens(*arguments, layers=[1, 3], batch_size=4, max_bytes=100)
    assert set((tmp_path / "cache").iterdir()) == folders
    with pytest.raises(ValueError, match=r"GiB free\. Name another cache_dir"):
        check_room(10**9, (4, 512, 768), tmp_path / "new" / "cache", max_bytes=float("inf"))

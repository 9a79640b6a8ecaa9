"""Faults that were once found: embedding folders, outputs with odd names, broken models and the page."""

import csv
import io
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import datasets
import gradio
import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient
from transformers import pipeline

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from modeling_sslam.__main__ import main
from modeling_sslam.common.text import escape_controls, escape_undecodable, unescape_undecodable
from modeling_sslam.inference import Embedder, EventSettings, InferenceError, SSLAMTagger, embed
from modeling_sslam.inference.commands.app.listening import Listener
from modeling_sslam.inference.commands.app.page import make_page, serve, timeline_html
from modeling_sslam.inference.commands.app.protection import is_loopback, middleware
from modeling_sslam.inference.embedding import shards
from modeling_sslam.inference.embedding.folder import Processes, embed_to_folder
from modeling_sslam.inference.timeline.events import Event
from modeling_sslam.inference.timeline.formats import FORMATS
from modeling_sslam.inference.timeline.timeline import Timeline

pytestmark = pytest.mark.slow

# Labels that a file format or a terminal could misunderstand. Some differ in one such character only.
ODD_LABELS = ["a b", "a_b", "a  b", " a b", "a\nb", r"a\nb", "tab\there", "cr\rhere", "next\x85line", "\x1b[31mred"]
ODD_LABELS += [
    "c1 \x9b31m",
    'say "hi", please',
    "pipe|pipe",
    "`code` <b>",
    "\u2028line",
    "\u202eleft",
    r"a\u0020b",
    "",
]


@pytest.fixture(scope="module")
def save_model(make_config, tmp_path_factory) -> Callable[..., str]:
    """Return a function that saves a tiny model, changed by a function, with windows of 0.64 s."""

    def save(model_class: type = SSLAMModel, change: Callable = lambda model: None, **config) -> str:
        folder = tmp_path_factory.mktemp("model")
        torch.manual_seed(0)
        model = model_class(make_config(**config))
        with torch.no_grad():
            change(model)
        model.save_pretrained(folder)
        SSLAMFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="module")
def encoder(save_model) -> str:
    return save_model()


@pytest.fixture(scope="module")
def embedder(encoder) -> Embedder:
    return Embedder.from_pretrained(encoder, device="cpu", batch_size=4)


def write_noise(path: Path | bytes, seed: int, seconds: float = 0.4) -> None:
    noise = np.random.default_rng(seed).normal(scale=0.1, size=round(seconds * 16_000)).astype(np.float32)
    with open(path, "wb") as file:
        soundfile.write(file, noise, 16_000, format="WAV", subtype="FLOAT")


@pytest.fixture
def recordings(tmp_path) -> Path:
    """Write four recordings: `long.wav` has ten windows, the others have one."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for seed, name in enumerate(("a", "b", "c")):
        write_noise(folder / f"{name}.wav", seed)
    write_noise(folder / "long.wav", 3, seconds=6.4)
    return folder


def rows_of(out: Path) -> dict[tuple[str, float], np.ndarray]:
    """Return the vectors by name and start. No row may appear twice."""
    table = pq.read_table(out / "data").to_pylist()
    rows = {(row.get("path", row.get("row")), row["start"]): np.array(row["embedding"]) for row in table}
    assert len(rows) == len(table)
    return rows


def assert_holds(out: Path, recordings: Path, embedder: Embedder) -> None:
    """Assert that a folder holds the embeddings of the recordings as they are now and no other rows."""
    rows = rows_of(out)
    expected = {(escape_undecodable(c.name), c.start): c.embedding for c in embed(recordings, embedder)}
    assert rows.keys() == expected.keys()
    for place, vector in expected.items():
        np.testing.assert_allclose(rows[place], vector, atol=1e-5)


# A second call after files were changed or removed (A16, E2).


def change(path: Path, how: str) -> None:
    """Give a recording other content, which shows in its size or its time of change alone."""
    before = path.stat()
    write_noise(path, 99, seconds=0.5 if how == "size" else 0.4)
    if how == "size":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        # Older than before, as after `cp -p` or unpacking an archive.
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns - 1))
        assert path.stat().st_size == before.st_size


@pytest.mark.parametrize("how", ["size", "time"])
@pytest.mark.parametrize("shard_rows", [None, 4])
def test_a_changed_file_is_embedded_anew(embedder, recordings, tmp_path, how, shard_rows):
    out, sources = tmp_path / "out", [str(recordings)]
    embed_to_folder(sources, out, embedder, "m", shard_rows=shard_rows)
    change(recordings / "b.wav", how)
    summary = embed_to_folder(sources, out, embedder, "m", shard_rows=shard_rows)
    assert summary.changed == [str(recordings / "b.wav")]
    assert_holds(out, recordings, embedder)
    before = {path: path.read_bytes() for path in (out / "data").iterdir()}
    assert embed_to_folder(sources, out, embedder, "m").changed == []
    assert {path: path.read_bytes() for path in (out / "data").iterdir()} == before


def test_a_changed_recording_in_several_shards_leaves_no_row_behind(embedder, recordings, tmp_path):
    out, sources = tmp_path / "out", [str(recordings)]
    embed_to_folder(sources, out, embedder, "m", shard_rows=4)
    assert len(list((out / "data").iterdir())) > 2
    write_noise(recordings / "long.wav", 7, seconds=3.0)
    embed_to_folder(sources, out, embedder, "m")
    assert_holds(out, recordings, embedder)


def test_a_recording_that_changes_between_a_stop_and_the_next_call(embedder, recordings, tmp_path):
    """The first windows are in the folder. The rest must not be added from another recording."""
    out, sources = tmp_path / "out", [str(recordings / "long.wav")]
    assert embed_to_folder(sources, out, embedder, "m", should_stop=lambda: True).stopped
    write_noise(recordings / "long.wav", 7, seconds=6.4)
    embed_to_folder(sources, out, embedder, "m")
    assert_holds(out, recordings / "long.wav", embedder)


def test_several_processes_embed_changed_files_anew(embedder, recordings, tmp_path):
    out, plan = tmp_path / "out", []
    embed_to_folder([str(recordings)], out, embedder, "m", shard_rows=4)
    for name in ("a", "long"):
        write_noise(recordings / f"{name}.wav", 50, seconds=2.0)

    def broadcast(value):
        plan.append(value)
        return plan[0]

    for rank in range(2):
        embed_to_folder(
            [str(recordings)], out, embedder, "m", processes=Processes(rank, 2, "cpu", lambda: None, broadcast)
        )
    assert_holds(out, recordings, embedder)


@pytest.mark.parametrize("step", range(8))
def test_a_kill_while_old_rows_are_dropped(embedder, recordings, tmp_path, monkeypatch, step):
    """The call ends before or after any of the renames; the next call completes the folder."""
    out, sources = tmp_path / "out", [str(recordings)]
    embed_to_folder(sources, out, embedder, "m", shard_rows=4)
    unchanged = rows_of(out)
    for name in ("b", "long"):
        write_noise(recordings / f"{name}.wav", 60, seconds=4.0)
    publish, calls = shards.publish, []

    class Killed(BaseException):
        pass

    def killed_publish(temporary, target):
        if len(calls) == step // 2:
            if step % 2:
                publish(temporary, target)
            raise Killed
        calls.append(target)
        publish(temporary, target)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "publish", killed_publish)
        # A killed process removes nothing.
        patch.setattr(shards, "remove", lambda path: None)
        with pytest.raises(Killed):
            embed_to_folder(sources, out, embedder, "m", shard_rows=4)
    kept = rows_of(out)
    for name in ("a", "c"):
        place = (str(recordings / f"{name}.wav"), 0.0)
        np.testing.assert_array_equal(kept[place], unchanged[place])
    embed_to_folder(sources, out, embedder, "m", shard_rows=4)
    assert_holds(out, recordings, embedder)
    assert not list((out / "data").glob(".*"))


def test_removed_files_are_reported_and_pruned_on_request(encoder, embedder, recordings, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["embed", str(recordings), "--model", encoder, "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    before = rows_of(out)
    (recordings / "b.wav").unlink()
    os.symlink("nowhere", recordings / "b.wav")
    (recordings / "long.wav").unlink()
    capsys.readouterr()
    assert main([*command[:1], str(recordings / "a.wav"), *command[2:]]) == 0
    report = f"no longer exist: {recordings / 'b.wav'}, {recordings / 'long.wav'}; their rows stay, unless --prune"
    assert report in capsys.readouterr().err
    assert rows_of(out).keys() == before.keys()
    (recordings / "b.wav").unlink()
    assert main([*command, "--prune"]) == 0
    assert "their rows were dropped" in capsys.readouterr().err
    assert_holds(out, recordings, embedder)


def test_pruning_keeps_files_of_other_calls_and_files_that_cannot_be_looked_up(
    embedder, recordings, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    embed_to_folder([str(recordings)], out, embedder, "m")
    stat = os.stat

    def forbidden(path, *args, **kwargs):
        if str(path).endswith("b.wav"):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", forbidden)
        summary = embed_to_folder([str(recordings / "a.wav")], out, embedder, "m", prune=True)
    assert (summary.removed, summary.num_sounds) == ([], 4)
    assert_holds(out, recordings, embedder)


def test_shards_without_stamps_stay(embedder, recordings, tmp_path, monkeypatch):
    """Shards of earlier versions have no sizes and times of the files."""
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(shards, "STAMPS_KEY", b"other")
        embed_to_folder([str(recordings)], out, embedder, "m")
    before = rows_of(out)
    write_noise(recordings / "a.wav", 5, seconds=0.5)
    assert embed_to_folder([str(recordings)], out, embedder, "m").changed == []
    assert rows_of(out).keys() == before.keys()


def test_a_data_set_has_no_files_to_change(encoder, embedder, recordings, tmp_path, write_audio_parquet, capsys):
    folder = write_audio_parquet(sorted(recordings.iterdir()))
    command = ["embed", str(folder), "--model", encoder, "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()}
    os.utime(next(folder.rglob("*.parquet")), (1, 1))
    assert main(command) == 0
    assert "no longer exist" not in capsys.readouterr().err
    assert main([*command, "--prune"]) == 1
    assert "not those of a data set; leave out --prune" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "out" / "data").iterdir()} == before


@pytest.mark.parametrize("removed", [0, 1, 2])
def test_names_of_shards_do_not_depend_on_their_number(embedder, recordings, tmp_path, removed):
    out, names = tmp_path / "out", ("a", "b", "c")
    for name in names:
        embed_to_folder([str(recordings / f"{name}.wav")], out, embedder, "m")
    paths = sorted((out / "data").iterdir())
    paths.pop(removed).unlink()
    others = {path: path.read_bytes() for path in paths}
    for name in names:
        embed_to_folder([str(recordings / f"{name}.wav")], out, embedder, "m")
    assert {path: path.read_bytes() for path in others} == others
    assert {name for name, _ in rows_of(out)} == {str(recordings / f"{name}.wav") for name in names}


def test_a_renamed_shard_does_not_end_the_next_call(embedder, recordings, tmp_path):
    out = tmp_path / "out"
    embed_to_folder([str(recordings / "a.wav")], out, embedder, "m")
    (shard,) = (out / "data").iterdir()
    shard.rename(out / "data" / "embeddings-mine.parquet")
    embed_to_folder([str(recordings)], out, embedder, "m")
    assert_holds(out, recordings, embedder)


# The disk (D7, D8).


def test_files_have_the_mode_of_the_umask(embedder, recordings, tmp_path):
    out = tmp_path / "out"
    (recordings / "broken.wav").write_bytes(b"")
    before = os.umask(0o002)
    try:
        embed_to_folder([str(recordings)], out, embedder, "m", shard_rows=4)
        write_noise(recordings / "b.wav", 5, seconds=0.5)
        embed_to_folder([str(recordings)], out, embedder, "m")
    finally:
        os.umask(before)
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"settings.json", "README.md", "failures.csv"} < {path.name for path in files}
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {p.name: "0o664" for p in files}


@pytest.mark.parametrize("limit", [300, 2_000, 4_500, 10_000])
def test_a_full_disk_is_one_line_and_leaves_no_temporary_files(encoder, embedder, recordings, tmp_path, capsys, limit):
    """A limit on file sizes stands in for the full disk. The settings and the first small shard fit."""
    out = tmp_path / "out"
    command = ["embed", str(recordings / "a.wav"), "--model", encoder, "--out", str(out), "--device", "cpu"]
    assert main(command) == 0
    before = rows_of(out)
    write_noise(recordings / "b.wav", 8, seconds=60.0)
    command[1] = str(recordings)
    capsys.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        status = main(command)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    errors = [line for line in capsys.readouterr().err.splitlines() if "Embedding" not in line and line.strip()]
    assert status == 1
    assert len(errors) == 1
    assert re.search(r"error: .* cannot be written \(.*File too large.*Make room", errors[0])
    assert not list(out.rglob(".tmp*"))
    assert rows_of(out).keys() == before.keys()
    assert main(command) == 0
    assert_holds(out, recordings, embedder)


# Recordings in memory (A17).


def test_embed_takes_recordings_and_data_sets(embedder, recordings):
    path, other = str(recordings / "a.wav"), str(recordings / "b.wav")
    samples, rate = soundfile.read(path, dtype="float32")
    second, _ = soundfile.read(other, dtype="float32")
    (one,), (two,) = (list(embed(name, embedder)) for name in (path, other))
    assert not np.allclose(one.embedding, two.embedding, atol=1e-3)
    encoded = Path(path).read_bytes()
    dataset = datasets.Dataset.from_dict({"audio": [path, other]}).cast_column("audio", datasets.Audio())
    in_memory = {"array": samples, "sampling_rate": rate}
    for source, names in (
        (samples, ["0"]),
        (torch.from_numpy(samples), ["0"]),
        (np.stack([samples, samples]), ["0"]),
        (in_memory, ["0"]),
        ({"raw": samples, "sampling_rate": rate}, ["0"]),
        (in_memory | {"path": "x/y.wav"}, ["x/y.wav"]),
        (encoded, ["0"]),
        ({"bytes": encoded, "path": "z.wav"}, ["z.wav"]),
        ({"bytes": None, "path": path}, [path]),
        ([samples, second], ["0", "1"]),
        ((clip for clip in (in_memory, second)), ["0", "1"]),
        (np.array([path, other]), [path, other]),
        (dataset, ["a.wav", "b.wav"]),
        (dataset.with_format("torch"), ["a.wav", "b.wav"]),
        (dataset.select([0]), ["a.wav"]),
        (dataset.cast_column("audio", datasets.Audio(decode=False)), ["a.wav", "b.wav"]),
        (dataset.add_column("id", ["u", "v"]), ["u", "v"]),
        (dataset.to_iterable_dataset(num_shards=2), ["a.wav", "b.wav"]),
        (dataset.to_iterable_dataset(num_shards=2).take(1), ["a.wav"]),
        (datasets.Dataset.from_dict({"audio": [in_memory]}), ["0000000"]),
    ):
        clips = list(embed(source, embedder))
        assert [clip.name for clip in clips] == names
        for clip, expected in zip(clips, (one, two), strict=False):
            np.testing.assert_allclose(clip.embedding, expected.embedding, atol=1e-5)


def test_embed_names_the_forms_that_it_takes(embedder, recordings):
    path = str(recordings / "a.wav")
    dataset = datasets.Dataset.from_dict({"audio": [path]}).cast_column("audio", datasets.Audio())
    for source, message in (
        (3, "int cannot be embedded; pass paths"),
        (None, "NoneType cannot be embedded"),
        (io.BytesIO(b""), "BytesIO cannot be embedded"),
        ([0.1, 0.2], "not float"),
        ([path, np.zeros(16_000)], "ndarray is among paths"),
        (datasets.DatasetDict({"train": dataset, "test": dataset}), "splits train, test; pass one"),
        (datasets.Dataset.from_dict({"x": [1]}), "no audio columns"),
        (datasets.IterableDataset.from_generator(lambda: iter([{"audio": path}])), "with `features`"),
    ):
        with pytest.raises(InferenceError, match=message):
            list(embed(source, embedder))


# Names and labels that an output cannot hold (A11, D11).


def test_escapes_keep_different_texts_different():
    texts = ["", "\\", "\\\\", "n", "\n", r"\n", r"\\n", "\\\n", "\udce9", r"\udce9", "\\\udce9", r"\\udce9", "\x1b"]
    texts += [r"\x1b", "é", "\x9b", r"\x9b", "C:\\new", "\u2028", r"\u2028", "a b"]
    for escape in (escape_controls, escape_undecodable):
        escaped = [escape(text) for text in texts]
        assert len(set(escaped)) == len(texts)
        assert [text.encode().decode() for text in escaped] == escaped
    assert all(unescape_undecodable(escape_undecodable(text)) == text for text in texts)
    assert escape_controls("a\x1b[0m\n\udce9") == r"a\x1b[0m\n\udce9"


def test_files_whose_names_are_not_utf_8_are_embedded(encoder, embedder, recordings, tmp_path, capsys):
    odd = [b"caf\xe9.wav", b"caf\\udce9.wav", b"\xff\n.wav"]
    for seed, name in enumerate(odd):
        write_noise(os.fsencode(recordings) + b"/" + name, 20 + seed)
    write_noise(os.fsencode(recordings) + b"/broken\xe9.wav", 0)
    os.truncate(os.fsencode(recordings) + b"/broken\xe9.wav", 0)
    out = tmp_path / "out"
    command = ["embed", str(recordings), "--model", encoder, "--out", str(out), "--device", "cpu"]
    assert main(command) == 1
    assert r"broken\udce9.wav: empty" in capsys.readouterr().err
    with open(out / "failures.csv", encoding="utf-8", newline="") as file:
        assert [row["path"] for row in csv.DictReader(file)] == [rf"{recordings}/broken\udce9.wav"]
    names = {Path(name).name for name, _ in rows_of(out)}
    assert {r"caf\udce9.wav", r"caf\\udce9.wav", "\\udcff\n.wav"} < names
    os.unlink(os.fsencode(recordings) + b"/broken\xe9.wav")
    before = {path: path.read_bytes() for path in (out / "data").iterdir()}
    # The next call finds files of odd names again, even if it does not name them.
    assert main([*command[:1], str(recordings / "a.wav"), *command[2:], "--prune"]) == 0
    assert main(command) == 0
    assert {path: path.read_bytes() for path in (out / "data").iterdir()} == before
    assert_holds(out, recordings, embedder)
    os.unlink(os.fsencode(recordings) + b"/caf\xe9.wav")
    assert main([*command, "--prune"]) == 0
    assert rf"{recordings}/caf\udce9.wav; their rows were dropped" in capsys.readouterr().err
    assert_holds(out, recordings, embedder)


@pytest.fixture(scope="module")
def odd_model(save_model) -> str:
    """Return a classifier with odd labels, all of which are present in every clip."""
    labels = dict(enumerate(ODD_LABELS))
    return save_model(
        SSLAMForAudioClassification,
        lambda model: model.classifier.dense.bias.fill_(5),
        id2label=labels,
        label2id={label: index for index, label in labels.items()},
        problem_type="multi_label_classification",
    )


def assert_no_controls(text: str) -> None:
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)


def test_timelines_of_odd_names_and_labels(odd_model, tmp_path, capsys):
    recording = tmp_path / os.fsdecode(b"caf\xe9\x1b[31m \n.wav")
    write_noise(recording, 0)
    outputs = [tmp_path / os.fsdecode(b"\xe9." + suffix) for suffix in (b"csv", b"txt", b"rttm", b"jams")]
    options = ["--window", "0.4", "--hop", "0.4", "--model", odd_model, "--device", "cpu", "--format", "table"]
    files = ["--out", *map(str, outputs), "--scores", str(tmp_path / "scores.csv"), "--plot", str(tmp_path / "p.png")]
    assert main(["timeline", str(recording), *options, *files]) == 0
    table, err = capsys.readouterr()
    assert "warning" not in err.lower()
    with open(outputs[0], encoding="utf-8", newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ODD_LABELS
    with open(tmp_path / "scores.csv", encoding="utf-8", newline="") as file:
        header, *scores = csv.reader(file)
    assert header == ["start", "end", *ODD_LABELS]
    assert [len(row) for row in scores] == [len(header)]

    lines = outputs[1].read_bytes().decode().split("\n")[:-1]
    audacity = [line.split("\t") for line in lines]
    assert [len(line) for line in audacity] == [3] * len(ODD_LABELS)
    assert [line[2] for line in audacity] == [escape_controls(label) for label in ODD_LABELS]
    for line in lines:
        assert_no_controls(line.replace("\t", " "))

    rttm = [line.split(" ") for line in outputs[2].read_bytes().decode().split("\n")[:-1]]
    assert [len(line) for line in rttm] == [10] * len(ODD_LABELS)
    words = [line[7] for line in rttm]
    assert len(set(words)) == len(ODD_LABELS)
    assert words[:2] == [r"a\u0020b", "a_b"]
    assert words[5] == r"a\\nb"
    assert rttm[0][1] == r"caf\udce9\x1b[31m_\n"

    jams = json.loads(outputs[3].read_bytes().decode())
    assert [entry["value"] for entry in jams["annotations"][0]["data"]] == ODD_LABELS
    assert jams["file_metadata"]["identifiers"]["path"] == escape_undecodable(str(recording))

    rows = table.split("\n")[1:-1]
    assert [row[29:] for row in rows] == [escape_controls(label) for label in ODD_LABELS]
    assert_no_controls(table)


def test_spaces_in_rttm_stay_underscores_where_nothing_merges():
    labels = ["Acoustic guitar", "organ_chord", "one", "\ttwo words "]
    events = [Event(0.0, 1.0, label, 0.5) for label in labels]
    timeline = Timeline(events, labels, 1.0, 1.0, 1.0, EventSettings(), np.zeros(1), path="my night.wav")
    rttm = [line.split(" ") for line in FORMATS["rttm"](timeline).splitlines()]
    assert [line[7] for line in rttm] == ["Acoustic_guitar", "organ_chord", "one", r"\ttwo_words"]
    assert {line[1] for line in rttm} == {"my_night"}


@pytest.mark.parametrize("file_format", ["table", "csv", "jsonl"])
def test_tags_of_odd_names_and_labels(odd_model, tmp_path, capsys, file_format):
    for name in ("a\x1b[31m\nb.wav", "empty\x1b.wav"):
        write_noise(tmp_path / name, 0)
    os.truncate(tmp_path / "empty\x1b.wav", 0)
    command = ["tag", str(tmp_path), "--model", odd_model, "--device", "cpu", "--top-k", "99", "--format", file_format]
    assert main(command) == 1
    out, err = capsys.readouterr()
    assert_no_controls(err)
    path = str(tmp_path / "a\x1b[31m\nb.wav")
    if file_format == "csv":
        rows = list(csv.DictReader(io.StringIO(out, newline="")))
        assert {row["path"] for row in rows} == {path}
        assert sorted(row["label"] for row in rows) == sorted(ODD_LABELS)
    elif file_format == "jsonl":
        (result,) = map(json.loads, out.split("\n")[:-1])
        assert result["path"] == path
        assert sorted(entry["label"] for entry in result["labels"]) == sorted(ODD_LABELS)
    else:
        assert_no_controls(out)
        heading, *rows = out.split("\n")[:-1]
        assert heading.startswith(rf"{tmp_path}/a\x1b[31m\nb.wav  (")
        assert sorted(row[9:] for row in rows) == sorted(map(escape_controls, ODD_LABELS))


def test_the_card_shows_odd_names_as_they_are(embedder, recordings, tmp_path):
    out = tmp_path / "o\"u't\n```\x1b"
    embed_to_folder([str(recordings)], out, embedder, "mod|el\n# `x` <script>\x1b\udce9")
    card = (out / "README.md").read_text(encoding="utf-8")
    assert_no_controls(card)
    assert r"# Embeddings by mod\|el\\n# \`x\` \<script\>\\x1b\\udce9" in card.splitlines()
    table = pq.read_table(out / "data")
    assert table["model"][0].as_py() == "mod|el\n# `x` <script>\x1b\\udce9"
    # The code of the card reads the folder.
    code = [line for line in card.splitlines() if line.startswith(("table =", "duckdb"))]
    found = subprocess.run(
        [
            sys.executable,
            "-c",
            "\n".join(["import duckdb, pyarrow.parquet as pq", *code[:1], f"print(len(table), {code[1]}.fetchall())"]),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert found.startswith(f"{len(table)} [('{recordings}")


def test_the_page_shows_odd_names_and_labels(odd_model, tmp_path):
    path = tmp_path / os.fsdecode(b"caf\xe9'<i>\n.wav")
    write_noise(path, 0)
    tagger = SSLAMTagger.from_pretrained(odd_model, device="cpu")
    page = make_page(Listener(tagger, 1), "mod`el|\n# x")
    shown = [block.value for block in page.blocks.values() if isinstance(block, gradio.Markdown)]
    assert any(r"mod\`el\|\\n# x knows" in text for text in shown)
    listen = next(function.fn for function in page.fns.values() if function.fn.__name__ == "listen")
    text, scores = listen(str(path), 0.5, 0.5)
    assert len(scores) == 10
    assert scores.keys() <= set(map(escape_controls, ODD_LABELS))
    assert 'download="caf\\udce9&#x27;&lt;i&gt;\\n.csv"' in text
    assert "caf%E9%27%3Ci%3E%0A.wav" in text
    assert_no_controls(text)
    assert timeline_html(str(path), Listener(tagger, 1).analyse(str(path), 0.5, 0.5)) == text
    assert r"bad\x1b" in listen(str(tmp_path / "bad\x1b.wav"), 0.5, 0.5)[0]


# Models whose weights are broken (B7).


@pytest.mark.parametrize(
    ("place", "value", "problem_type"),
    [
        ("classifier.dense.bias", float("nan"), "multi_label_classification"),
        ("classifier.dense.bias", float("inf"), "single_label_classification"),
        ("sslam.encoder.layers.1.mlp.fc1.weight", float("nan"), "single_label_classification"),
        ("sslam.patch_embeddings.projection.bias", float("-inf"), "multi_label_classification"),
    ],
)
def test_broken_weights_are_refused(save_model, recordings, tmp_path, capsys, place, value, problem_type):
    def damage(model):
        dict(model.named_parameters())[place].view(-1)[0] = value

    folder = save_model(SSLAMForAudioClassification, damage, num_labels=3, problem_type=problem_type)
    path, options = str(recordings / "a.wav"), ["--model", folder, "--device", "cpu"]
    results = [tmp_path / "e.csv", tmp_path / "p.png"]
    commands = [
        ["tag", path, "--format", "csv"],
        ["timeline", path, "--window", "0.4", "--hop", "0.2", "--out", str(results[0]), "--plot", str(results[1])],
    ]
    for command in commands:
        assert main([*command, *options]) == 1
        out, err = capsys.readouterr()
        assert "scores are NaN or infinite: its weights are broken" in err
        assert len(err.strip().splitlines()) == 1
        assert out in ("", "path,label,score\n")
    assert not any(result.exists() for result in results)

    listener = Listener(SSLAMTagger.from_pretrained(folder, device="cpu"), 1)
    with pytest.raises(InferenceError, match="scores are NaN"):
        listener.analyse(path, 0.4, 0.5)
    listen = pipeline("long-audio-classification", folder, device="cpu", chunk_length_s=0.4)
    with pytest.raises(InferenceError, match="scores are NaN"):
        listen(path)
    if place.startswith("sslam"):
        with pytest.raises(InferenceError, match="embeddings are NaN"):
            list(embed(path, folder, device="cpu"))
        with pytest.raises(InferenceError, match="embeddings are NaN"):
            listener.similarity(path, path)
        assert main(["embed", path, "--out", str(tmp_path / "out"), *options]) == 1
        assert not list((tmp_path / "out" / "data").iterdir())


# The page refuses other web sites, serves one visitor at a time, and keeps no upload after its end (D10).


class CountingListener(Listener):
    """Listener that counts the calls at work at the same time."""

    running = most = calls = 0
    pause = 0.02

    def _check_length(self, path: str) -> float:
        self.running += 1
        self.calls += 1
        self.most = max(self.most, self.running)
        time.sleep(self.pause)
        try:
            return super()._check_length(path)
        finally:
            self.running -= 1


@pytest.fixture(scope="module")
def classifier(save_model) -> str:
    return save_model(SSLAMForAudioClassification, num_labels=3, problem_type="multi_label_classification")


@pytest.fixture
def served(classifier, tmp_path, monkeypatch) -> Iterator[tuple[httpx.Client, CountingListener, gradio.Blocks]]:
    """Return a client of the page on 127.0.0.1, its listener and the page. Uploads go to `tmp_path / "uploads"`."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    listener = CountingListener(SSLAMTagger.from_pretrained(classifier, device="cpu"), 1)
    page = make_page(listener, "tiny")
    thread = threading.Thread(target=serve, args=(page, 5, "127.0.0.1"))
    thread.start()
    while not (page.is_running and page.local_url):
        assert thread.is_alive()
        time.sleep(0.02)
    try:
        with httpx.Client(base_url=page.local_url, timeout=60) as client:
            yield client, listener, page
    finally:
        page.close(verbose=False)
        thread.join()


def uploads(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_requests_of_other_web_sites_are_refused(served, tmp_path):
    client, _, page = served
    own, port = f"127.0.0.1:{page.server_port}", page.server_port
    evil, local = "evil.example", f"localhost:{port}"
    for headers, status in (
        ({}, 200),
        ({"host": local}, 200),
        ({"host": f"[::1]:{port}"}, 200),
        ({"origin": f"http://{own}"}, 200),
        ({"host": local, "origin": f"http://{local}"}, 200),
        # The attacker's host name points to this machine.
        ({"host": evil}, 400),
        ({"host": f"{evil}:{port}", "origin": f"http://{evil}:{port}"}, 400),
        ({"host": f"127.0.0.1.{evil}:{port}"}, 400),
        ({"host": f"127.0.0.1@{evil}"}, 400),
        # Another site's or another program's page in the same browser.
        ({"origin": f"http://{evil}"}, 403),
        ({"origin": "null"}, 403),
        ({"origin": ""}, 403),
        ({"origin": f"http://{local}"}, 403),
        ({"origin": "http://127.0.0.1:3000"}, 403),
        ({"origin": f"http://{own}@{evil}"}, 403),
        ({"origin": f"http://{evil}", "sec-fetch-site": "cross-site"}, 403),
    ):
        file = {"files": ("x.wav", b"RIFF")}
        before = len(uploads(tmp_path / "uploads"))
        assert client.post("gradio_api/upload", headers=headers, files=file).status_code == status, headers
        assert len(uploads(tmp_path / "uploads")) - before == (status == 200 and before == 0), headers
        for path in ("", "config", "gradio_api/queue/data?session_hash=x"):
            if status != 200:
                assert client.get(path, headers=headers).status_code == status, (path, headers)
        assert status != 200 or client.get("", headers=headers).status_code == 200
    # Of two Origin headers only the first is right.
    request = client.build_request("GET", "", headers=[("origin", f"http://{own}"), ("origin", "http://evil")])
    assert client.send(request).status_code == 403


@pytest.mark.parametrize(("host", "share"), [("0.0.0.0", False), ("192.168.1.5", False), ("127.0.0.1", True)])
def test_pages_for_others_answer_to_any_name_but_to_no_other_site(host, share):
    def answer(request):
        return PlainTextResponse("yes")

    app = Starlette(routes=[Route("/", answer, methods=["GET", "POST"])], middleware=middleware(host, share))
    client = TestClient(app)
    for headers, status in (
        ({"host": "page.example"}, 200),
        ({"host": "page.example", "origin": "https://page.example"}, 200),
        ({"host": "page.example:8080", "origin": "http://page.example:8080"}, 200),
        # A proxy that changes Host.
        ({"host": "10.0.0.7:7860", "origin": "https://page.example", "sec-fetch-site": "same-origin"}, 200),
        ({"host": "page.example", "origin": "https://evil.example"}, 403),
        ({"host": "page.example", "origin": "https://page.example.evil.example"}, 403),
        ({"host": "page.example", "origin": "null", "sec-fetch-site": "same-site"}, 403),
    ):
        assert client.post("/", headers=headers).status_code == status, headers


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        (["127.0.0.1", "127.8.8.8", "::1", "[::1]", "localhost"], True),
        (["0.0.0.0", "::", "10.0.0.1", "example.org"], False),
    ],
)
def test_loopback_addresses(hosts, expected):
    assert [is_loopback(host) for host in hosts] == [expected] * len(hosts)


def upload(client: httpx.Client, path: Path) -> dict[str, object]:
    """Upload a sound and return the value that the page passes to its handlers."""
    (uploaded,) = client.post("gradio_api/upload", files={"files": (path.name, path.read_bytes())}).json()
    return {"path": uploaded, "meta": {"_type": "gradio.FileData"}}


def handler(page: gradio.Blocks, name: str) -> int:
    return next(number for number, function in page.fns.items() if function.fn and function.fn.__name__ == name)


def test_one_call_at_a_time_by_every_route(served, recordings):
    client, listener, page = served
    sound = upload(client, recordings / "a.wav")
    number = handler(page, "compare")
    body = {"data": [sound, sound], "fn_index": number, "session_hash": "s"}

    def all_at_once(call: Callable[[int], int], count: int) -> list[int]:
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(call, range(count)))

    ways = ("gradio_api/run/predict", "gradio_api/api/predict", "gradio_api/run/compare", "gradio_api/run/predict/")
    statuses = all_at_once(lambda index: client.post(ways[index % len(ways)], json=body).status_code, 30)
    assert set(statuses) == {404}
    assert listener.calls == 0

    def join(index: int) -> int:
        return client.post("gradio_api/queue/join", json=body | {"session_hash": f"s{index}"}).status_code

    statuses = all_at_once(join, 30)
    queued = statuses.count(200)
    assert queued >= 10
    deadline = time.monotonic() + 100
    while listener.calls < 2 * queued and time.monotonic() < deadline:
        time.sleep(0.05)
    # Every call reads two sounds.
    assert listener.calls >= 20
    assert listener.most == 1

    # A visitor who goes away frees a place in the queue, while the model is still at work for them.
    listener.pause, before = 0.1, listener.calls
    path = str(recordings / "a.wav")
    all_at_once(lambda index: listener.similarity(path, path) and listener.analyse(path, 0.4, 0.5) and 0, 4)
    assert listener.calls == before + 12
    assert listener.most == 1


@pytest.mark.slow
def test_uploads_end_with_the_page_after_sigterm(classifier, recordings, tmp_path, repository):
    """Unfinished uploads end too, even while a tab is open and the model is at work."""
    folder, log = tmp_path / "uploads", tmp_path / "log"
    write_noise(tmp_path / "long.wav", 0, seconds=20)
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "modeling_sslam", "app", "--model", classifier, "--device", "cpu"],
            env=os.environ | {"GRADIO_TEMP_DIR": str(folder), "PYTHONPATH": str(repository)},
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
        )
    try:
        found = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())
        assert found, log.read_text()
        port = int(found[1])
        with (
            httpx.Client(base_url=found[0], timeout=60) as client,
            socket.create_connection(("127.0.0.1", port)) as raw,
        ):
            sound = upload(client, tmp_path / "long.wav")
            head = "POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999999\r\n"
            head += "Content-Type: multipart/form-data; boundary=b\r\n\r\n--b\r\n"
            head += 'Content-Disposition: form-data; name="files"; filename="half.wav"\r\n\r\nhalf a sound'
            raw.sendall(head.encode() + bytes(100_000))
            with client.stream("GET", "gradio_api/heartbeat/s") as tab:
                assert tab.status_code == 200
                config = client.get("config").json()
                (listen,) = [d["id"] for d in config["dependencies"] if len(d["inputs"]) == 3]
                body = {"data": [sound, 0.5, 0.5], "fn_index": listen, "session_hash": "s"}
                assert client.post("gradio_api/queue/join", json=body).status_code == 200
                while len(uploads(folder)) < 2:
                    time.sleep(0.05)
                private = {path.relative_to(folder).parts[0] for path in uploads(folder)}
                assert [oct((folder / name).stat().st_mode & 0o777) for name in private] == ["0o700"]
                # Launchers send the signal to a process and again to its group.
                process.terminate()
                process.terminate()
                assert process.wait(60) == 0
        assert uploads(folder) == list(folder.glob("sslam-app-*")) == []
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

"""`sslam embed` writes every sound exactly once, however it is interrupted and however often."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import datasets
import duckdb
import faiss
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import soundfile

from modeling_sslam import SSLAMFeatureExtractor, SSLAMModel
from modeling_sslam.__main__ import main
from modeling_sslam.common.files import TEMPORARY_PREFIX
from modeling_sslam.inference import Embedder, InferenceError, embed
from modeling_sslam.inference.embedding.dataset import AudioDataset
from modeling_sslam.inference.embedding.folder import Processes, embed_to_folder
from modeling_sslam.inference.embedding.shards import read_progress

pytestmark = pytest.mark.slow

PATIENCE_SECONDS = 100


@pytest.fixture
def model_folder(make_config, tmp_path):
    SSLAMModel(make_config()).save_pretrained(tmp_path / "model")
    SSLAMFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def recordings(tmp_path):
    """Write a folder of noise: seven clips shorter than a window of 0.64 s and, among them, one of ten windows."""
    folder = tmp_path / "recordings"
    folder.mkdir()
    for number in range(8):
        add_recording(folder, number, seconds=6.4 if number == 3 else 0.4)
    return folder


def add_recording(folder, number, seconds=0.4):
    noise = np.random.default_rng(number).normal(scale=0.1, size=round(seconds * 16_000))
    soundfile.write(folder / f"{number}.wav", noise, 16_000)


def arguments(sources, model, out, *options):
    return ["embed", *map(str, sources), "--model", model, "--out", str(out), "--device", "cpu", *map(str, options)]


def run_embed(sources, model, out, *options):
    return main(arguments(sources, model, out, *options))


@pytest.fixture
def start_embed(repository):
    """Return a function that starts the command in a process group of its own. The group ends with the test."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository), "ACCELERATE_USE_CPU": "true"}
    started = []

    def start_embed(*args, launcher=()):
        process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "modeling_sslam", *arguments(*args)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start_embed
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        process.stdout.close()


def embed_in_turn(num_processes, sources, out, embedder, model):
    """Embed the shares of several processes in turn. Each stops after one batch, unless it is the only process."""
    plan = []

    def broadcast(value):
        plan.append(value)
        return plan[0]

    for rank in range(num_processes):
        processes = Processes(rank, num_processes, "cpu", lambda: None, broadcast)
        embed_to_folder(sources, out, embedder, model, should_stop=lambda: num_processes > 1, processes=processes)


def read_rows(out):
    rows = pq.read_table(out / "data").to_pandas()
    columns = [name for name in ("path", "row", "start", "mel_band", "layer") if name in rows]
    return rows.sort_values(columns, ignore_index=True)


def assert_same_rows(out, expected):
    """Compare vectors up to rounding, which depends on the clips that share a batch."""
    ours, theirs = read_rows(out), read_rows(expected)
    columns = [name for name in theirs.columns if name != "embedding"]
    pd.testing.assert_frame_equal(ours[columns], theirs[columns])
    np.testing.assert_allclose(np.stack(ours["embedding"]), np.stack(theirs["embedding"]), atol=1e-5)


def wait_for(condition, process):
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_command_writes_the_embeddings_of_embed(model_folder, recordings, tmp_path):
    out = tmp_path / "out"
    assert run_embed([recordings], model_folder, out) == 0
    rows, clips = read_rows(out), list(embed(recordings, model_folder, device="cpu"))
    assert list(rows.columns) == ["path", "start", "end", "model", "embedding"]
    assert len(rows) == 17
    assert set(rows["model"]) == {model_folder}
    for (_, row), clip in zip(rows.iterrows(), clips, strict=True):
        assert (row["path"], row["start"], row["end"]) == (clip.name, clip.start, clip.end)
        np.testing.assert_allclose(row["embedding"], clip.embedding, atol=1e-5)
    settings = json.loads((out / "settings.json").read_text())
    assert settings["pooling"] == "cls"
    for shard in (out / "data").iterdir():
        assert json.loads(pq.read_metadata(shard).metadata[b"sslam.settings"]) == settings


def test_rows_for_every_patch_and_layer(model_folder, recordings, tmp_path):
    out, short = tmp_path / "out", recordings / "0.wav"
    run_embed([short], model_folder, out, "--pooling", "patch", "--layer", "all")
    rows = read_rows(out)
    (clip,) = embed(short, model_folder, device="cpu", pooling="patch", layer="all")
    # 38 frames give three patches in time and two bands; the layers are the embeddings' output and three blocks.
    assert len(rows) == 3 * 2 * 4
    for _, row in rows.iterrows():
        step = round(row["start"] / 0.16)
        assert row["start"] == pytest.approx(0.16 * step)
        assert row["end"] == pytest.approx(min(0.16 * (step + 1), clip.end))
        np.testing.assert_allclose(row["embedding"], clip.embedding[row["layer"], step, row["mel_band"]], atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_programs_read_the_table(model_folder, recordings, tmp_path, dtype):
    out = tmp_path / "out"
    run_embed([recordings], model_folder, out, "--dtype-out", dtype, "--shard-rows", 6)
    expected = np.stack([clip.embedding for clip in embed(recordings, model_folder, device="cpu")])
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == "float16" else {"atol": 1e-5}

    dataset = datasets.load_dataset(str(out), split="train", cache_dir=str(tmp_path / "cache"))
    assert dataset.features["embedding"] == datasets.List(datasets.Value(dtype), length=32)
    order = np.lexsort((dataset["start"], dataset["path"]))
    np.testing.assert_allclose(np.asarray(dataset["embedding"])[order], expected, **tolerance)

    frame = pd.read_parquet(out / "data").sort_values(["path", "start"])
    vectors = np.stack(frame["embedding"])
    assert vectors.dtype == dtype
    np.testing.assert_allclose(vectors, expected, **tolerance)

    found = duckdb.sql(f"SELECT embedding FROM '{out}/data/*.parquet' ORDER BY path, start").fetchall()
    np.testing.assert_allclose(np.array(found)[:, 0], expected, **tolerance)

    index = faiss.IndexFlatIP(32)
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    assert index.ntotal == len(expected)


def test_a_second_call_adds_only_what_is_new(model_folder, recordings, tmp_path):
    out = tmp_path / "out"
    run_embed([recordings], model_folder, out)
    (first,) = (out / "data").iterdir()
    before = first.read_bytes()
    add_recording(recordings, 8)
    # Other spellings of a path name the same file.
    assert run_embed([recordings / "0.wav", f"{recordings}/../recordings"], model_folder, out) == 0
    assert first.read_bytes() == before
    added = sorted(set((out / "data").iterdir()) - {first})
    assert [row["path"] for shard in added for row in pq.read_table(shard).to_pylist()] == [str(recordings / "8.wav")]


def test_out_may_lie_among_the_recordings(model_folder, recordings):
    """The Parquet files of an earlier call do not make the folder a data set."""
    out = recordings / "embeddings"
    assert run_embed([recordings], model_folder, out) == 0
    add_recording(recordings, 8)
    assert run_embed([recordings], model_folder, out) == 0
    assert len(read_rows(out)) == 18


def test_stopped_in_a_recording_and_continued(model_folder, recordings, tmp_path):
    """A call may stop after any batch; the next call embeds the rest."""
    embedder = Embedder.from_pretrained(model_folder, device="cpu", batch_size=3)
    expected, out = tmp_path / "expected", tmp_path / "out"
    embed_to_folder([str(recordings)], expected, embedder, model_folder)
    num_calls, stopped = 0, True
    while stopped:
        stopped = embed_to_folder([str(recordings)], out, embedder, model_folder, should_stop=lambda: True).stopped
        num_calls += 1
    assert num_calls >= 17 / 3
    assert_same_rows(out, expected)


def test_processes_that_change_in_number(model_folder, recordings, tmp_path):
    embedder = Embedder.from_pretrained(model_folder, device="cpu", batch_size=2)
    expected, out = tmp_path / "expected", tmp_path / "out"
    embed_to_folder([str(recordings)], expected, embedder, model_folder)
    for count in (3, 2, 4, 1):
        embed_in_turn(count, [str(recordings)], out, embedder, model_folder)
    assert_same_rows(out, expected)


def test_killed_and_continued(start_embed, model_folder, recordings, tmp_path):
    out, expected = tmp_path / "out", tmp_path / "expected"
    options = ("--batch-size", 4, "--shard-rows", 4)
    # Opening a pipe without a writer blocks, so the process is still at work when it is killed. In a folder a pipe is
    # left out, so it is named.
    shutil.move(recordings / "4.wav", tmp_path / "4.wav")
    os.mkfifo(recordings / "4.wav")
    process = start_embed(sorted(recordings.glob("*.wav")), model_folder, out, *options)
    wait_for(lambda: len(list(out.glob("data/*.parquet"))) == 2, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    progress = read_progress(out / "data", "path")
    assert progress.begun == {str(recordings / "3.wav"): 5}
    (recordings / "4.wav").unlink()
    shutil.move(tmp_path / "4.wav", recordings / "4.wav")
    (out / "data" / f"{TEMPORARY_PREFIX}embeddings-0000-00000-00002").write_bytes(b"half a shard")

    assert run_embed([recordings], model_folder, out, *options) == 0
    assert run_embed([recordings], model_folder, expected) == 0
    assert_same_rows(out, expected)
    assert not list((out / "data").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop(start_embed, model_folder, recordings, tmp_path, number):
    out, expected = tmp_path / "out", tmp_path / "expected"
    pipe = recordings / "4.wav"
    pipe.unlink()
    os.mkfifo(pipe)
    process = start_embed(sorted(recordings.glob("*.wav")), model_folder, out, "--batch-size", 4, "--shard-rows", 4)
    wait_for(lambda: len(list(out.glob("data/*.parquet"))) == 2, process)
    process.send_signal(number)
    if number == signal.SIGINT:
        # After a second SIGINT the command does not wait for the decoder that hangs.
        time.sleep(0.5)
        process.send_signal(number)
    while process.poll() is None and number == signal.SIGTERM:
        try:
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            time.sleep(0.05)  # there is no reader at the moment
    printed, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130, printed
    assert len(list(out.glob("data/*.parquet"))) == (3 if number == signal.SIGTERM else 2)

    pipe.unlink()
    add_recording(recordings, 4)
    assert run_embed([recordings], model_folder, out) == 0
    assert run_embed([recordings], model_folder, expected) == 0
    assert_same_rows(out, expected)


def test_two_processes(start_embed, model_folder, recordings, tmp_path):
    out, expected = tmp_path / "out", tmp_path / "expected"
    (recordings / "5.wav").write_bytes(b"no sound")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Without MPI, `accelerate launch --cpu --num_processes 2` starts only one process.
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port)]
    process = start_embed([recordings], model_folder, out, launcher=launcher)
    printed, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 1, printed
    assert (out / "failures.csv").read_text().splitlines()[1].startswith(f"{recordings}/5.wav,undecodable,")
    names = sorted(path.name for path in (out / "data").iterdir())
    assert [name.split("-")[2] for name in names] == ["00000", "00001"]
    assert run_embed([recordings], model_folder, expected) == 1
    assert_same_rows(out, expected)


def test_broken_files_are_listed_and_tried_again(model_folder, recordings, tmp_path, capsys):
    out = tmp_path / "out"
    (recordings / "5.wav").write_bytes(b"")
    samples = np.random.default_rng(0).normal(scale=0.1, size=30 * 16_000)
    soundfile.write(recordings / "6.wav", np.r_[samples, np.nan], 16_000, subtype="FLOAT")
    assert run_embed([recordings], model_folder, out) == 1
    assert f"{recordings}/5.wav: empty" in capsys.readouterr().err
    failures = pd.read_csv(out / "failures.csv")
    assert list(failures.columns) == ["path", "reason", "detail"]
    assert list(failures["reason"]) == ["empty", "not_finite"]

    add_recording(recordings, 5)
    soundfile.write(recordings / "6.wav", samples, 16_000, subtype="FLOAT")
    assert run_embed([recordings], model_folder, out) == 0
    assert not (out / "failures.csv").exists()
    expected = tmp_path / "expected"
    run_embed([recordings], model_folder, expected)
    assert_same_rows(out, expected)


def test_changed_settings_are_refused(model_folder, recordings, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    run_embed([recordings], model_folder, out)
    before = sorted(path.name for path in (out / "data").iterdir())
    assert run_embed([recordings], model_folder, out, "--pooling", "mean", "--window", 0.32) == 1
    message = capsys.readouterr().err
    assert "pooling was 'cls' and is 'mean'" in message
    assert "window was 0.64 and is 0.32" in message

    model = SSLAMModel.from_pretrained(model_folder)
    model.encoder.cls_token.data += 1
    model.save_pretrained(model_folder)
    assert run_embed([recordings], model_folder, out) == 1
    assert "weights_crc32 was" in capsys.readouterr().err

    monkeypatch.chdir(recordings)
    assert run_embed(["."], model_folder, out) == 1
    assert f"by path from {recordings}" in capsys.readouterr().err
    assert before == sorted(path.name for path in (out / "data").iterdir())


def test_a_folder_of_something_else_is_refused(model_folder, recordings, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.parquet").write_bytes(b"")
    embedder = Embedder.from_pretrained(model_folder, device="cpu")
    with pytest.raises(InferenceError, match=r"settings\.json is missing"):
        embed_to_folder([str(recordings)], tmp_path, embedder, "model")


def test_a_missing_shard_is_noticed(model_folder, recordings, tmp_path):
    out = tmp_path / "out"
    options = ("--batch-size", 4, "--shard-rows", 4)
    run_embed([recordings], model_folder, out, *options)
    sorted((out / "data").iterdir())[1].unlink()
    with pytest.raises(InferenceError, match=r"3\.wav, but not all before"):
        read_progress(out / "data", "path")


def test_two_calls_at_once_are_refused(model_folder, recordings, tmp_path):
    out, embedder = tmp_path / "out", Embedder.from_pretrained(model_folder, device="cpu", batch_size=4)

    def another_call():
        with pytest.raises(InferenceError, match="another call"):
            embed_to_folder([str(recordings)], out, embedder, model_folder)
        return False

    assert embed_to_folder([str(recordings)], out, embedder, model_folder, should_stop=another_call).num_sounds == 8


@pytest.mark.parametrize("shards", [1, 3])
def test_a_data_set_by_several_processes(model_folder, recordings, tmp_path, write_audio_parquet, shards):
    folder = write_audio_parquet(sorted(recordings.iterdir()), shards)
    out, expected = tmp_path / "out", tmp_path / "expected"
    assert run_embed([folder], model_folder, expected) == 0
    rows = read_rows(expected)
    assert list(rows["id"].unique()) == [f"{number}.wav" for number in range(8)]
    embedder = Embedder.from_pretrained(model_folder, device="cpu", batch_size=3)
    for count in (2, 1):
        embed_in_turn(count, AudioDataset(str(folder)), out, embedder, model_folder)
    assert_same_rows(out, expected)


def test_a_data_set_saved_to_disk(model_folder, recordings, tmp_path, write_audio_parquet):
    folder = write_audio_parquet(sorted(recordings.iterdir()))
    dataset = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    dataset.cast_column("audio", datasets.Audio(decode=False)).save_to_disk(str(tmp_path / "saved"))
    assert run_embed([tmp_path / "saved"], model_folder, tmp_path / "out") == 0
    assert len(read_rows(tmp_path / "out")) == 17


def test_data_sets_that_cannot_be_read(model_folder, recordings, tmp_path, write_audio_parquet, capsys):
    folder = write_audio_parquet(sorted(recordings.iterdir()))
    assert run_embed([folder], model_folder, tmp_path / "out", "--audio-column", "sound") == 1
    assert "no column 'sound'; it has id, audio" in capsys.readouterr().err
    assert run_embed([folder], model_folder, tmp_path / "out", "--split", "test") == 1
    assert "test" in capsys.readouterr().err
    assert run_embed([folder, recordings], model_folder, tmp_path / "out") == 1
    assert "by itself" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

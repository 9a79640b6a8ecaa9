"""Every kind of source on disk gives each clip once, with its name and labels."""

import io
import json
import shutil
import subprocess
import sys
import tarfile

import datasets
import pyarrow.parquet as pq
import pytest

from training.data.config import DataConfig
from training.data.loader import make_loader
from training.data.sources import open_source
from training.preparation.shards import card_header


def read_all(config, extractor, **kwargs):
    """Return the clips of one pass as {id: (labels, input_values)}."""
    loader = make_loader(open_source(config), extractor, batch_size=3, seed=0, repeat=False, **kwargs)
    clips = {}
    for batch in loader:
        labels = batch.get("labels", [None] * len(batch["ids"]))
        for id_, label, values in zip(batch["ids"], labels, batch["input_values"], strict=True):
            assert id_ not in clips
            clips[id_] = (label, values)
    return clips


def config_for(source, **kwargs):
    return DataConfig(str(source), **({"num_workers": 0, "shuffle_buffer": 4} | kwargs))


NAMES = {f"clip{i:03d}" for i in range(7)}


def test_plain_folder(make_folder, extractor):
    folder = make_folder(7, first="clips")
    (folder / "notes.txt").write_text("not a sound")
    (folder / "._clip000.flac").write_bytes(b"what macOS leaves beside a file")
    clips = read_all(config_for(folder, label_column="label"), extractor)
    assert set(clips) == {f"{'deeper' if i % 2 else 'clips'}/clip{i:03d}.flac" for i in range(7)}
    assert clips["clips/clip000.flac"][0] == ["clips"]
    assert clips["deeper/clip001.flac"][0] == ["deeper"]


def test_manifest(make_folder, extractor, tmp_path):
    folder = make_folder(7)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.flac"))
    manifest = tmp_path / "train.tsv"
    manifest.write_text(f"{folder}\n" + "".join(f"{file}\t4800\n" for file in files))
    (tmp_path / "train.lbl").write_text("".join(f"{file.stem}\t/m/1,/m/{file.stem}\n" for file in files))
    assert set(read_all(config_for(manifest), extractor)) == {str(file) for file in files}
    clips = read_all(config_for(manifest, label_column="labels"), extractor)
    assert clips["deeper/clip001.flac"][0] == ["/m/1", "/m/clip001"]
    (tmp_path / "train.lbl").write_text("".join(f"{file.with_suffix('')}\t{file.stem}\n" for file in files))
    assert read_all(config_for(manifest, label_column="labels"), extractor)["deeper/clip001.flac"][0] == ["clip001"]


def test_a_manifest_whose_labels_are_of_other_clips(make_folder, tmp_path, extractor):
    manifest = tmp_path / "train.tsv"
    manifest.write_text(f"{make_folder(2)}\nclip000.flac\t1\ndeeper/clip001.flac\t1\n")
    (tmp_path / "train.lbl").write_text("clip001\t/m/1\nclip000\t/m/0\n")
    with pytest.raises(ValueError, match=r"train\.lbl does not list the stems"):
        read_all(config_for(manifest, label_column="labels"), extractor)


@pytest.mark.parametrize("typed", [True, False], ids=["audio feature", "plain struct"])
@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "cached"])
def test_parquet_with_the_columns_of_audioset(tmp_path, write_parquet, extractor, monkeypatch, typed, streaming):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_parquet(tmp_path / "data", [4, 3], typed=typed)
    clips = read_all(config_for(tmp_path / "data", streaming=streaming, label_column="human_labels"), extractor)
    assert set(clips) == NAMES
    assert clips["clip004"][0] == ["class 1"]


@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "cached"])
def test_data_sets_of_one_name_are_told_apart(tmp_path, write_parquet, extractor, monkeypatch, streaming):
    """Both folders are called "data" and have the same card; the second has other clips and another column."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for folder, sizes in (("a", [3]), ("b", [5])):
        write_parquet(tmp_path / folder / "data" / "data", sizes)
        (tmp_path / folder / "data" / "README.md").write_text(card_header(["train"]))
    (shard,) = (tmp_path / "b" / "data" / "data").glob("*.parquet")
    table = pq.read_table(shard)
    pq.write_table(table.append_column("extra", [list(range(5))]), shard)
    assert len(read_all(config_for(tmp_path / "a" / "data", streaming=False), extractor)) == 3
    source = open_source(config_for(tmp_path / "b" / "data", streaming=streaming, group_column="extra"))
    assert len(list(source.rows(["extra"]))) == 5


def test_parquet_builder_with_data_files(tmp_path, write_parquet, extractor):
    paths = write_parquet(tmp_path / "data", [4, 3])
    assert set(read_all(config_for("parquet", data_files=[str(paths[1])]), extractor)) == {
        "clip004",
        "clip005",
        "clip006",
    }


@pytest.fixture
def saved(tmp_path, write_parquet):
    write_parquet(tmp_path / "parquet", [7])
    columns = datasets.Dataset.from_parquet(str(tmp_path / "parquet" / "*.parquet"), cache_dir=str(tmp_path / "cache"))
    labels = datasets.ClassLabel(names=["even", "odd"])
    return columns.add_column("parity", [i % 2 for i in range(7)]).cast_column("parity", labels)


def test_save_to_disk(saved, tmp_path, extractor):
    saved.save_to_disk(str(tmp_path / "saved"))
    clips = read_all(config_for(tmp_path / "saved", label_column="parity"), extractor)
    assert set(clips) == NAMES
    assert clips["clip003"][0] == ["odd"]


def test_splits_of_save_to_disk(saved, tmp_path, extractor):
    datasets.DatasetDict(train=saved, test=saved.select([1, 2])).save_to_disk(str(tmp_path / "saved"))
    assert set(read_all(config_for(tmp_path / "saved", split="test"), extractor)) == {"clip001", "clip002"}
    with pytest.raises(ValueError, match="no split 'valid'; it has train, test"):
        read_all(config_for(tmp_path / "saved", split="valid"), extractor)


def test_arrow_shards(saved, tmp_path, extractor):
    saved.save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "arrow").mkdir()
    for path in (tmp_path / "saved").glob("*.arrow"):
        shutil.copy(path, tmp_path / "arrow" / "train-00000-of-00001.arrow")
    assert set(read_all(config_for(tmp_path / "arrow"), extractor)) == NAMES


def test_audiofolder_with_metadata(make_folder, extractor):
    folder = make_folder(7)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*.flac"))
    lines = [json.dumps({"file_name": str(file), "scene": f"scene {file.stem}"}) for file in files]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    clips = read_all(config_for(folder, label_column="scene"), extractor)
    assert set(clips) == {str(file) for file in files}
    assert clips["clip002.flac"][0] == ["scene clip002"]


def write_tar(path, encode, numbers):
    with tarfile.open(path, "w") as archive:
        for i in numbers:
            for name, data in ((f"clip{i:03d}.flac", encode(i)), (f"clip{i:03d}.json", json.dumps({"n": i}).encode())):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("as_builder", [False, True])
def test_webdataset(tmp_path, encode, extractor, as_builder):
    folder = tmp_path / "tars"
    folder.mkdir()
    write_tar(folder / "train-000.tar", encode, range(4))
    write_tar(folder / "train-001.tar", encode, range(4, 7))
    config = config_for("webdataset", data_files=[str(folder / "*.tar")]) if as_builder else config_for(folder)
    assert set(read_all(config, extractor)) == NAMES


def test_the_same_clip_gives_the_same_values_from_every_source(
    tmp_path, write_parquet, make_folder, encode, extractor
):
    write_parquet(tmp_path / "parquet", [3])
    (tmp_path / "tars").mkdir()
    write_tar(tmp_path / "tars" / "train-000.tar", encode, range(3))
    by_folder = {
        id_.removeprefix("deeper/").removesuffix(".flac"): clip[1]
        for id_, clip in read_all(config_for(make_folder(3)), extractor).items()
    }
    for source in ("parquet", "tars"):
        for id_, (_, values) in read_all(config_for(tmp_path / source), extractor).items():
            assert values.equal(by_folder[id_])


def test_errors_name_unknown_columns_and_empty_folders(tmp_path, write_parquet, extractor):
    write_parquet(tmp_path / "data", [2])
    for name in ("audio_column", "id_column", "label_column"):
        with pytest.raises(
            ValueError,
            match=rf"no column 'sound'; (set {name} to .*: |it has )video_id, audio, labels, human_labels",
        ):
            read_all(config_for(tmp_path / "data", **{name: "sound"}), extractor)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="No sound files under"):
        read_all(config_for(tmp_path / "empty"), extractor)
    (tmp_path / "empty.tsv").write_text("/somewhere\n")
    with pytest.raises(ValueError, match="lists no files"):
        read_all(config_for(tmp_path / "empty.tsv"), extractor)


def test_a_table_gives_paths_labels_groups_and_splits(make_folder, extractor):
    folder = make_folder(4)
    paths = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.flac"))
    table = folder / "clips.csv"
    lines = [
        f"{path},{labels},{i % 2},{'train' if i else 'test'}"
        for i, (path, labels) in enumerate(zip(paths, ("a", "b; c", "", "a;b"), strict=True))
    ]
    table.write_text("\n".join(["file_name,labels,num_sources,split", *lines]))
    config = config_for(table, label_column="auto", group_column="auto")
    found = read_all(config, extractor)
    assert {id_: labels for id_, (labels, _) in found.items()} == {
        paths[1]: ["b", "c"],
        paths[2]: [],
        paths[3]: ["a", "b"],
    }
    source = open_source(config)
    assert {row["id"]: row["num_sources"] for row in source.rows(["id", "num_sources"])} == {
        paths[1]: "1",
        paths[2]: "0",
        paths[3]: "1",
    }
    whole = read_all(config_for(table, split="train+test"), extractor)
    assert sorted(whole) == paths
    with pytest.raises(ValueError, match="has no split 'validation'; it has test, train"):
        read_all(config_for(table, split="validation"), extractor)
    table.write_text("sound,labels\nx.wav,a\n")
    with pytest.raises(
        ValueError, match="no column of the usual names; set audio_column to one of those it has: sound"
    ):
        open_source(config_for(table))


def test_splits_are_joined_and_shared_out(tmp_path, write_parquet, extractor):
    for split, first in (("train", [3, 3]), ("test", [4])):
        for path in write_parquet(tmp_path / split, first):
            (tmp_path / "data").mkdir(exist_ok=True)
            path.rename(tmp_path / "data" / path.name.replace("train", split))
    counts = {
        split: len(list(open_source(config_for(tmp_path / "data", split=split)).rows(["video_id"])))
        for split in ("train", "test", "train+test")
    }
    assert counts == {"train": 6, "test": 4, "train+test": 10}
    source = open_source(config_for(tmp_path / "data", split="train+test", num_workers=2))
    per_rank = [
        sum(
            len(batch["ids"])
            for batch in make_loader(source, extractor, batch_size=3, seed=0, rank=rank, world_size=2, repeat=False)
        )
        for rank in range(2)
    ]
    assert sum(per_rank) == 10
    assert min(per_rank) > 0


def test_a_labelled_folder_with_a_subfolder_for_each_split(tmp_path, encode, extractor):
    for split, name in (("train", "dog"), ("train", "cat"), ("validation", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "a.wav").write_bytes(encode(file_format="WAV"))
    found = read_all(config_for(tmp_path, label_column="auto"), extractor)
    assert {id_: labels for id_, (labels, _) in found.items()} == {
        "train/dog/a.wav": ["dog"],
        "train/cat/a.wav": ["cat"],
    }
    # Without labels, all files in the folder are read.
    assert len(read_all(config_for(tmp_path), extractor)) == 3


def test_a_source_is_opened_again_only_for_other_data(tmp_path, write_parquet, extractor):
    """A run reads its validation clips in this way: held-out clips of the same split, or another split."""
    for split in ("train", "test"):
        for path in write_parquet(tmp_path / split, [3]):
            (tmp_path / "data").mkdir(exist_ok=True)
            path.rename(tmp_path / "data" / path.name.replace("train", split))
    source = open_source(config_for(tmp_path / "data"))
    held_out = source.read_as(config_for(tmp_path / "data", hold_out=0.5, held_out=True, crop="head"))
    assert held_out.parts is source.parts
    assert held_out.config.hold_out == 0.5
    other = source.read_as(config_for(tmp_path / "data", split="test"))
    assert other.parts is not source.parts
    assert other.config.split == "test"


PROGRAM = """
import threading, time
import training.data.sources

def release():
    time.sleep(0.05)
    print("released", flush=True)

threading.Thread(target=release, daemon=True).start()
"""


@pytest.mark.slow
def test_the_end_of_a_program_waits_for_threads_that_release_files(repository):
    """pyarrow's threads need the interpreter after the last row; they are daemons like the thread of this program."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=repository, capture_output=True, text=True)
    assert done.stdout == "released\n", done.stderr
    assert done.returncode == 0

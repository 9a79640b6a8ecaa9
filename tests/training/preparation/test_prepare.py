"""Preparation of every data set, on a miniature in its format with the faults that downloads have."""

import io
import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import soundfile

from modeling_sslam.common.encoded_audio import EncodedAudio
from modeling_sslam.common.labels import read_labels
from training import prepare
from training.data.config import DataConfig
from training.data.labels import LabelSet
from training.data.loader import make_loader
from training.data.sources import open_source
from training.preparation import audioset, desed, esc50, spass, urban_sed
from training.preparation.listing import PreparationError


@pytest.fixture
def put(tmp_path, encode):
    """Write files of a miniature: `put("audio/a.wav")` for sound, `put("meta.csv", text)` for text."""
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
    """Prepare the miniature, and return the folder and the report."""

    def make(name, source=None, **options):
        out = tmp_path / f"out-{name}"
        return out, prepare.prepare(name, source or tmp_path / "source", out, **options)

    return make


def counts(report):
    return {kind: entry["count"] for kind, entry in report["findings"].items()}


def first_row(folder, split):
    """Return the first row of a split without its audio."""
    rows = datasets.load_dataset(str(folder), split=split, streaming=True).cast_column("audio", EncodedAudio())
    return {name: value for name, value in next(iter(rows)).items() if name != "audio"}


def read(folder, split, extractor):
    """Return labels by id, as the loader of the training programs reads them."""
    config = DataConfig(str(folder), split=split, label_column="labels", num_workers=0)
    loader = make_loader(open_source(config), extractor, batch_size=2, seed=0, repeat=False)
    read = {id_: tuple(labels) for batch in loader for id_, labels in zip(batch["ids"], batch["labels"], strict=True)}
    assert not loader.skipped
    return read


# -------------------------------------------------------------------------------------------------------------- ESC-50


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
        "1-8-A-6.wav,1,6,hen,False,8,A",  # broken header
        "1-9-A-7.wav,1,7,unicorn,False,9,A",  # unknown class
        rows[0],  # repeated
        "2-3-A-1.wav,2,2,pig,True,3,A",  # repeated with another class
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
    assert (
        "missing files (listed, but the file does not exist; left out): 1, audio/1-7-A-5.wav"
        in capsys.readouterr().out
    )
    assert read_labels(folder / "labels.csv") == esc50.CLASSES

    loaded = datasets.load_dataset(str(folder), streaming=True)
    assert sorted(loaded) == sorted(ESC50_LABELS)
    row = next(iter(loaded["fold2"].cast_column("audio", datasets.Audio(decode=False))))
    assert row["audio"]["bytes"] == (tmp_path / "source/audio/2-3-A-1.wav").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-esc50", "source"]


def test_esc10_is_the_marked_part_of_esc50(make, put, extractor):
    rows = ["1-1-A-0.wav,1,0,dog,True", "2-2-A-49.wav,2,49,hand_saw,False", "3-3-A-1.wav,3,1,rooster,True"]
    put("meta/esc50.csv", "filename,fold,target,category,esc10\n" + "\n".join(rows) + "\n")
    for row in rows:
        put(f"audio/{row.split(',')[0]}")
    folder, report = make("esc50", esc10=True)
    labels = {"fold1": {"1-1-A-0": ("dog",)}, "fold3": {"3-3-A-1": ("rooster",)}}
    assert {split: read(folder, split, extractor) for split in labels} == labels
    assert counts(report) == {"classes_without_clip": 8}
    assert report["options"] == {"by_path": False, "esc10": True}
    assert read_labels(folder / "labels.csv") == esc50.CLASSES_OF_ESC10
    assert set(esc50.CLASSES_OF_ESC10) < set(esc50.CLASSES)


def test_esc50_has_fifty_classes_in_the_published_order():
    assert len(set(esc50.CLASSES)) == 50
    assert [esc50.CLASSES[i] for i in (0, 1, 10, 20, 30, 36, 40, 49)] == [
        "dog", "rooster", "rain", "crying_baby", "door_wood_knock", "vacuum_cleaner", "helicopter", "hand_saw",
    ]  # fmt: skip


# ----------------------------------------------------------------------------------------------------- Speech Commands


@pytest.fixture
def words(put):
    """Write a miniature: words, one of them unknown, noise, and lists with faults."""
    for name in (
        "yes/a_nohash_0",
        "yes/b_nohash_0",
        "bed/a_nohash_0",
        "bed/b_nohash_1",
        "no/c_nohash_0",
        "xylophone/a",
    ):
        put(f"{name}.wav")
    put("go/d_nohash_0.wav", b"")
    put("_background_noise_/hum.wav", seconds=10.5)
    put("_background_noise_/README.md", "origin of the noise")
    put("loose.wav")
    put("validation_list.txt", "yes/b_nohash_0.wav\nbed/gone_nohash_0.wav\nyes/b_nohash_0.wav\n")
    put("testing_list.txt", "no/c_nohash_0.wav\nbed/b_nohash_1.wav\n")


@pytest.mark.usefixtures("words")
def test_speech_commands_v2(make, extractor):
    folder, report = make("speech_commands_v2")
    assert read(folder, "train", extractor) == {"yes/a_nohash_0": ("yes",), "bed/a_nohash_0": ("bed",)}
    assert read(folder, "validation", extractor) == {"yes/b_nohash_0": ("yes",)}
    assert read(folder, "test", extractor) == {"no/c_nohash_0": ("no",), "bed/b_nohash_1": ("bed",)}
    assert counts(report) == {
        "missing_files": 1,
        "unlisted_files": 1,
        "unreadable_files": 1,
        "duplicated_rows": 1,
        "unknown_labels": 1,
        "clips_without_known_label": 1,
        "classes_without_clip": 32,
        "noise_files": 1,
    }
    names = read_labels(folder / "labels.csv")
    assert len(names) == 35
    assert names == sorted(names)
    assert {"backward", "zero"} <= set(names)


def test_speech_commands_in_both_lists_is_an_error(make, put):
    put("yes/a_nohash_0.wav")
    put("validation_list.txt", "yes/a_nohash_0.wav\n")
    put("testing_list.txt", "yes/a_nohash_0.wav\n")
    with pytest.raises(PreparationError, match="yes/a_nohash_0 is listed in the split validation and in test"):
        make("speech_commands_v2")


SILENCE = {f"_silence_/hum-{i:03d}": ("_silence_",) for i in range(10)}


@pytest.mark.usefixtures("words")
def test_speech_commands_v1(make, extractor, tmp_path):
    folder, report = make("speech_commands_v1")
    silence = list(SILENCE.items())
    assert read(folder, "train", extractor) == {
        "yes/a_nohash_0": ("yes",), "bed/a_nohash_0": ("_unknown_",), **dict(silence[:8]),
    }  # fmt: skip
    assert read(folder, "validation", extractor) == {"yes/b_nohash_0": ("yes",), **dict(silence[8:9])}
    assert read(folder, "test", extractor) == {
        "no/c_nohash_0": ("no",), "bed/b_nohash_1": ("_unknown_",), **dict(silence[9:]),
    }  # fmt: skip
    assert " ".join(read_labels(folder / "labels.csv")) == (
        "yes no up down left right on off stop go _unknown_ _silence_"
    )
    assert counts(report)["missing_files"] == counts(report)["unlisted_files"] == 1

    noise, rate = soundfile.read(tmp_path / "source/_background_noise_/hum.wav", dtype="int16")
    rows = datasets.load_dataset(str(folder), split="test", streaming=True).cast_column("audio", EncodedAudio())
    (piece,) = (row["audio"]["bytes"] for row in rows if row["id"] == "_silence_/hum-009")
    np.testing.assert_array_equal(soundfile.read(io.BytesIO(piece), dtype="int16")[0], noise[9 * rate : 10 * rate])


@pytest.mark.usefixtures("words")
def test_silence_is_stored_in_the_folder_even_if_words_are_referred_to_by_path(make, extractor):
    folder, _ = make("speech_commands_v1", by_path=True)
    assert read(folder, "validation", extractor) == {"yes/b_nohash_0": ("yes",), "_silence_/hum-008": ("_silence_",)}
    assert "Rows refer to sound files outside this folder" in (folder / "README.md").read_text()


@pytest.mark.usefixtures("words")
def test_speech_commands_v1_with_the_published_test_set(make, extractor, tmp_path, encode):
    for name in ("yes", "_unknown_", "_silence_"):
        (tmp_path / "tests" / name).mkdir(parents=True)
        (tmp_path / "tests" / name / "1.wav").write_bytes(encode(1, file_format="WAV"))
    folder, report = make("speech_commands_v1", test_set=tmp_path / "tests")
    assert read(folder, "test", extractor) == {
        "test/yes/1": ("yes",), "test/_unknown_/1": ("_unknown_",), "test/_silence_/1": ("_silence_",),
    }  # fmt: skip
    assert report["findings"]["replaced_clips"]["first"] == ["no/c_nohash_0", "bed/b_nohash_1"]
    assert [report["splits"][split]["classes"]["_silence_"] for split in ("train", "validation")] == [9, 1]
    assert counts(report)["unlisted_files"] == 1
    assert str(tmp_path) not in (folder / "README.md").read_text()


# --------------------------------------------------------------------------------------------------------------- SPASS


def test_spass(make, put, extractor):
    table = "audio_filename,class,path\n"
    for i in range(1, 9):
        table += f"square{i:05d}.wav,talk,a{i}\nsquare{i:05d}.wav,dog,b{i}\nsquare{i:05d}.wav,dog,c{i}\n"
    table += "square00001.wav,dog,b1\n"  # repeated line
    table += "square00002.wav,unicorn,d\n"
    put("SPASS_META_DATA/3_MatrixLabelsSquare.csv", table)
    put("SPASS_META_DATA/2_MatrixLabelsPark.csv", "audio_filename,class\npark00001.wav,dog\n")
    for i in (1, 2, 3, 4, 5, 6, 8, 9):
        put(f"Square audio files/square{i:05d}.wav")
    put("Square audio files/square00003.wav", b"no sound")
    put("Park audio files/park00001.wav")
    folder, report = make("spass", soundscape="square")
    labels = ("talk", "dog")
    assert read(folder, "train", extractor) == {f"square{i:05d}": labels for i in (1, 2, 4, 5, 6)}
    assert read(folder, "test", extractor) == {"square00008": labels}
    assert counts(report) == {
        "missing_files": 1,
        "unlisted_files": 1,
        "unreadable_files": 1,
        "duplicated_rows": 1,
        "unknown_labels": 1,
        "classes_without_clip": 25,
    }
    assert report["findings"]["missing_files"]["first"] == ["square00007.wav"]
    row = first_row(folder, "test")
    assert row == {"id": "square00008", "labels": list(labels), "num_sources": 2}


def test_spass_with_times(make, put):
    lines = ["name,start,stop,what", "park00001.wav,3.5,4,dog", "park00001.wav,0.5,9,rain", "park00002.wav,0,1,dog"]
    put("MatrixLabelsPark.csv", "\n".join(lines))
    for i in (1, 2):
        put(f"Park_audio_files/park{i:05d}.wav")
    columns = {"file_column": "name", "class_column": "what", "onset_column": "start", "offset_column": "stop"}
    folder, _ = make("spass", soundscape="park", **columns)
    row = first_row(folder, "train")
    assert row["events"] == [
        {"label": "rain", "onset": 0.5, "offset": 9.0},
        {"label": "dog", "onset": 3.5, "offset": 4.0},
    ]
    assert row["labels"] == ["rain", "dog"]
    with pytest.raises(PreparationError, match="has no column audio_filename, class; it has name, start, stop, what"):
        prepare.prepare("spass", folder.parent / "source", folder.parent / "other", soundscape="park")


def test_spass_has_the_published_numbers_of_classes():
    numbers = {name: len(set(classes)) for name, classes in spass.CLASSES.items()}
    assert numbers == {"square": 27, "park": 23, "waterfront": 29, "street": 27, "market": 22}
    assert spass.CLASSES["waterfront"][0] == "Vwater"
    assert "explosives" in spass.CLASSES["street"]
    assert spass.CLASSES["market"][:3] == ["air_conditioner", "airborne", "alarm"]


# ------------------------------------------------------------------------------------------------- URBAN-SED and DESED


def jams(*events):
    observations = [
        {"time": onset, "duration": offset - onset, "value": {"label": label, "role": role}, "confidence": 1.0}
        for label, onset, offset, role in events
    ]
    return json.dumps({"annotations": [{"namespace": "sound_event", "data": observations}], "file_metadata": {}})


def test_urban_sed(make, put, extractor):
    put("audio/train/a.wav")
    put("annotations/train/a.txt", "5.25\t6.5\tsiren\n0.5\t2.0\tdog_bark\n5.25\t6.5\tsiren\n")
    put("annotations/train/a.jams", jams(("drilling", 0, 1, "foreground")))  # not read beside a .txt
    put("audio/validate/b.wav")
    put(
        "annotations/validate/b.jams",
        jams(("brownnoise", 0, 10, "background"), ("gun_shot", 2, 3, "foreground"), ("gun_shot", 1, 2, "foreground")),
    )
    put("audio/test/c.wav")
    put("annotations/test/c.txt", "0.0\t1.0\tjackhammer\n1.0\t2.0\tunicorn\n")
    put("audio/test/none.wav")
    put("annotations/test/none.txt", "")
    put("annotations/test/gone.txt", "0.0\t1.0\tsiren\n")
    put("annotations/test/broken.txt", "0.0\t1.0\tsiren\n")
    put("audio/test/broken.wav", b"RIFF")
    put("audio/test/extra.wav")
    folder, report = make("urban_sed")
    assert read(folder, "train", extractor) == {"a": ("dog_bark", "siren")}
    assert read(folder, "validation", extractor) == {"b": ("gun_shot",)}
    assert read(folder, "test", extractor) == {"c": ("jackhammer",), "none": ()}
    assert counts(report) == {
        "missing_files": 1,
        "unlisted_files": 1,
        "unreadable_files": 1,
        "duplicated_rows": 1,
        "unknown_labels": 1,
        "clips_without_label": 1,
        "classes_without_clip": 6,
    }
    row = first_row(folder, "validation")
    assert row["events"] == [
        {"label": "gun_shot", "onset": 1.0, "offset": 2.0},
        {"label": "gun_shot", "onset": 2.0, "offset": 3.0},
    ]
    assert row["num_sources"] == 1
    assert read_labels(folder / "labels.csv") == sorted(urban_sed.CLASSES)
    assert len(set(urban_sed.CLASSES)) == 10


STRONG = "filename\tonset\toffset\tevent_label\n"


def test_desed(make, put, extractor):
    put("metadata/train/weak.tsv", "filename\tevent_labels\nx.wav\tDog,Speech\ny.wav\tCat\n")
    put("metadata/train/synthetic21_train/soundscapes.tsv", f"{STRONG}0.wav\t1.5\t2\tDog\n0.wav\t0.5\t9.5\tFrying\n")
    put("metadata/train/synthetic21_train/durations.tsv", "filename\tduration\n0.wav\t10.0\n")
    put("metadata/train/unlabel_in_domain.tsv", "filename\nu.wav\n")
    put("metadata/validation/synthetic21_validation/soundscapes.tsv", f"{STRONG}0.wav\t0\t1\tBlender\n")
    put("metadata/validation/validation.tsv", f"{STRONG}v.wav\t0\t1\tCat\nw.wav\t\t\t\n")
    put("metadata/validation/test_dcase2018.tsv", f"{STRONG}v.wav\t0\t1\tCat\n")
    put(
        "metadata/eval/public.tsv",
        f"{STRONG}p.wav\t0\t1\tUnicorn\np.wav\t1\t2\tCat\ngone.wav\t0\t1\tCat\nq.wav\t0\t1\tDog\n",
    )
    for name in ("train/weak/x", "train/weak_16k/x", "train/weak_16k/y", "train/unlabel_in_domain/u", "validation/v"):
        put(f"audio/{name}.wav")
    for split in ("train", "validation"):
        put(f"audio/{split}/synthetic21_{split}/soundscapes/0.wav")
    put("audio/validation/w.wav")
    put("audio/eval/public/p.wav")
    put("audio/eval/public/q.wav", b"?")
    folder, report = make("desed")
    assert read(folder, "train", extractor) == {
        "audio/train/weak/x": ("Dog", "Speech"),
        "audio/train/weak_16k/y": ("Cat",),
        "audio/train/synthetic21_train/soundscapes/0": ("Frying", "Dog"),
    }
    assert read(folder, "validation", extractor) == {
        "audio/validation/v": ("Cat",),
        "audio/validation/w": (),
        "audio/validation/synthetic21_validation/soundscapes/0": ("Blender",),
    }
    assert read(folder, "test", extractor) == {"audio/eval/public/p": ("Cat",)}
    assert counts(report) == {
        "missing_files": 1,
        "unlisted_files": 2,
        "unreadable_files": 1,
        "duplicated_rows": 1,
        "unknown_labels": 1,
        "clips_without_label": 1,
        "classes_without_clip": 5,
        "ignored_annotations": 2,
    }
    assert read_labels(folder / "labels.csv") == sorted(desed.CLASSES)
    assert len(set(desed.CLASSES)) == 10


def test_idmt_desed_fl(make, put, extractor):
    put("train.csv", "file,from,to,class\nclient1/a.wav,0,1,Dog\n")
    put("eval.csv", "file,from,to,class\nb.wav,0,1,Cat\n")
    put("sounds/client1/a.wav")
    put("sounds/b.wav")
    columns = {"file_column": "file", "label_column": "class", "onset_column": "from", "offset_column": "to"}
    folder, report = make("idmt_desed_fl", annotations=["train=train.csv", "test=eval.csv"], **columns)
    assert read(folder, "train", extractor) == {"sounds/client1/a": ("Dog",)}
    assert read(folder, "test", extractor) == {"sounds/b": ("Cat",)}
    assert counts(report) == {"classes_without_clip": 8}
    assert "--annotations train=train.csv test=eval.csv --file-column file" in (folder / "README.md").read_text()

    def refused(match, annotations):
        with pytest.raises(PreparationError, match=match):
            prepare.prepare(
                "desed", folder.parent / "source", folder.parent / "other", annotations=annotations, **columns
            )

    refused("is not SPLIT=TABLE", ["train.csv"])
    refused("name the tables with --annotations", None)
    put("other_sounds/b.wav")
    refused("which may be .*sounds/b.wav or .*other_sounds/b.wav", ["test=eval.csv"])


def test_desed_does_not_take_a_sound_of_another_split(make, put, extractor):
    """Numbers of synthetic clips start at 0 in each split."""
    for split in ("train", "validation"):
        put(f"metadata/{split}/synthetic21_{split}/soundscapes.tsv", f"{STRONG}0.wav\t0\t1\tDog\n")
    put("audio/validation/synthetic21_validation/soundscapes/0.wav")
    put("metadata/train/audioset_strong.tsv", f"{STRONG}y.wav\t0\t1\tCat\n")
    for folder in ("strong_label_real", "strong_label_real_16k"):
        put(f"audio/train/{folder}/y.wav")
    folder, report = make("desed")
    assert report["findings"]["missing_files"]["first"] == ["audio/train/synthetic21_train/0.wav"]
    assert read(folder, "train", extractor) == {"audio/train/strong_label_real/y": ("Cat",)}
    assert list(read(folder, "validation", extractor)) == ["audio/validation/synthetic21_validation/soundscapes/0"]


# ---------------------------------------------------------------------------------------------- AudioSet and manifests


def test_audioset(make, put, extractor, tmp_path):
    head = "# Segments csv created\n# num_segs=7\n# YTID, start_seconds, end_seconds, positive_labels\n"
    balanced = [
        '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"',
        'YaBcDeFgHiJ, 0.000, 10.000, "/m/068hy"',
        '-0RWZT-miFs, 420.000, 430.000, "/m/0gone"',
        '_0_0_0_0_0_, 0.000, 10.000, "/m/068hy,/m/0gone"',
        'gone_______, 0.000, 10.000, "/m/068hy"',
        'unreadable_, 0.000, 10.000, "/m/068hy"',
        '--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00088"',
    ]
    put("balanced_train_segments.csv", head + "\n".join(balanced))
    put("eval_segments.csv", head + '0123456789a, 30.000, 40.000, "/m/09x0r"\n')
    put("audio/Y--PJHxphWEs.wav")
    put("audio/YaBcDeFgHiJ_0.flac")
    put("audio/-0RWZT-miFs.wav")
    put("audio/Y_0_0_0_0_0__0.000_10.000.flac")
    put("audio/unreadable_.wav", b"")
    put("audio/eval/0123456789a_30000.flac")
    put("audio/unlistedYTI.wav")
    folder, report = make("audioset", by_path=True)
    assert read(folder, "balanced", extractor) == {
        "--PJHxphWEs": ("Speech", "Gush"),
        "YaBcDeFgHiJ": ("Domestic animals, pets",),
        "_0_0_0_0_0_": ("Domestic animals, pets",),
    }
    assert read(folder, "eval", extractor) == {"0123456789a": ("Speech",)}
    assert counts(report) == {
        "missing_files": 1,
        "unlisted_files": 1,
        "unreadable_files": 1,
        "duplicated_rows": 1,
        "unknown_labels": 2,
        "clips_without_known_label": 1,
        "classes_without_clip": 524,
    }
    rows = datasets.load_dataset(str(folder), split="eval", streaming=True).cast_column("audio", EncodedAudio())
    assert next(iter(rows))["audio"] == {
        "bytes": None,
        "path": str(tmp_path / "source/audio/eval/0123456789a_30000.flac"),
    }
    classes = LabelSet.of_file(folder / "labels.csv")
    assert len(classes) == 527
    assert classes.index["/m/09x0r"] == classes.index["Speech"] == 0
    assert classes.index["/t/dd00088"] == classes.index["Gush"]


@pytest.mark.parametrize(
    ("stem", "ytids"),
    [
        ("0123456789a", ["0123456789a"]),
        ("Y0123456789a", ["0123456789a"]),
        ("Y123456789a_30", ["Y123456789a"]),
        ("0123456789a_30.000_40.000", ["0123456789a"]),
        ("Y0123456789", ["Y0123456789"]),
        ("Y0123456789_30", ["Y0123456789"]),
        ("0123456789ab", []),
        ("0123456789a_copy", []),
        ("short", []),
    ],
)
def test_audioset_files_are_matched_by_name(stem, ytids):
    assert audioset.possible_ytids(stem) == ytids


def test_manifest(make, put, extractor, tmp_path):
    put("label_descriptors.csv", 'index,mid,display_name\n0,/m/a,"Dog, barking"\n1,/m/b,Rain\n2,/m/c,Wind\n')
    put("train.tsv", f"{tmp_path}/source/sounds\nd/a.wav\t16000\nb.wav\t16000\nd/a.wav\t16000\nc.wav\t1\nd.wav\t1\n")
    put("train.lbl", "a\t/m/b,/m/a\nb\tRain,/m/x\nc\t/m/y\nnobody\t/m/a\n")
    put("eval.tsv", f"{tmp_path}/source/sounds\nd/e.wav\t16000\ngone.wav\t1\nbroken.wav\t1\n")
    put("eval.lbl", "d/e\t/m/a\nd/gone\t/m/b\ngone\t/m/b\nbroken\t/m/b\n")
    for name in ("d/a", "b", "c", "d", "d/e", "extra"):
        put(f"sounds/{name}.wav")
    put("sounds/broken.wav", b"RIFF")
    folder, report = make("manifest")
    assert read(folder, "train", extractor) == {"d/a": ("Rain", "Dog, barking"), "b": ("Rain",)}
    assert read(folder, "eval", extractor) == {"d/e": ("Dog, barking",)}
    assert counts(report) == {
        "missing_files": 1,
        "unlisted_files": 2,
        "unreadable_files": 1,
        "duplicated_rows": 1,
        "unknown_labels": 2,
        "clips_without_known_label": 1,
        "clips_without_annotation": 1,
        "labels_without_clip": 2,
        "classes_without_clip": 1,
    }
    assert LabelSet.of_file(folder / "labels.csv").names == ["Dog, barking", "Rain", "Wind"]

    (tmp_path / "source/sounds").rename(tmp_path / "moved")
    with pytest.raises(PreparationError, match="does not exist; name it with --root"):
        prepare.prepare("manifest", tmp_path / "source", tmp_path / "other")
    prepare.prepare("manifest", tmp_path / "source", tmp_path / "other", root=tmp_path / "moved")
    assert read(tmp_path / "other", "eval", extractor) == {"d/e": ("Dog, barking",)}


# --------------------------------------------------------------------------------------------------------- the command


@pytest.mark.usefixtures("esc50_miniature")
def test_an_archive_is_unpacked(extractor, tmp_path, capsys):
    for kind, suffix in (("zip", "zip"), ("gztar", "tar.gz")):
        archive = Path(shutil.make_archive(str(tmp_path / "ESC-50"), kind, tmp_path, "source"))
        assert archive.name == f"ESC-50.{suffix}"
        out = tmp_path / "new" / suffix
        prepare.main(["esc50", str(archive), str(out)])
        assert {split: read(out, split, extractor) for split in ESC50_LABELS} == ESC50_LABELS
        assert json.loads((out / "report.json").read_text())["findings"]["missing_files"]["first"] == [
            "audio/1-7-A-5.wav"
        ]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tar.gz", "zip"]
    assert "fold1: 2 clips" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--by-path needs a folder"):
        prepare.main(["esc50", str(tmp_path / "ESC-50.zip"), str(tmp_path / "other"), "--by-path"])


@pytest.mark.usefixtures("esc50_miniature")
def test_a_failed_preparation_leaves_nothing_behind(put, tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"

    def refused(match, *arguments):
        with pytest.raises(SystemExit, match=match):
            prepare.main(["esc50", *map(str, arguments)])

    refused("neither a folder nor a zip or tar archive", tmp_path / "nowhere", out)
    refused("source exists already; name a new folder", source, source)
    put("meta/esc50.csv", "filename,fold,target,category\n1-1-A-0.wav,1,0,dog\n1-1-A-0.wav,2,0,dog\n")
    refused("1-1-A-0 is listed in the split fold1 and in fold2", source, out)
    put("meta/esc50.csv", "filename,fold,target,category\n1-8-A-6.wav,1,6,hen\n")
    refused("There is no clip to write: .*\nunreadable files.* 1, audio/1-8-A-6.wav", source, out)
    put("meta/esc50.csv", "filename,target,category\n")
    refused("esc50.csv has no column fold; it has filename, target, category", source, out)
    put("meta/esc50.csv", "filename,fold,target,category\n1-1-A-0.wav,1 a,0,dog\n")
    refused("'fold1 a' cannot be the name of a split", source, out)
    (source / "meta/esc50.csv").unlink()
    refused("esc50.csv cannot be read", source, out)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_formats_that_only_torchcodec_reads_are_kept_and_counted(put, make):
    put("meta/esc50.csv", "filename,fold,target,category\na.m4a,1,0,dog\nb.m4a,1,0,dog\nc.wav,1,0,dog\n")
    put("audio/a.m4a", b"ftypM4A ...")
    put("audio/b.m4a", b"")
    put("audio/c.wav")
    _, report = make("esc50")
    assert report["findings"]["unchecked_files"]["first"] == ["audio/a.m4a"]
    assert report["findings"]["unreadable_files"]["first"] == ["audio/b.m4a"]
    assert report["clips"] == 2


def test_rows_are_shuffled_in_the_same_order_every_time(put, tmp_path, extractor):
    put("validation_list.txt", "")
    put("testing_list.txt", "")
    for word in ("bed", "bird", "cat"):
        for i in range(8):
            put(f"{word}/{i}.wav")
    orders = []
    for i in range(2):
        prepare.prepare("speech_commands_v2", tmp_path / "source", tmp_path / f"out{i}")
        config = DataConfig(str(tmp_path / f"out{i}"), label_column="labels", num_workers=0, shuffle_buffer=0)
        loader = make_loader(open_source(config), extractor, batch_size=24, seed=0, repeat=False)
        orders.append(next(iter(loader))["ids"])
    assert orders[0] == orders[1]
    assert len({id_.split("/")[0] for id_ in orders[0][:8]}) == 3


def test_help_describes_each_data_set(capsys):
    for name in prepare.DATASETS:
        with pytest.raises(SystemExit):
            prepare.parse_arguments([name, "--help"])
        text = capsys.readouterr().out
        assert len(prepare.guide(name).splitlines()) > 3
        assert prepare.guide(name) in text
        for option in prepare.options_of(name):
            assert f"--{option.replace('_', '-')}" in text

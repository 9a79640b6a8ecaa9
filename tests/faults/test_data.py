"""Faults of users' data: splits, tables, label files, folders of classes, servers, lists as words, spawned workers."""

import io
import multiprocessing
import os
import threading
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification
from modeling_sslam.common.labels import LabelFileError, read_label_table
from training.arguments import parse
from training.classification.task import check_splits
from training.data import stream
from training.data.augmentation import roll_and_gain
from training.data.config import DataConfig, EvaluationDataConfig, LabelledDataConfig
from training.data.loader import make_loader
from training.data.sources import is_one_split, open_source
from training.evaluate import EvaluateConfig, EvaluationError, evaluate
from training.preparation import manifest
from training.preparation.listing import PreparationError, read_table, sound_files
from training.run.config import TrainingError


@pytest.fixture(scope="module")
def sound():
    file = io.BytesIO()
    soundfile.write(file, 0.1 * np.sin(np.arange(4800) / 9), 16_000, format="FLAC")
    return file.getvalue()


@pytest.fixture
def write(tmp_path, sound):
    """A function that writes sound files into a folder and returns it."""

    def write(*names):
        for name in names:
            path = tmp_path / "d" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(sound)
        return tmp_path / "d"

    return write


def labels_of(source, split="train", **settings):
    """Return the labels of each clip that a split has."""
    found = list(open_source(LabelledDataConfig(str(source), split=split, **settings)).ids_and_labels())
    assert len(dict(found)) == len(found)
    return dict(found)


def refusal(source, split="train"):
    with pytest.raises(ValueError, match=str(source)) as caught:
        labels_of(source, split)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------- B1: absent splits


@pytest.mark.parametrize(
    ("names", "there"),
    [
        (("train", "val"), "train, val"),
        (("Training", "Testing_set"), "Testing_set, Training"),
        (("fold1", "fold2"), "fold1, fold2"),
        (("trainset", "FSD50K.dev_audio"), "FSD50K.dev_audio, trainset"),
        (("train", "other"), "train"),
    ],
)
@pytest.mark.parametrize("asked", ["test", "train+test", "validation", "", "."])
def test_a_folder_of_splits_has_no_others(write, names, there, asked):
    folder = write(*(f"{split}/{label}/a.flac" for split in names for label in ("dog", "cat")))
    message = refusal(folder, asked)
    assert f"it has {there}." in message
    assert "data.split" in message
    with pytest.raises(ValueError, match="has no split"):
        is_one_split(LabelledDataConfig(str(folder), split="validation"))


def test_splits_that_are_there_are_read_alone_or_joined(write):
    folder = write("train/dog/a.flac", "val/dog/b.flac", "val/cat/c.flac", "mine/cow/d.flac")
    assert labels_of(folder, "val") == {"val/dog/b.flac": ["dog"], "val/cat/c.flac": ["cat"]}
    joined = {"train/dog/a.flac": ["dog"], "val/dog/b.flac": ["dog"], "val/cat/c.flac": ["cat"]}
    assert labels_of(folder, "train+val") == labels_of(folder, "train + val+train") == joined
    assert labels_of(folder, "mine") == {"mine/cow/d.flac": ["cow"]}


def test_splits_deeper_in_a_folder_are_refused(write):
    folder = write("audio/train/dog/a.flac", "audio/val/dog/b.flac")
    assert "audio/train, audio/val" in refusal(folder, "test")
    assert labels_of(folder / "audio", "val") == {"val/dog/b.flac": ["dog"]}


@pytest.mark.parametrize("split", ["train", "test", "train+test"])
def test_a_folder_of_classes_is_one_split(write, split):
    """This holds even if a class has the name of a split, such as the class train of ESC-50."""
    folder = write("train/a.flac", "dog/b.flac", "dog/big/c.flac")
    expected = {"train/a.flac": ["train"], "dog/b.flac": ["dog"], "dog/big/c.flac": ["big"]}
    assert labels_of(folder, split) == expected
    assert is_one_split(LabelledDataConfig(str(folder), split=split))


def test_an_evaluation_on_a_split_that_is_not_there(write, make_config, tmp_path):
    folder = write(*(f"{split}/{label}/a.flac" for split in ("train", "val") for label in ("dog", "cat")))
    names = {0: "dog", 1: "cat"}
    model = SSLAMForAudioClassification(make_config(num_mel_bins=128, id2label=names))
    model.save_pretrained(tmp_path / "m")
    SSLAMFeatureExtractor(max_length=32).save_pretrained(tmp_path / "m")
    config = EvaluateConfig(str(tmp_path / "m"), EvaluationDataConfig(str(folder), split="test", num_workers=0))
    with pytest.raises(EvaluationError, match=r"no split 'test'; it has train, val"):
        evaluate(config)
    assert not (tmp_path / "m" / "evaluation").exists()
    with pytest.raises(TrainingError, match=r"test_split='test': .* it has train, val"):
        check_splits(LabelledDataConfig(str(folder)), None, "val", "test")


def test_a_saved_dataset_has_the_split_that_it_was_saved_with(tmp_path, sound):
    rows = [{"audio": {"bytes": sound, "path": f"{i}.flac"}, "label": "dog"} for i in range(3)]
    for name, split in (("train", "train"), ("part", "train[:80%]"), ("both", "train+test"), ("none", None)):
        saved = datasets.Dataset.from_list(rows, split=split and datasets.NamedSplit(split))
        saved.save_to_disk(str(tmp_path / name))
    for name, split in (("train", "train"), ("part", "train"), ("both", "test+train"), ("none", "a+b"), ("none", "a")):
        assert len(labels_of(tmp_path / name, split)) == 3
    assert "no split 'test'; it has train." in refusal(tmp_path / "train", "test")
    assert "it has train+test." in refusal(tmp_path / "both", "test")
    assert [is_one_split(LabelledDataConfig(str(tmp_path / n), split="x")) for n in ("train", "none")] == [False, True]


def test_audiofolders_and_shards_refuse_other_splits(write, tmp_path, sound):
    folder = write("a.flac")
    (folder / "metadata.csv").write_text("file_name,label\na.flac,dog\n")
    (tmp_path / "p").mkdir()
    rows = [{"id": "a", "audio": {"bytes": sound, "path": "a.flac"}, "label": "dog"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p" / "train-0.parquet")
    for source in (folder, tmp_path / "p"):
        assert list(labels_of(source).values()) == [["dog"]]
        for split in ("test", "train+test"):
            with pytest.raises(ValueError, match="test"):
                labels_of(source, split)


# ------------------------------------------------------------------------------------------- B2, B5: tables and lists


@pytest.fixture
def table(tmp_path):
    def table(content: str | bytes, name="t.csv"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return table


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ("b.wav,Speech, human,train", 3),
        ("b,c.wav,Speech,train", 3),
        ("b.wav,Speech", 3),
        ("b.wav", 3),
        ('b.wav,"Speech,train', 4),
        ('b.wav,"Speech" human,train', 3),
        ('b.wav, "Speech, human",train', 3),
    ],
)
def test_a_damaged_row_is_refused_by_its_line(table, row, line):
    message = refusal(table(f"path,labels,split\na.wav,Music,train\n{row}\nc.wav,Music,train\n"))
    assert f"line {line}" in message
    assert "quotes" in message


def test_sound_rows_are_read_as_before(table):
    text = 'path,labels\r\na.wav,"Speech, human;Music"\r\n\r\nb.wav,\r\nc.wav,Dog,,\r\n'
    assert labels_of(table(text)) == {"a.wav": ["Speech, human", "Music"], "b.wav": [], "c.wav": ["Dog"]}
    assert "two columns 'labels'" in refusal(table("path,labels,labels\na.wav,Dog,Cat\n"))


def test_a_damaged_table_of_weights_is_refused_by_its_line(table):
    path = table("id,weight\na,b.wav,0.5\n")
    config = DataConfig(str(table("path\na.wav\n", "c.csv")), sample_weights=str(path), clips_per_epoch=1)
    with pytest.raises(ValueError, match="line 2 has 3 cells for 2 columns"):
        make_loader(open_source(config), SSLAMFeatureExtractor(max_length=32), batch_size=1, seed=0)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_is_no_part_of_a_manifest(write, table, end):
    folder = write("café.flac")
    path = table(end.join([f"\ufeff{folder}", "café.flac\t4800", ""]), "m.tsv")
    table(f"\ufeffcafé\tdog,cat{end}", "m.lbl")
    source = open_source(LabelledDataConfig(str(path)))
    (row,) = source.rows(source.columns.names)
    assert source.audio(row) == (None, str(folder / "café.flac"))
    assert (source.id(row), source.labels(row)) == ("café.flac", ["dog", "cat"])


def test_an_empty_or_damaged_manifest(table):
    for content in ("", "\ufeff", "\n\n"):
        assert "lists no files" in refusal(table(content, "m.tsv"))
    path = table("/\na.wav\t1\n", "m.tsv")
    table("a\n", "m.lbl")
    with pytest.raises(ValueError, match=r"m\.lbl: 'a' is not name<TAB>label"):
        labels_of(path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "cp1252"])
def test_another_encoding_is_refused_with_the_remedy(table, encoding):
    text = "path,labels\na.wav,Dog\ncafé.wav,Café\n"
    message = refusal(table(text.encode(encoding)))
    assert "line 3" in message or encoding == "utf-16"
    assert "Save it as UTF-8" in message
    assert "Save it as UTF-8" in refusal(table("/\ncafé.wav\t1\n".encode(encoding), "m.tsv"))
    with pytest.raises(LabelFileError, match="Save it as UTF-8"):
        read_label_table(table("0,Café\n1,Dog\n".encode(encoding), "labels.csv"))


# ----------------------------------------------------------------------------------------------- B3, B6: class folders


def test_folders_of_the_system_are_no_classes(write, caplog):
    hidden = (".ipynb_checkpoints", ".git", "__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "lost+found")
    folder = write(
        "dog/a.flac", "dog/.ipynb_checkpoints/a-copy.flac", "_background_noise_/b.flac", "lost+found dogs/c.flac",
        "__MACOSX/dog/d.flac", *(f"{name}/e.flac" for name in hidden),
    )  # fmt: skip
    (folder / ".DS_Store").write_bytes(b"")
    expected = {"dog/a.flac": ["dog"], "_background_noise_/b.flac": ["_background_noise_"]}
    assert labels_of(folder) == expected | {"lost+found dogs/c.flac": ["lost+found dogs"]}
    assert not caplog.records


def test_loose_files_are_left_out_and_named(write, caplog):
    folder = write("dog/a.flac", "loose1.flac", "loose2.flac")
    assert labels_of(folder) == {"dog/a.flac": ["dog"]}
    (record,) = caplog.records
    assert "2 files" in record.getMessage()
    assert "loose1.flac, loose2.flac" in record.getMessage()
    # A folder of one class has its name; without labels, all files are read.
    assert labels_of(folder / "dog") == {"a.flac": ["dog"]}
    assert len(list(open_source(DataConfig(str(folder))).rows(["id"]))) == 3


def test_loose_files_of_a_split_are_left_out_and_named(write, caplog):
    folder = write("train/dog/a.flac", "train/loose.flac", "val/dog/b.flac", "elsewhere.flac")
    assert labels_of(folder) == {"train/dog/a.flac": ["dog"]}
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["loose.flac."]


def test_two_folders_of_one_name_are_named(write, caplog):
    folder = write("dog/x/a.flac", "cat/x/b.flac", "cat/y/c.flac")
    assert labels_of(folder) == {"dog/x/a.flac": ["x"], "cat/x/b.flac": ["x"], "cat/y/c.flac": ["y"]}
    (record,) = caplog.records
    assert "one class 'x': cat/x, dog/x. Rename" in record.getMessage()
    # The same class in two splits is one class.
    caplog.clear()
    labels_of(write("s/train/x/a.flac", "s/test/x/a.flac") / "s", "train+test")
    assert not caplog.records


# --------------------------------------------------------------------------------- A9 to A11: pipes, links, file names


def test_pipes_are_left_out_and_links_entered(write, tmp_path, caplog):
    folder = write("dog/a.flac")
    os.mkfifo(folder / "dog" / "p.wav")
    (tmp_path / "elsewhere").mkdir()
    (folder / "dog" / "a.flac").rename(tmp_path / "elsewhere" / "b.flac")
    (folder / "cat").symlink_to(tmp_path / "elsewhere")
    (folder / "dog" / "loop").symlink_to(folder)
    assert labels_of(folder) == {"cat/b.flac": ["cat"]}
    assert "p.wav" in caplog.text


def test_a_name_that_is_not_utf8_is_read(write, sound):
    folder = write("dog/a.flac")
    os.rename(folder / "dog" / "a.flac", os.path.join(os.fsencode(folder), b"dog", b"caf\xe9.flac"))
    os.rename(folder / "dog", os.path.join(os.fsencode(folder), b"d\xf6g"))
    source = open_source(LabelledDataConfig(str(folder), num_workers=0))
    loader = make_loader(source, SSLAMFeatureExtractor(max_length=32), batch_size=1, seed=0, repeat=False)
    (batch,) = loader
    assert batch["ids"] == ["d\\udcf6g/caf\\udce9.flac"]
    assert batch["labels"] == [["d\\udcf6g"]]
    assert not loader.skipped


# ---------------------------------------------------------------------------------------------------- B4: label files

CLASSES = [("Accordion", "/m/0mkg"), ("Male speech, man", "/t/dd00003"), ("Alarm", "/g/122z_qxw")]


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("order", ["index mid name", "index name mid", "mid index display_name", "name mid index"])
@pytest.mark.parametrize("header", [True, False])
def test_the_columns_of_a_label_file_are_recognised(table, separator, order, header):
    lines = [separator.join(order.split())] if header else []
    for index, (name, mid) in enumerate(CLASSES):
        cell = f'"{name}"' if separator == "," else name
        cells = {"index": str(index), "mid": mid, "name": cell, "display_name": cell}
        lines.append(separator.join(cells[column] for column in order.split()))
    assert read_label_table(table("\n".join(lines))) == CLASSES


def test_other_label_files_that_are_recognised(table):
    dogs = [("dog", None), ("cat", None)]
    for text in ("name\ndog\ncat\n", "dog\ncat\n", "idx;label\n0;dog\n1;cat\n", "label,index\ncat,1\ndog,0\n"):
        assert read_label_table(table(text)) == dogs
    with_ids = [("Dog", "d"), ("Cat", "c")]
    ids_last = "index,name,id\n0,Dog,d\n1,Cat,c"
    for text in ("index,label,display name\n0,d,Dog\n1,c,Cat\n", "0,d,Dog\n1,c,Cat\n", ids_last):
        assert read_label_table(table(text)) == with_ids
    assert read_label_table(table("0,/m/1\n1,/m/2\n")) == [("/m/1", None), ("/m/2", None)]


@pytest.mark.parametrize(
    "text",
    [
        "0 dog\n1 cat\n",
        "0:dog\n1:cat\n",
        "0,Dog,/m/1\n1,Cat,\n",
        "0;Dog;/m/1\n1;Cat\n",
        "/m/1,Dog\n/m/2,Cat\n",
        "a,b,c,d\n0,/m/1,Dog,x\n",
    ],
)
def test_label_files_with_unclear_columns_are_refused(table, text):
    with pytest.raises(LabelFileError, match="the lines are neither"):
        read_label_table(table(text))


def test_label_files_without_classes_are_refused(table):
    for text in ("", "\ufeff\n", "\n\n"):
        with pytest.raises(LabelFileError, match="lists no classes"):
            read_label_table(table(text))


def test_annotations_for_preparation(write, table):
    """Downloaded data sets have such faults: surplus cells, other encodings, an empty manifest, a loop of links."""
    path = table("filename,label\na.wav,Speech, human\nb.wav,Dog\n")
    with pytest.raises(PreparationError, match="line 2 has more than 2 cells"):
        list(read_table(path, ["label"]))
    path = table("filename,label\na.wav,Dog,,\nb.wav\n")
    assert list(read_table(path, [])) == [{"filename": "a.wav", "label": "Dog"}, {"filename": "b.wav", "label": ""}]
    with pytest.raises(PreparationError, match="Save it as UTF-8"):
        list(read_table(table("name\ncafé\n".encode("latin-1")), ["name"]))
    table("0,Dog\n", "label_descriptors.csv")
    with pytest.raises(PreparationError, match="empty first line: it must name the root folder"):
        manifest.list_clips(table("", "train.tsv").parent)
    folder = write("a.flac")
    (folder / "loop").symlink_to(folder)
    assert sound_files(folder) == [folder / "a.flac"]


# ------------------------------------------------------------------------------------------------------ B9: a server


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder, ignores_range):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.ignores_range, self.ranges = folder, ignores_range, Counter()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        data = (self.server.folder / self.path.strip("/")).read_bytes()
        total, wanted = len(data), self.headers.get("Range")
        kept = False
        if wanted:
            first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
            kept = not self.server.ignores_range()
            self.server.ranges[kept] += 1
        if kept:
            data = data[first : last + 1]
        self.send_response(206 if kept else 200)
        if kept:
            self.send_header("Content-Range", f"bytes {first}-{min(last, total - 1)}/{total}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)


@pytest.fixture
def serve(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "FIRST_RETRY_SECONDS", 0.01)
    servers = []

    def serve(folder, ignores_range):
        servers.append(Server(folder, ignores_range))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
        return servers[-1], f"http://127.0.0.1:{servers[-1].server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_answer_that_ignores_the_range_is_retried(tmp_path, serve, sound, num_workers):
    rows = [{"id": str(i), "audio": {"bytes": sound, "path": f"{i}.flac"}} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=4)
    failing = False
    server, url = serve(tmp_path, lambda: failing and server.ranges[False] < 3)
    config = DataConfig("parquet", data_files=[f"{url}/x.parquet"], num_workers=num_workers, shuffle_buffer=4)
    source, failing = open_source(config), True
    loader = make_loader(source, SSLAMFeatureExtractor(max_length=32), batch_size=4, seed=0, repeat=False)
    assert sorted(int(id_) for batch in loader for id_ in batch["ids"]) == list(range(40))
    assert server.ranges[False] == 3
    assert not loader.skipped


def test_a_server_without_ranges_ends_the_run_with_its_reason(tmp_path, serve, sound, caplog):
    rows = [{"id": str(i), "audio": {"bytes": sound, "path": f"{i}.flac"}} for i in range(40)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet", row_group_size=4)
    failing = False
    _, url = serve(tmp_path, lambda: failing)
    config = DataConfig("parquet", data_files=[f"{url}/x.parquet"], num_workers=0, max_retries=2)
    source, failing = open_source(config), True
    loader = make_loader(source, SSLAMFeatureExtractor(max_length=32), batch_size=4, seed=0)
    with pytest.raises(ValueError, match="range requests"):
        next(iter(loader))
    assert caplog.text.count("; retry ") == 2


def test_other_value_errors_are_not_retried(caplog):
    calls = []

    def act():
        calls.append(1)
        raise ValueError("of the data")

    with pytest.raises(ValueError, match="of the data"):
        stream.with_retries(act, 5, "x")
    assert len(calls) == 1


# ------------------------------------------------------------------------------------------------ B10: lists as words


@dataclass
class Lists:
    folds: list[str] | None = None
    sizes: list[int] | None = None
    pair: tuple[float, float] = (0.9, 0.95)
    name: str = "x"


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("--folds fold1 fold2 --name y", Lists(["fold1", "fold2"], name="y")),
        ("--folds fold1,fold2", Lists(["fold1", "fold2"])),
        ("--folds fold1, fold2", Lists(["fold1", "fold2"])),
        ("--folds fold1 , fold2", Lists(["fold1", "fold2"])),
        ("--folds=fold1,fold2", Lists(["fold1", "fold2"])),
        ("--folds [fold1, fold2]", Lists(["fold1", "fold2"])),
        ("--folds fold1", Lists(["fold1"])),
        ("--folds null", Lists(None)),
        ("--sizes 1 -2 3", Lists(sizes=[1, -2, 3])),
        ("--pair 0.5 1", Lists(pair=(0.5, 1.0))),
    ],
)
def test_lists_as_several_words(words, wanted):
    assert parse(Lists, words.split()) == wanted


@pytest.mark.parametrize("words", ["--name a b", "--pair 1 2 3", "--folds", "--sizes 1 x"])
def test_words_too_many_are_refused(words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Lists, words.split())
    assert stop.value.code == 2


# ----------------------------------------------------------------------------------------------- C11: spawned workers


@pytest.fixture
def spawned():
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


@pytest.mark.slow
def test_a_spawned_worker_gives_the_same_clips(write, table, spawned, tmp_path):
    names = [f"{label}/{i}.flac" for label in ("dog", "cat") for i in range(8)]
    folder = write(*names)
    weights = table("id,weight\n" + "".join(f"{name},{1 + i}\n" for i, name in enumerate(names)), "w.csv")
    clips = {}
    for num_workers in (0, 1):
        config = LabelledDataConfig(
            str(folder), hold_out=0.3, sample_weights=str(weights), clips_per_epoch=9, num_workers=num_workers
        )
        loader = make_loader(
            open_source(config),
            SSLAMFeatureExtractor(max_length=32),
            batch_size=2,
            seed=0,
            repeat=False,
            augment=roll_and_gain,
        )
        clips[num_workers] = [
            (id_, labels, values.sum().item())
            for batch in loader
            for id_, labels, values in zip(batch["ids"], batch["labels"], batch["input_values"], strict=True)
        ]
    assert clips[0] == clips[1]
    assert 0 < len(clips[0]) <= 9

"""Writing of dataset folders."""

import datasets
import pyarrow.parquet as pq
import pytest

from modeling_sslam.common.files import temporary_path
from training.preparation.shards import card_header, new_folder, write_labels, write_shards

FEATURES = datasets.Features({"id": datasets.Value("string"), "value": datasets.Value("int64")})


def rows(count):
    return ({"id": str(i), "value": i} for i in range(count))


@pytest.mark.parametrize(
    ("limits", "sizes"),
    [
        ({"max_rows": 4, "rows_per_group": 2}, [4, 4, 1]),
        ({"max_rows": 100, "rows_per_group": 2, "max_bytes": 1}, [2, 2, 2, 2, 1]),
        ({"max_rows": 9, "rows_per_group": 3}, [9]),
        ({"max_rows": 100}, [9]),
    ],
)
def test_shards_end_with_the_group_that_reaches_a_limit(tmp_path, limits, sizes):
    assert write_shards(tmp_path, "train", rows(9), FEATURES, **limits) == 9
    paths = sorted((tmp_path / "data").iterdir())
    assert [path.name for path in paths] == [f"train-{i:05d}-of-{len(sizes):05d}.parquet" for i in range(len(sizes))]
    assert [pq.ParquetFile(path).metadata.num_rows for path in paths] == sizes
    assert [value for path in paths for value in pq.read_table(path)["value"].to_pylist()] == list(range(9))
    (tmp_path / "README.md").write_text(card_header(["train"]))
    loaded = datasets.load_dataset(str(tmp_path), split="train", streaming=True)
    assert loaded.features == FEATURES


def test_a_split_without_rows_has_no_shards(tmp_path):
    assert write_shards(tmp_path, "train", rows(0), FEATURES, max_rows=4) == 0
    assert not list((tmp_path / "data").iterdir())


def test_labels_are_written_with_and_without_machine_ids(tmp_path):
    write_labels(tmp_path, ["a, b", "c"])
    assert (tmp_path / "labels.csv").read_text() == 'index,label\n0,"a, b"\n1,c\n'
    write_labels(tmp_path, ["a", "c"], ["/m/0", None])
    assert (tmp_path / "labels.csv").read_text() == "index,mid,label\n0,/m/0,a\n1,,c\n"


def test_a_folder_gets_its_name_on_success_only(tmp_path):
    out = tmp_path / "deeper" / "out"

    def write(text, error=None):
        with new_folder(out) as folder:
            (folder / "file").write_text(text)
            assert not out.exists()
            if error:
                raise error

    with pytest.raises(RuntimeError, match="half way"):
        write("half", RuntimeError("half way"))
    assert not list(out.parent.iterdir())
    leftover = temporary_path(out)  # left by a process that was killed
    leftover.mkdir()
    (leftover / "half").touch()
    write("whole")
    assert [path.name for path in out.iterdir()] == ["file"]
    assert (out / "file").read_text() == "whole"
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="out"):
        write("other")
    assert (out / "file").read_text() == "whole"

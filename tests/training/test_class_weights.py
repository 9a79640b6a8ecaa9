"""Sampling weights: their closed form, the table, and that no audio is read."""

import csv

import numpy as np
import pyarrow.parquet as pq
import pytest

from training import class_weights
from training.class_weights import clip_weights
from training.data.config import DataConfig
from training.data.loader import make_loader
from training.data.selection import WeightedDraw
from training.data.sources import open_source


def read_table(path):
    with open(path, newline="") as file:
        return {row["id"]: float(row["weight"]) for row in csv.DictReader(file)}


def test_weights_of_a_small_case():
    weights = clip_weights([["a"], ["a", "b"], [], ["a", "c", "c"], ("b",)])
    a, b, c = 1000 / 3.01, 1000 / 2.01, 1000 / 1.01
    np.testing.assert_allclose(weights, [a, a + b, 0, a + c, b], rtol=1e-15)
    assert weights.dtype == np.float64
    assert clip_weights([]).shape == (0,)


def test_every_class_weighs_the_same():
    """With one label per clip, the weights of a class's n clips sum to 1000 n / (n + 0.01)."""
    labels = [["common"]] * 400 + [["rare"]] * 4
    weights = clip_weights(labels)
    assert weights[:400].sum() == pytest.approx(1000 * 400 / 400.01, rel=1e-12)
    assert weights[400:].sum() == pytest.approx(1000 * 4 / 4.01, rel=1e-12)


@pytest.fixture
def two_splits(tmp_path, write_parquet):
    """Write the splits train (clip000 to clip004) and test (other0 to other3). The number modulo 3 is the label."""
    write_parquet(tmp_path / "data", [3, 2])
    (path,) = write_parquet(tmp_path / "more", [4])
    table = pq.read_table(path)
    table = table.set_column(0, "video_id", [[f"other{i}" for i in range(4)]])
    pq.write_table(table, tmp_path / "data" / "test-00000-of-00001.parquet")
    return tmp_path / "data"


@pytest.fixture
def destroy_audio():
    """Overwrite the audio in a parquet file, so that reading it fails."""

    def destroy(path):
        metadata = pq.ParquetFile(path).metadata
        for group in range(metadata.num_row_groups):
            columns = [metadata.row_group(group).column(i) for i in range(metadata.num_columns)]
            (column,) = (column for column in columns if column.path_in_schema == "audio.bytes")
            start = min(offset for offset in (column.data_page_offset, column.dictionary_page_offset) if offset)
            with open(path, "r+b") as file:
                file.seek(start)
                file.write(b"\xff" * column.total_compressed_size)
        with pytest.raises(OSError, match=r"."):
            pq.read_table(path)

    return destroy


def test_a_parquet_source_is_read_without_its_audio(two_splits, destroy_audio, tmp_path, capsys):
    for path in two_splits.iterdir():
        destroy_audio(path)
    arguments = ["--data", str(two_splits), "--data.split", "train+test", "--data.label_column", "human_labels"]
    class_weights.main([*arguments, "--output", str(tmp_path / "new" / "weights.csv")])
    # Labels of the nine clips: 0 1 2 0 1 and 0 1 2 0.
    expected = {0: 1000 / 4.01, 1: 1000 / 3.01, 2: 1000 / 2.01}
    assert read_table(tmp_path / "new" / "weights.csv") == {
        f"{name}{i:0{width}d}": expected[i % 3]
        for name, width, count in (("clip", 3, 5), ("other", 1, 4))
        for i in range(count)
    }
    assert "9 clips, weights 249.4 to 497.5; 0 clips without a label" in capsys.readouterr().out


def test_the_loader_draws_clips_by_the_table(two_splits, tmp_path, extractor):
    output = tmp_path / "weights.csv"
    class_weights.main(["--data", str(two_splits), "--output", str(output)])
    config = DataConfig(
        str(two_splits), label_column="labels", num_workers=0, sample_weights=str(output), clips_per_epoch=3
    )
    loader = make_loader(open_source(config), extractor, batch_size=8, seed=0, repeat=False)
    (batch,) = loader
    draw = WeightedDraw(output, 3, 0)
    assert sorted(batch["ids"]) == [id_ for id_ in sorted(read_table(output)) if draw(id_, 0)]
    assert len(batch["ids"]) == 3


def test_labels_of_a_folder_of_folders(make_folder, tmp_path):
    make_folder(5, first="clips")
    class_weights.main(["--data", str(tmp_path / "clips"), "--output", str(tmp_path / "weights.csv")])
    assert read_table(tmp_path / "weights.csv") == {
        **{f"clips/clip00{i}.flac": 1000 / 3.01 for i in (0, 2, 4)},
        **{f"deeper/clip00{i}.flac": 1000 / 2.01 for i in (1, 3)},
    }


def test_wrong_input_is_rejected(two_splits, tmp_path, write_parquet):
    output = tmp_path / "weights.csv"

    def refused(match, *arguments):
        with pytest.raises(SystemExit, match=match):
            class_weights.main(["--output", str(output), *arguments])

    refused("has no column 'nothing'", "--data", str(two_splits), "--data.label_column", "nothing")
    assert not output.exists()
    output.write_text("precious")
    refused("exists already; name another file, or add --overwrite true", "--data", str(two_splits))
    assert output.read_text() == "precious"
    class_weights.main(["--data", str(two_splits), "--output", str(output), "--overwrite", "true"])
    assert len(read_table(output)) == 5
    output.unlink()
    write_parquet(tmp_path / "twice", [3])
    (tmp_path / "twice" / "train-00001-of-00002.parquet").write_bytes(
        (tmp_path / "twice" / "train-00000-of-00001.parquet").read_bytes()
    )
    refused("3 ids of .* name several clips, such as 'clip000'", "--data", str(tmp_path / "twice"))
    assert not output.exists()

import pytest
import torch

from modeling_sslam import SSLAMConfig
from training.data.config import DataConfig, DataError
from training.data.labels import LabelSet, find_label_set, survey
from training.data.sources import open_source


def test_targets_are_in_the_order_of_the_classes():
    labels = LabelSet(["cat", "dog", "rain"], ["/m/01", "/m/02", None])
    targets = labels.encode([["dog"], [], ["rain", "/m/01", "rain"]])
    assert targets.dtype == torch.float32
    assert targets.tolist() == [[0, 1, 0], [0, 0, 0], [1, 0, 1]]
    with pytest.raises(DataError, match="label 'cow', which is none of the 3 classes"):
        labels.encode([["cow"]])


def test_classes_of_a_model_and_of_files(tmp_path):
    assert LabelSet.of_model(SSLAMConfig(id2label={0: "b", 1: "a"})).names == ["b", "a"]
    (tmp_path / "mids.csv").write_text('index,mid,display_name\n0,/m/1,"Speech, male"\n1,/m/2,Music\n')
    labels = LabelSet.of_file(tmp_path / "mids.csv")
    assert labels.names == ["Speech, male", "Music"]
    assert labels.encode([["/m/2"], ["Speech, male"]]).tolist() == [[0, 1], [1, 0]]
    (tmp_path / "broken.csv").write_text("0,a\n2,b\n")
    with pytest.raises(ValueError, match="class 1 is missing"):
        LabelSet.of_file(tmp_path / "broken.csv")


def test_classes_come_from_a_label_file_or_the_data(tmp_path, write_parquet, make_folder):
    write_parquet(tmp_path / "data", [4])
    config = DataConfig(str(tmp_path / "data"), label_column="human_labels")
    assert find_label_set(open_source(config)) is None
    (tmp_path / "data" / "labels.csv").write_text("index,label\n0,class 1\n1,class 0\n2,class 2\n")
    assert find_label_set(open_source(config)).names == ["class 1", "class 0", "class 2"]
    (tmp_path / "own.csv").write_text("x\ny\n")
    assert find_label_set(open_source(config), str(tmp_path / "own.csv")).names == ["x", "y"]
    # A plain folder has no table of classes.
    folder = make_folder(2)
    config = DataConfig(str(folder), label_column="auto")
    assert find_label_set(open_source(config)) is None


def test_a_survey_counts_the_clips_that_take_part(tmp_path, write_parquet):
    write_parquet(tmp_path / "data", [7, 6])
    config = DataConfig(str(tmp_path / "data"), label_column="human_labels")
    found = survey(open_source(config))
    assert found.num_clips == 13
    assert found.counts == {"class 0": 5, "class 1": 4, "class 2": 4}
    assert found.is_single_label

    sides = []
    for held_out in (False, True):
        config = DataConfig(str(tmp_path / "data"), label_column="labels", hold_out=0.4, held_out=held_out)
        sides.append(survey(open_source(config)))
    assert sum(side.num_clips for side in sides) == 13
    assert sides[0].counts + sides[1].counts == {"/m/0": 5, "/m/1": 4, "/m/2": 4}

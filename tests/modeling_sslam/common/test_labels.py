"""Class names from label files in every form."""

import csv

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeling_sslam.common.labels import AUDIOSET_LABELS, NAME_HEADERS, LabelFileError, audioset_labels, read_labels

NAMES = st.lists(
    st.text(st.characters(blacklist_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1)
    .map(str.strip)
    .filter(lambda name: name and not name.isdecimal() and name.lower() not in NAME_HEADERS),
    min_size=1,
    unique=True,
)


def test_audioset_has_its_527_classes():
    names = audioset_labels()
    assert len(names) == len(set(names)) == 527
    with AUDIOSET_LABELS.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"index": "0", "mid": "/m/09x0r", "display_name": "Speech"}
    assert rows[526] == {"index": "526", "mid": "/m/07hvw1", "display_name": "Field recording"}
    assert len({row["mid"] for row in rows}) == 527
    assert all(row["mid"].startswith(("/m/", "/t/", "/g/")) for row in rows)


@given(names=NAMES, columns=st.integers(1, 3), header=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_every_form_has_the_names_in_order(names, columns, header, tmp_path):
    rows = [[str(i), f"/m/{i}", name][-columns:] if columns != 2 else [str(i), name] for i, name in enumerate(names)]
    if header and columns > 1:
        rows.insert(0, ["index", "mid", "display_name"][:columns])
    with (tmp_path / "labels.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, quoting=csv.QUOTE_ALL).writerows(rows)
    assert read_labels(tmp_path / "labels.csv") == names


def test_rows_may_come_in_any_order(tmp_path):
    (tmp_path / "labels.csv").write_text("1,cat\n0,dog\n")
    assert read_labels(tmp_path / "labels.csv") == ["dog", "cat"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("0,dog\n2,cat\n", "class 1 is missing"),
        ("0,dog\n0,cat\n", "class 1 is missing"),
        ("0,/m/0,dog,extra\n", "lines are neither"),
        ("dog\ndog\n", "class 1 is named 'dog'"),
        ('0,dog\n1,""\n', "class 1 is named ''"),
    ],
)
def test_labels_that_contradict_each_other(text, named, tmp_path):
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(LabelFileError, match=named):
        read_labels(tmp_path / "labels.csv")


def test_a_missing_label_file(tmp_path):
    with pytest.raises(LabelFileError, match="cannot be read"):
        read_labels(tmp_path / "labels.csv")

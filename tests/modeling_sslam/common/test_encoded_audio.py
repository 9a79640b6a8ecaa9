"""The columns of data sets that hold sounds and their names."""

import datasets
import pytest

from modeling_sslam.common.encoded_audio import EncodedAudio, find_audio_column, find_id_column

STRING = datasets.Value("string")


@pytest.mark.parametrize(
    ("features", "wanted", "expected"),
    [
        ({"id": STRING, "sound": datasets.Audio()}, None, "sound"),
        ({"id": STRING, "sound": EncodedAudio()}, None, "sound"),
        ({"audio": STRING, "sound": datasets.Audio()}, None, "sound"),
        ({"audio": STRING, "path": STRING}, None, "audio"),
        ({"left": datasets.Audio(), "right": datasets.Audio()}, "right", "right"),
        ({"path": STRING}, "path", "path"),
    ],
)
def test_audio_column(features, wanted, expected):
    assert find_audio_column("a/b", features, wanted, "--audio-column") == expected


@pytest.mark.parametrize(
    ("features", "wanted", "message"),
    [
        (
            {"id": STRING, "left": datasets.Audio(), "right": datasets.Audio()},
            None,
            r"a/b has several audio columns; choose one of left, right \(--audio-column\)\.",
        ),
        ({"id": STRING, "path": STRING}, None, r"no audio columns; choose one of id, path \(--audio-column\)\."),
        ({"id": STRING, "audio": STRING}, "sound", r"a/b has no column 'sound'; it has id, audio\."),
    ],
)
def test_no_audio_column(features, wanted, message):
    with pytest.raises(ValueError, match=message):
        find_audio_column("a/b", features, wanted, "--audio-column")


@pytest.mark.parametrize(
    ("names", "wanted", "expected"),
    [
        (["id", "video_id", "name"], None, "video_id"),
        (["__key__", "id"], None, "id"),
        (["name"], None, None),
        (["id", "name"], "name", "name"),
    ],
)
def test_id_column(names, wanted, expected):
    assert find_id_column("a/b", dict.fromkeys(names, STRING), wanted) == expected


def test_no_id_column():
    with pytest.raises(ValueError, match=r"a/b has no column 'name'; it has id, audio\."):
        find_id_column("a/b", dict.fromkeys(["id", "audio"], STRING), "name")


def test_audio_stays_encoded():
    features = datasets.Features({"audio": EncodedAudio()})
    rows = [{"audio": b"bytes"}, {"audio": "path.wav"}, {"audio": {"bytes": b"both", "path": "name"}}]
    assert datasets.Dataset.from_list(rows, features=features)["audio"][:] == [
        {"bytes": b"bytes", "path": None},
        {"bytes": None, "path": "path.wav"},
        {"bytes": b"both", "path": "name"},
    ]

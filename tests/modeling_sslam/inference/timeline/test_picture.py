"""Pictures of timelines."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from modeling_sslam.feature_extraction_sslam import mel_filters
from modeling_sslam.inference import Event, EventSettings, Timeline
from modeling_sslam.inference.timeline import picture as picture_module
from modeling_sslam.inference.timeline.picture import BoundedColumns, TimelinePicture, mel_bin


@pytest.mark.parametrize("reduce", [np.mean, np.max])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 16, 100, 1000])
def test_number_of_columns_is_bounded(reduce, count):
    vectors = np.random.default_rng(0).random((count, 3))
    columns = BoundedColumns(4, reduce)
    for part in np.array_split(vectors, min(5, count)):
        columns.add(part)
    found, size = columns.columns(), columns.vectors_per_column
    assert len(found) <= 8
    assert size == 1 or len(found) >= 4
    expected = [reduce(vectors[start : start + size], axis=0) for start in range(0, count, size)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_mel_bin_is_the_centre_of_its_filter():
    filters = mel_filters(128, 16_000, 512)
    for k in (60, 90, 127):
        peak = float(filters[:, k].argmax()) * 16_000 / 512
        assert mel_bin(peak, 128, 16_000) == pytest.approx(k, abs=0.6)
    assert mel_bin(8_000, 128, 16_000) == pytest.approx(128)


def make_picture(timeline: Timeline, scores: np.ndarray) -> TimelinePicture:
    picture = TimelinePicture(16_000, 0.01)
    for block in torch.randn(round(timeline.duration * 100), 128).split(2_000):
        picture.add_frames(block)
    for start, row in zip(timeline.starts, scores, strict=True):
        picture.add_scores(start, row)
    return picture


def make_timeline(events: list[Event], duration: float, hop: float = 0.5, num_labels: int = 12) -> Timeline:
    starts = np.arange(0, duration - 2 + 1e-9, hop)
    labels = [f"class {k}" for k in range(num_labels)]
    return Timeline(events, labels, duration, 2.0, hop, EventSettings(), starts, path="/recordings/night.wav")


def test_picture_shows_spectrogram_curves_and_events(tmp_path):
    events = [Event(0.0, 3.0, "class 5", 0.9), Event(4.0, 5.0, "class 2", 0.7), Event(6.0, 6.5, "class 5", 0.6)]
    timeline = make_timeline(events, 10.0)
    scores = np.random.default_rng(0).random((len(timeline.starts), 12))
    picture = make_picture(timeline, scores)
    spectrogram, curves, bars = picture.figure(timeline).axes
    assert spectrogram.get_title("left") == "night.wav"
    assert spectrogram.images[0].get_extent() == pytest.approx([0, 10, -0.5, 127.5])
    assert [text.get_text() for text in bars.get_yticklabels()] == ["class 5", "class 2"]
    boxes = [
        [path.get_extents().intervalx.tolist() for path in collection.get_paths()] for collection in bars.collections
    ]
    assert boxes == [[[0, 3], [6, 6.5]], [[4, 5]]]
    assert bars.get_xlim() == (0, 10)
    assert bars.get_xlabel() == "time in seconds"
    values = {tuple(patch.get_data().values) for patch in curves.patches}
    assert values == {tuple(scores[:, 5]), tuple(scores[:, 2])}
    edges = curves.patches[0].get_data().edges
    assert edges[:3].tolist() == [0, 1.25, 1.75]
    assert edges[-1] == 10
    picture.save(timeline, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_picture_without_events_shows_the_highest_classes():
    timeline = make_timeline([], 10.0)
    scores = np.zeros((len(timeline.starts), 12))
    scores[3, [7, 1, 4]] = 0.4, 0.3, 0.2
    bars = make_picture(timeline, scores).figure(timeline).axes[2]
    assert [text.get_text() for text in bars.get_yticklabels()] == ["class 7", "class 1", "class 4"]


def test_picture_shows_the_classes_with_the_longest_events():
    events = [Event(k, k + 1 + 0.1 * k, f"class {k}", 0.9) for k in range(12)]
    timeline = make_timeline(events, 30.0)
    spectrogram, _, bars = make_picture(timeline, np.zeros((len(timeline.starts), 12))).figure(timeline).axes
    assert spectrogram.get_title("left") == "night.wav: 8 of the 12 classes with events"
    assert [text.get_text() for text in bars.get_yticklabels()] == [f"class {k}" for k in range(11, 3, -1)]


@pytest.mark.parametrize(
    ("duration", "hop", "label", "ticks"),
    [
        (600.0, 1.0, "time (min:s)", ["0:00", "1:00", "2:00"]),
        (36_000.0, 4.0, "time (h:min:s)", ["0:00:00", "1:00:00"]),
    ],
)
def test_long_recordings_have_few_columns_and_readable_ticks(monkeypatch, duration, hop, label, ticks):
    monkeypatch.setattr(picture_module, "MAX_COLUMNS", 64)
    timeline = make_timeline([Event(100.0, 200.0, "class 0", 0.9)], duration, hop, num_labels=1)
    scores = (timeline.starts / duration)[:, None]
    picture = TimelinePicture(16_000, 0.01)
    for _ in range(round(duration / 100)):
        picture.add_frames(torch.zeros(10_000, 1))
    for start, row in zip(timeline.starts, scores, strict=True):
        picture.add_scores(start, row)
    spectrogram, curves, bars = picture.figure(timeline).axes
    assert spectrogram.images[0].get_array().shape[1] <= 128
    data = curves.patches[0].get_data()
    assert len(data.values) <= 128
    # The curve has the score of its time, although its columns are coarse.
    middles = (data.edges[1:] + data.edges[:-1]) / 2
    np.testing.assert_allclose(data.values, middles / duration, atol=0.02)
    assert bars.get_xlabel() == label
    formatted = [bars.xaxis.get_major_formatter()(tick) for tick in bars.get_xticks() if 0 <= tick <= duration]
    assert formatted[: len(ticks)] == ticks
    assert len(formatted) <= 13


def test_dollar_signs_in_names_are_text(tmp_path):
    timeline = replace(make_timeline([], 10.0), path="/recordings/a$\\frac{$b.wav")
    timeline.labels[7] = "$x_"
    picture = make_picture(timeline, np.eye(len(timeline.starts), 12))
    picture.save(timeline, tmp_path / "picture.png")
    assert picture.figure(timeline).axes[0].get_title("left") == "a$\\frac{$b.wav"

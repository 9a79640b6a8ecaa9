"""Events from scores, compared with closed forms and with scipy's median filter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import median_filter

from modeling_sslam.inference import Event, EventSettings, InferenceError
from modeling_sslam.inference.timeline.events import EventDetector, Hysteresis, MedianFilter, Span, to_events


def spans(scores: list[float], threshold: float, release: float) -> list[tuple[int, int, float]]:
    hysteresis = Hysteresis(threshold, release)
    found = hysteresis.push(np.array(scores)[:, None]) + hysteresis.finish()
    assert {span.label for span in found} <= {0}
    return [span[1:] for span in found]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.2, 0.1], []),
        ([0.4, 0.4, 0.4], []),  # never reaches the threshold
        ([0.1, 0.9, 0.1], [(1, 1, 0.9)]),
        ([0.3, 0.5, 0.3, 0.2], [(0, 2, 0.5)]),  # begins before the threshold, ends after it
        ([0.6, 0.3, 0.7, 0.29], [(0, 2, 0.7)]),  # one event, although the score wavers
        ([0.6, 0.29, 0.7], [(0, 0, 0.6), (2, 2, 0.7)]),
        ([0.2, 0.9, 0.9], [(1, 2, 0.9)]),  # lasts to the end
        ([], []),
    ],
)
def test_hysteresis(scores, expected):
    assert spans(scores, 0.5, 0.3) == expected


def test_equal_threshold_and_release_select_scores_above_them():
    scores = np.random.default_rng(0).random(200)
    inside = np.zeros(200, bool)
    for first, last, score in spans(list(scores), 0.6, 0.6):
        inside[first : last + 1] = True
        assert score == scores[first : last + 1].max()
    assert (inside == (scores >= 0.6)).all()


@pytest.mark.parametrize("width", [1, 3, 5, 9])
@pytest.mark.parametrize("length", [1, 2, 7, 50])
def test_median_filter_equals_scipy(width, length):
    scores = np.random.default_rng(0).random((length, 3)).astype(np.float32)
    median = MedianFilter(width)
    filtered = [median.push(part) for part in np.array_split(scores, min(4, length))]
    filtered = np.concatenate([*filtered, median.finish()])
    np.testing.assert_array_equal(filtered, median_filter(scores, size=(width, 1), mode="nearest"))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.sampled_from([1, 3, 5]), st.integers(0, 2**32 - 1))
def test_events_do_not_depend_on_blocks(sizes, median, seed):
    scores = np.random.default_rng(seed).random((sum(sizes), 2))
    options = EventSettings(threshold=0.7, release=0.4, median=median)
    whole, parts = EventDetector(options), EventDetector(options)
    whole.push(scores)
    for part in np.split(scores, np.cumsum(sizes)[:-1]):
        parts.push(part)
    assert parts.finish() == whole.finish()


def test_median_removes_outliers_and_dropouts():
    detector = EventDetector(EventSettings(median=3))
    detector.push(np.array([0, 0.9, 0, 0, 0.8, 0.8, 0, 0.9, 0.8, 0])[:, None])
    assert detector.finish() == [Span(0, 4, 8, 0.8)]


def test_spans_are_sorted_by_their_first_window():
    detector = EventDetector(EventSettings(median=1))
    detector.push(np.array([[0, 0.9], [0.9, 0.9], [0, 0.9], [0.8, 0]]))
    assert detector.finish() == [Span(1, 0, 2, 0.9), Span(0, 1, 1, 0.9), Span(0, 3, 3, 0.8)]


BORDERS = np.array([0.0, 1.25, 1.75, 2.25, 4.0])


def test_spans_are_converted_to_seconds():
    events = to_events([Span(1, 0, 0, 0.9), Span(0, 1, 3, 0.8)], BORDERS, ["a", "b"], EventSettings())
    assert events == [Event(0.0, 1.25, "b", 0.9), Event(1.25, 4.0, "a", 0.8)]


def test_events_of_a_class_are_joined_across_short_gaps():
    found = [Span(0, 0, 0, 0.6), Span(1, 1, 1, 0.9), Span(0, 2, 2, 0.7)]
    apart = to_events(found, BORDERS, ["a", "b"], EventSettings(max_gap=0.4))
    assert [event.label for event in apart] == ["a", "b", "a"]
    joined = to_events(found, BORDERS, ["a", "b"], EventSettings(max_gap=0.5))
    assert joined == [Event(0.0, 2.25, "a", 0.7), Event(1.25, 1.75, "b", 0.9)]


def test_short_events_are_dropped_after_joining():
    found = [Span(0, 1, 1, 0.6), Span(0, 2, 2, 0.7), Span(1, 1, 1, 0.9)]
    events = to_events(found, BORDERS, ["a", "b"], EventSettings(min_duration=0.6))
    assert events == [Event(1.25, 2.25, "a", 0.7)]


def test_release_defaults_to_half_the_threshold():
    assert EventSettings(threshold=0.6).release == 0.3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": 0.5, "release": 0.6}, "release=0.6"),
        ({"threshold": 0.0}, "threshold=0"),
        ({"threshold": 1.5}, "threshold=1.5"),
        ({"median": 4}, "median=4 must be an odd number"),
        ({"median": -1}, "median=-1"),
    ],
)
def test_contradicting_settings_are_rejected(options, message):
    with pytest.raises(InferenceError, match=message):
        EventSettings(**options)

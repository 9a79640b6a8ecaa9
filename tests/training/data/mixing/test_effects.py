"""Effects on tones, whose pitch and length can be measured."""

from fractions import Fraction

import numpy as np
import pytest

from training.data.mixing.effects import (
    MAX_PITCH_DENOMINATOR,
    active_frames,
    fade_edges,
    loop,
    pitch_ratio,
    reverberate,
    rms,
    shift_and_stretch,
)

RATE = 16_000


def tone(frequency, seconds=1.0):
    return np.sin(2 * np.pi * frequency / RATE * np.arange(round(seconds * RATE))).astype(np.float32)


def frequency_of(waveform):
    middle = waveform[len(waveform) // 4 : -len(waveform) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle)), 1 << 17))
    return spectrum.argmax() * RATE / (1 << 17)


@pytest.mark.parametrize(("semitones", "stretch"), [(0, 1.5), (0, 0.7), (5, 1.0), (-7, 1.0), (3, 1.3), (-3.5, 0.8)])
def test_pitch_and_length_change_separately(semitones, stretch):
    changed = shift_and_stretch(tone(800), RATE, pitch_ratio(semitones), stretch)
    assert changed.dtype == np.float32
    assert len(changed) == pytest.approx(stretch * RATE, abs=2)
    assert frequency_of(changed) == pytest.approx(800 * 2 ** (semitones / 12), rel=0.01)


def test_a_sound_without_changes_stays_as_it_is():
    sound = tone(300)
    np.testing.assert_array_equal(shift_and_stretch(sound, RATE, Fraction(1), 1.0), sound)


@pytest.mark.parametrize("num_samples", [3, 4, 5, 31, 320, 512, 513, 1024, 1025])
def test_a_sound_shorter_than_the_vocoder_window_has_its_length_changed(num_samples):
    for semitones, stretch in ((2, 1.2), (0, 0.7), (-3, 1.5)):
        changed = shift_and_stretch(tone(1000)[:num_samples], RATE, pitch_ratio(semitones), stretch)
        assert len(changed) == pytest.approx(stretch * num_samples, abs=2)
        assert np.isfinite(changed).all()
        assert rms(changed) > 0.1


def test_two_samples_are_not_stretched():
    for num_samples in (1, 2):
        assert len(shift_and_stretch(tone(1000)[:num_samples], RATE, Fraction(1), 1.5)) == num_samples


@pytest.mark.parametrize("semitones", np.linspace(-12, 12, 49).tolist())
def test_the_rounded_pitch_is_within_14_cents(semitones):
    ratio = pitch_ratio(semitones)
    assert ratio.denominator <= MAX_PITCH_DENOMINATOR
    assert 100 * abs(12 * np.log2(float(ratio)) - semitones) <= 14


def test_frames_far_below_the_loudest_are_silent():
    sound = np.concatenate([np.zeros(3200), tone(500, 0.2), 0.002 * tone(500, 0.2), 0.05 * tone(500, 0.2)])
    assert active_frames(sound.astype(np.float32), RATE, 40).tolist() == [*range(10, 20), *range(30, 40)]
    assert active_frames(sound.astype(np.float32), RATE, 60).tolist() == list(range(10, 40))
    assert active_frames(np.zeros(1000, np.float32), RATE, 40).tolist() == []


def test_reverberation_keeps_the_sound_in_place_and_adds_a_tail():
    response = np.zeros(500, np.float32)
    response[100], response[300] = 1.0, 0.5
    sound = tone(500, 0.1)
    wet = reverberate(sound, response)
    expected = np.zeros(len(sound) + 399)
    expected[: len(sound)] += sound
    expected[200 : 200 + len(sound)] += 0.5 * sound
    np.testing.assert_allclose(wet, expected, atol=1e-5)


def test_a_long_recording_is_cut_at_the_place_and_a_short_one_repeats():
    numbers = np.arange(100, dtype=np.float32)
    np.testing.assert_array_equal(loop(numbers, 10, 0.0, RATE), numbers[:10])
    np.testing.assert_array_equal(loop(numbers, 10, 0.999, RATE), numbers[90:])
    noise = np.random.default_rng(0).standard_normal(RATE // 4).astype(np.float32)
    looped = loop(noise, RATE, 0.3, RATE)
    assert len(looped) == RATE
    # A period is the recording without a quarter of it, which fades into the beginning.
    period = len(noise) - len(noise) // 4
    np.testing.assert_array_equal(looped[period:], looped[:-period])
    levels = [rms(block) for block in looped.reshape(-1, 800)]
    assert max(levels) < 1.2 * min(levels)


def test_edges_fade_from_zero_to_the_full_level():
    faded = fade_edges(np.ones(100), 10)
    assert faded[0] == faded[-1] == pytest.approx(0.1)
    np.testing.assert_array_equal(faded[9:-9], 1)
    assert fade_edges(np.ones(3), 10).shape == (3,)

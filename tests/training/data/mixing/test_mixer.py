"""Scenes: levels, places, labels, faults, and independence of the cache and of earlier scenes."""

import numpy as np
import pytest
import soundfile
import torch

from modeling_sslam.common.errors import ClipError
from training.data.mixing import recordings as recordings_module
from training.data.mixing.effects import rms
from training.data.mixing.mixer import PEAK, excerpt_bounds
from training.data.mixing.recordings import Sound, SoundCache
from training.data.mixing.settings import SceneSettings
from training.data.seeding import generator_for
from training.data.sources import open_scene_pools

RATE = 16_000
LENGTH = 2 * RATE


@pytest.fixture(scope="module")
def sounds(write_sounds, tmp_path_factory):
    return write_sounds(tmp_path_factory.mktemp("sounds") / "sounds")


@pytest.fixture
def make_mixer(sounds):
    """A function that returns the mixer of all recordings with changed settings."""

    def make_mixer(**changes):
        changes = {"sounds": str(sounds), "max_sources": 3, "splits": ["all=1"]} | changes
        return open_scene_pools(SceneSettings(**changes))["all"].mixer

    return make_mixer


def mix(mixer, *key):
    return mixer.mix(generator_for(*key), LENGTH, RATE)


def band(waveform, low, high):
    spectrum = np.fft.rfft(waveform)
    frequencies = np.fft.rfftfreq(len(waveform), 1 / RATE)
    return np.fft.irfft(np.where((frequencies >= low) & (frequencies <= high), spectrum, 0), len(waveform))


BANDS = {"low": (400, 700), "middle": (1300, 1900), "high": (3700, 4700)}


@pytest.mark.parametrize("seed", range(6))
def test_each_event_has_the_place_and_the_level_of_its_label(make_mixer, seed):
    scene = mix(make_mixer(snr=(30.0, 40.0), level=(-60.0, -60.0)), seed)
    assert scene.waveform.shape == (LENGTH,)
    assert scene.waveform.dtype == np.float32
    for event in scene.events:
        heard = band(scene.waveform.astype(np.float64), *BANDS[event.label])
        start, stop = round(event.onset * RATE), round(event.offset * RATE)
        # The recordings are 0.4 s of tone; the zeros around it are cut off, to whole frames of 20 ms.
        assert stop - start == pytest.approx(0.4 * RATE, abs=1)
        assert event.source_time == 0.1
        assert 20 * np.log10(rms(heard[start:stop])) == pytest.approx(-60 + event.snr, abs=0.2)
        assert rms(np.r_[heard[: max(0, start - 80)], heard[stop + 80 :]]) < 0.05 * rms(heard[start:stop])
    assert [event.onset for event in scene.events] == sorted(event.onset for event in scene.events)


def test_scenes_do_not_depend_on_the_number_of_threads(make_mixer):
    mixer, before, scenes = make_mixer(pitch=(-2.0, 2.0)), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            scenes.append([mix(mixer, seed).waveform for seed in range(8)])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(*scenes)


def test_the_background_has_the_level_that_the_scene_states(make_mixer):
    scene = mix(make_mixer(snr=(-100.0, -90.0)), 3)
    assert 20 * np.log10(rms(scene.waveform)) == pytest.approx(scene.level, abs=0.05)
    assert scene.background is None


def test_a_loud_scene_is_turned_down_as_a_whole(make_mixer):
    loud, quiet = (mix(make_mixer(level=(level, level), snr=(20.0, 20.0)), 1) for level in (0.0, -60.0))
    assert np.abs(loud.waveform).max() == pytest.approx(PEAK, abs=1e-6)
    ratio = np.abs(loud.waveform).max() / np.abs(quiet.waveform).max()
    np.testing.assert_allclose(loud.waveform, ratio * quiet.waveform, atol=1e-5)


@pytest.mark.parametrize(
    ("waveform", "reason"),
    [(np.full(700, 0.5), "too_short"), (np.r_[0.0, 1.0] / 2**16, "silent"), (np.zeros(RATE), "silent")],
    ids=["44 ms", "below one step of 16 bits", "zeros"],
)
def test_a_recording_without_a_sound_is_no_event(tmp_path, waveform, reason):
    (tmp_path / "low").mkdir()
    soundfile.write(tmp_path / "low" / "bad.wav", np.tile(waveform, 1 if len(waveform) > 2 else RATE), RATE, "FLOAT")
    settings = SceneSettings(sounds=str(tmp_path), max_sources=1, splits=["all=1"])
    with pytest.raises(ClipError, match=r"no recording of low is usable; the first: low/bad\.wav: .*"):
        mix(open_scene_pools(settings)["all"].mixer, 0)
    soundfile.write(tmp_path / "low" / "good.wav", np.sin(np.arange(RATE)), RATE)
    mixer = open_scene_pools(settings)["all"].mixer
    scenes = [mix(mixer, seed) for seed in range(8)]
    assert {event.source_file for scene in scenes for event in scene.events} == {"low/good.wav"}
    assert {fault.reason for scene in scenes for fault in scene.faults} == {reason}


def test_labels_repeat_only_if_asked(make_mixer):
    once, often = make_mixer(), make_mixer(repeat_labels=True, min_sources=5, max_sources=5)
    for seed in range(20):
        labels = [event.label for event in mix(once, seed).events]
        assert 1 <= len(labels) == len(set(labels)) <= 3
        scene = mix(often, seed)
        assert len(scene.events) == 5
        assert set(scene.labels) == {event.label for event in scene.events}
        assert len(scene.labels) <= 3
    with pytest.raises(ValueError, match="max_sources=4, but there are 3 classes"):
        make_mixer(max_sources=4)


def test_the_labels_can_be_drawn_without_the_sound(make_mixer):
    mixer = make_mixer()
    for seed in range(10):
        drawn = mixer.draw_labels(generator_for(seed))
        assert sorted(drawn) == sorted(event.label for event in mix(mixer, seed).events)


def test_a_scene_depends_on_its_generator_alone(make_mixer):
    changes = {"pitch": (-3.0, 3.0), "stretch": (0.8, 1.3)}
    warm, cold, other = make_mixer(**changes), make_mixer(**changes, cache_mib=0), make_mixer(**changes)
    scenes = [mix(warm, seed) for seed in range(8)]
    for seed in reversed(range(8)):
        for again in (mix(cold, seed), mix(other, seed)):
            np.testing.assert_array_equal(again.waveform, scenes[seed].waveform)
            assert again[1:] == scenes[seed][1:]
    assert len({scene.waveform.tobytes() for scene in scenes}) == 8


def test_pitch_and_stretch_are_those_that_the_event_states(make_mixer):
    mixer = make_mixer(max_sources=1, pitch=(4.0, 4.0), stretch=(1.5, 1.5), snr=(60.0, 60.0))
    scene = mix(mixer, 0)
    (event,) = scene.events
    assert event.pitch == pytest.approx(4, abs=0.14)
    assert event.stretch == 1.5
    assert event.offset - event.onset == pytest.approx(0.6, abs=0.01)
    sound = scene.waveform[round(event.onset * RATE) : round(event.offset * RATE)]
    heard = np.abs(np.fft.rfft(sound)).argmax() * RATE / len(sound)
    take, second = event.source_file.split("take")[1].split(".")[0].split("-")
    nominal = {"low": 500, "middle": 1500, "high": 4000}[event.label] * (1 + 0.01 * (2 * int(take) + int(second)))
    assert heard == pytest.approx(nominal * 2 ** (event.pitch / 12), rel=0.02)


def test_an_impulse_response_adds_a_tail_after_the_event(make_mixer, tmp_path):
    response = np.zeros(8000)
    response[50] = 0.9
    response[50 + 4800] = 0.45
    soundfile.write(tmp_path / "room.flac", response, RATE)
    changes = {"max_sources": 1, "snr": (60.0, 60.0), "level": (-90.0, -90.0), "event_seconds": (0.2, 0.2)}
    mixer = make_mixer(**changes, impulse_responses=str(tmp_path))
    scene = next(s for s in (mix(mixer, seed) for seed in range(50)) if s.events[0].offset < 1.4)
    (event,) = scene.events
    assert event.impulse_response == "room.flac"
    echo = scene.waveform[round((event.onset + 0.3) * RATE) : round((event.offset + 0.3) * RATE)]
    sound = scene.waveform[round(event.onset * RATE) : round(event.offset * RATE)]
    assert rms(echo) == pytest.approx(0.5 * rms(sound), rel=0.02)
    assert rms(sound) == pytest.approx(10 ** ((-90 + 60) / 20), rel=0.01)


def test_a_short_background_recording_is_repeated(make_mixer, tmp_path):
    noise = 0.1 * np.random.default_rng(0).standard_normal(RATE // 2)
    soundfile.write(tmp_path / "street.flac", noise, RATE)
    scene = mix(make_mixer(background=str(tmp_path), snr=(-100.0, -100.0)), 0)
    assert scene.background == "street.flac"
    period = RATE // 2 - RATE // 8
    np.testing.assert_allclose(scene.waveform[period:], scene.waveform[:-period], atol=1e-4)


@pytest.fixture
def damaged(write_sounds, tmp_path):
    folder = write_sounds(tmp_path / "damaged")
    (folder / "low" / "take0-0.flac").write_bytes(b"not a sound")
    soundfile.write(folder / "low" / "take0-1.flac", np.zeros(8000), RATE)
    return folder


def test_an_unusable_recording_is_replaced_and_named(make_mixer, damaged):
    mixer, again = (make_mixer(sounds=str(damaged)) for _ in range(2))
    scenes = [mix(mixer, seed) for seed in range(60)]
    faults = {fault.id: fault.reason for scene in scenes for fault in scene.faults}
    assert faults == {"low/take0-0.flac": "undecodable", "low/take0-1.flac": "silent"}
    used = {event.source_file for scene in scenes for event in scene.events}
    assert len(used) == 22
    # Labels are those that were drawn, and a process that meets the file for the first time makes the same scene.
    for seed in range(59, 0, -1):
        assert sorted(mixer.draw_labels(generator_for(seed))) == sorted(e.label for e in scenes[seed].events)
        np.testing.assert_array_equal(mix(again, seed).waveform, scenes[seed].waveform)


def test_a_class_without_a_usable_recording_is_left_out(make_mixer, damaged):
    for file in (damaged / "low").iterdir():
        file.write_bytes(b"not a sound")
    mixer = make_mixer(sounds=str(damaged), min_sources=3)
    assert len(mix(mixer, 0).events) == 2
    alone = make_mixer(sounds=str(damaged), max_sources=1)
    seed = next(seed for seed in range(50) if alone.draw_labels(generator_for(seed)) == ["low"])
    with pytest.raises(ClipError, match="no recording of low is usable"):
        mix(alone, seed)


def test_a_long_recording_is_read_in_parts(make_mixer, sounds, monkeypatch):
    whole = make_mixer(event_seconds=(0.1, 0.2))
    monkeypatch.setattr(recordings_module, "MAX_WHOLE_SECONDS", 0.3)
    one, two = (make_mixer(event_seconds=(0.1, 0.2), cache_mib=mib) for mib in (0, 16))
    for seed in (0, 1, 2, 1, 0):
        np.testing.assert_array_equal(mix(one, seed).waveform, mix(two, seed).waveform)
        assert sorted(mix(one, seed).labels) == sorted(mix(whole, seed).labels)


def test_the_cache_drops_the_least_recently_used():
    cache = SoundCache(1000)
    sounds = {name: Sound(np.zeros(100, np.float32), np.arange(1)) for name in "abc"}
    cache.put("a", sounds["a"])
    cache.put("b", sounds["b"])
    assert cache.get("a") is sounds["a"]
    cache.put("c", sounds["c"])
    assert cache.get("b") is None
    assert cache.get("a") is sounds["a"]
    assert cache.num_bytes == 800
    cache.put("large", Sound(np.zeros(300, np.float32), np.arange(1)))
    assert cache.get("large") is None
    assert cache.num_bytes == 800


@pytest.mark.parametrize("where", [0.0, 0.3, 0.6, 0.99])
@pytest.mark.parametrize("before", [0.0, 0.5, 0.99])
def test_an_excerpt_begins_and_ends_with_sound(where, before):
    """Two bursts of 0.1 s with a second of silence between them."""
    active = np.r_[5:10, 60:65]
    sound = Sound(np.zeros(80 * 320, np.float32), active)
    assert excerpt_bounds(sound, 80 * 320, RATE, where, before) == (5 * 320, 65 * 320)
    start, stop = excerpt_bounds(sound, 20 * 320, RATE, where, before)
    assert stop - start <= 20 * 320
    assert start // 320 in active
    assert (stop - 1) // 320 in active or stop - start == 800


def test_the_digest_tells_settings_and_recordings_that_change_scenes(make_mixer, sounds):
    digest = make_mixer().digest
    assert make_mixer(cache_mib=7, clips=99).digest == digest
    assert make_mixer(snr=(1.0, 2.0)).digest != digest
    mixer = make_mixer()
    mixer.sounds.ids[0] = "renamed"
    assert mixer.digest != digest

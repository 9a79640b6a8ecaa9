"""The sound files that arguments name."""

import io
import os
import sys

import pytest
from datasets.packaged_modules.audiofolder.audiofolder import AudioFolder

from modeling_sslam.common.recordings import AUDIO_SUFFIXES, find_recordings, is_recording_name
from modeling_sslam.inference import InferenceError


@pytest.fixture
def folder(tmp_path):
    for name in ("b.WAV", "a.flac", "notes.txt", ".hidden.wav", "raw.raw", "sub/c.m4a", ".git/d.wav", "0/e.opus"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    return tmp_path


def test_every_suffix_of_audiofolder_is_known():
    assert set(AudioFolder.EXTENSIONS) - {".raw"} <= AUDIO_SUFFIXES
    assert {".wav", ".flac", ".ogg", ".mp3", ".aif", ".oga", ".m4a", ".weba", ".amr"} <= AUDIO_SUFFIXES
    assert ".raw" not in AUDIO_SUFFIXES


@pytest.mark.parametrize(
    ("name", "expected"),
    [("a.wav", True), ("A.FLAC", True), (".a.wav", False), ("a.raw", False), ("wav", False), (".wav", False)],
)
def test_names_of_recordings(name, expected):
    assert is_recording_name(name) is expected


def test_folders_are_searched_in_order(folder):
    found = [os.path.relpath(path, folder) for path in find_recordings([str(folder)])]
    assert found == ["a.flac", "b.WAV", "0/e.opus", "sub/c.m4a"]


def test_files_patterns_and_folders_keep_the_order_of_the_arguments(folder):
    sources = [f"{folder}/sub", f"{folder}/*.txt", f"{folder}/nowhere.wav", f"{folder}/**/*.opus"]
    found = [os.path.relpath(path, folder) for path in find_recordings(sources)]
    assert found == ["sub/c.m4a", "notes.txt", "nowhere.wav", "0/e.opus"]


@pytest.mark.parametrize("text", ["a.wav\nb b.wav\n\n", "a.wav\0b b.wav\0"])
def test_paths_on_standard_input(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert find_recordings(["-"]) == ["a.wav", "b b.wav"]


@pytest.mark.parametrize("source", ["empty", "empty/*.wav"])
def test_sources_without_a_sound_file(tmp_path, source):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InferenceError, match=r"empty.*: no sound files there; folders are searched for .*\.wav"):
        find_recordings([str(tmp_path / source)])

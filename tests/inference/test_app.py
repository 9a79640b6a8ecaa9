"""What the page asks of the model, the command that serves it, and the Space. A browser is in test_app_browser.py."""

import io
import re
import runpy
import shutil
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import yaml
from packaging.requirements import Requirement

from modeling_sslam.__main__ import main
from modeling_sslam.inference import ClipError, Embedder, EventSettings, InferenceError, embed
from modeling_sslam.inference.app import listening
from modeling_sslam.inference.app.listening import COMPLAINTS, Listener
from modeling_sslam.inference.app.page import answered, make_page, timeline_html

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def listener(tagger) -> Listener:
    return Listener(tagger, max_minutes=0.1)


def test_an_analysis_says_what_the_commands_say(listener, tagger, audio_dir):
    path, shares = str(audio_dir / "guit_e_slide.flac"), []
    labels, timeline, _ = listener.analyse(path, 1.0, 0.7, lambda share, doing: shares.append(share))
    expected = tagger.timeline(path, 1.0, 0.25, EventSettings(0.7))
    assert labels == tagger.tag(path, top_k=10)
    assert timeline.events == expected.events
    assert timeline.duration == expected.duration
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    assert len(shares) == len(expected.starts) + 1


def test_the_picture_s_axes_are_where_it_says(listener, audio_dir):
    _, _, picture = listener.analyse(str(audio_dir / "misc_crow.flac"), 0.4, 0.5)
    pixels = matplotlib.image.imread(io.BytesIO(picture.png))[..., :3].mean(-1)
    height, width = pixels.shape
    upper, lower = round(picture.top * height), round(picture.bottom * height)
    # The frames of the axes are black, also between spectrogram and events; nothing is between that and the border.
    for x in (picture.left * width, picture.right * width):
        column = pixels[upper:lower, round(x) - 1 : round(x) + 2].min(1)
        assert (column < 0.5).mean() > 0.9
    for y in (upper, lower):
        row = pixels[y - 1 : y + 2, round(picture.left * width) : round(picture.right * width)].min(0)
        assert (row < 0.5).all()


def test_similarity(listener, audio_dir):
    crow, choir = str(audio_dir / "misc_crow.flac"), str(audio_dir / "ambi_choir.flac")
    assert listener.similarity(crow, crow) == pytest.approx(1, abs=1e-12)
    assert listener.similarity(crow, choir) < 1 - 1e-4


def test_similarity_heeds_all_windows(tagger, write_sound, recording, audio_dir):
    long = str(write_sound("long.wav", samples=np.concatenate((recording, recording.flip(0)))))
    crow = str(audio_dir / "misc_crow.flac")
    windows = [clip.embedding for clip in embed([long], Embedder(tagger.model.sslam, tagger.feature_extractor))]
    assert len(windows) == 2
    one = np.mean(windows, axis=0)
    two = next(embed([crow], Embedder(tagger.model.sslam, tagger.feature_extractor))).embedding
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    assert Listener(tagger, max_minutes=1).similarity(long, crow) == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("stated", [True, False])
def test_a_sound_that_is_too_long(listener, write_sound, monkeypatch, stated):
    if not stated:
        # As for formats whose length shows only when they are decoded.
        monkeypatch.setattr(listening, "duration_seconds", lambda path: None)
    listener.similarity(*[str(write_sound("short.wav", seconds=5.9))] * 2)
    path = str(write_sound("long.wav", seconds=6.1))
    message = r"^long\.wav is too long: this page takes up to 0\.1 min"
    with pytest.raises(InferenceError, match=message):
        listener.analyse(path, 2.0, 0.5)
    with pytest.raises(InferenceError, match=message):
        listener.similarity(path, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"sound\.wav is empty \(the file has no bytes\)\."),
        (b"no sound at all", r"sound\.wav is no sound file that can be read here \("),
        (np.zeros(10, np.float32), r"sound\.wav is too short \("),
        (np.full(16_000, np.nan, np.float32), r"sound\.wav is damaged \(NaN"),
        (np.full(16_000, 30_000, np.float32), r"sound\.wav is damaged or mislabelled \(peak"),
    ],
)
def test_files_that_are_no_sounds(listener, write_sound, tmp_path, content, message):
    path = tmp_path / "sound.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_sound("sound.wav", samples=content)
    for use in (lambda: listener.analyse(str(path), 2.0, 0.5), lambda: listener.similarity(str(path), str(path))):
        with pytest.raises(InferenceError, match=message) as error:
            use()
        assert str(tmp_path) not in str(error.value)


def test_every_reason_has_its_complaint():
    assert set(re.findall(r'"(\w+)"', ClipError.__doc__)) == set(COMPLAINTS)


def test_errors_are_answered(caplog):
    @answered({})
    def function(error):
        raise error

    message, labels = function(InferenceError("<b>5</b> is too much"))
    assert "&lt;b&gt;5&lt;/b&gt; is too much" in message
    assert labels == {}
    assert not caplog.records
    message, labels = function(RuntimeError("out of <memory>"))
    assert "RuntimeError: out of &lt;memory&gt;" in message
    assert "Traceback" not in message
    assert "out of <memory>" in caplog.text


def test_names_are_text_on_the_page(listener, audio_dir, tmp_path):
    path = str(shutil.copy(audio_dir / "misc_crow.flac", tmp_path / "a'b\"<i>&.flac"))
    text = timeline_html(path, listener.analyse(path, 2.0, 0.5))
    assert "<i>" not in text
    assert 'download="a&#x27;b&quot;&lt;i&gt;&amp;.csv"' in text


def test_the_command_without_gradio(model_folder, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "modeling_sslam.inference.app.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--model", str(model_folder)]) == 1
    assert 'pip install "modeling-sslam[app]"' in capsys.readouterr().err


def test_the_command_refuses(capsys, tmp_path):
    for options, message in (([], "no config.json"), (["--examples", str(tmp_path)], "no sound files there")):
        assert main(["app", "--model", str(tmp_path), *options]) == 1
        assert message in capsys.readouterr().err


def test_the_page_is_for_people_and_tells_nobody(listener, audio_dir):
    page = make_page(listener, "tiny", [str(path) for path in sorted(audio_dir.glob("*.flac"))])
    assert not page.analytics_enabled
    calls = [function for function in page.fns.values() if function.concurrency_id == "model"]
    assert len(calls) == 2
    assert all((call.concurrency_limit, call.api_visibility) == (1, "private") for call in calls)


def test_the_space_runs_as_it_stands(model_folder, audio_dir, tmp_path, monkeypatch):
    space = shutil.copytree(REPOSITORY / "examples" / "space", tmp_path / "space")
    shutil.copytree(model_folder, space / "model")
    shutil.copytree(audio_dir, space / "examples")
    monkeypatch.delenv("SSLAM_MODEL", raising=False)
    names = runpy.run_path(str(space / "app.py"))
    assert names["page"].title == "SSLAM: model"
    assert len(names["examples"]) == 5
    monkeypatch.setenv("SSLAM_MODEL", str(model_folder))
    assert runpy.run_path(str(space / "app.py"))["page"].title == f"SSLAM: {model_folder.name}"


def test_the_space_installs_what_the_page_needs():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def requirements(lines: list[str]) -> dict[str, Requirement]:
        """Those of later lines before those of earlier ones, as an extra narrows what the package asks for."""
        found: dict[str, Requirement] = {}
        for requirement in map(Requirement, lines):
            if requirement.name == project["name"]:
                for extra in requirement.extras:
                    found |= requirements(extras[extra])
            else:
                found[requirement.name] = requirement
        return found

    space = REPOSITORY / "examples" / "space"
    listed = requirements((space / "requirements.txt").read_text().split())
    assert listed == requirements([*project["dependencies"], f"{project['name']}[app]"])
    header = yaml.safe_load((space / "README.md").read_text().split("---")[1])
    assert header["sdk_version"] in listed["gradio"].specifier
    assert (space / header["app_file"]).is_file()

"""The page without a browser, the command that serves it, and the Space."""

import runpy
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from modeling_sslam.__main__ import main
from modeling_sslam.inference import InferenceError
from modeling_sslam.inference.commands.app.listening import Listener
from modeling_sslam.inference.commands.app.page import errors_as_messages, make_page, timeline_html

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[4]


@pytest.fixture
def listener(tagger) -> Listener:
    return Listener(tagger, max_minutes=0.1)


def test_errors_become_messages(caplog):
    @errors_as_messages({})
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


def test_file_names_are_escaped(listener, audio_dir, tmp_path):
    path = str(shutil.copy(audio_dir / "misc_crow.flac", tmp_path / "a'b\"<i>&.flac"))
    text = timeline_html(path, listener.analyse(path, 2.0, 0.5))
    assert "<i>" not in text
    assert 'download="a&#x27;b&quot;&lt;i&gt;&amp;.csv"' in text


def test_missing_gradio_is_reported(model_folder, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "modeling_sslam.inference.commands.app.page")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["app", "--model", str(model_folder)]) == 1
    assert 'pip install "modeling-sslam[app]"' in capsys.readouterr().err


def test_missing_model_and_examples_are_reported(capsys, tmp_path):
    for options, message in (([], "no config.json"), (["--examples", str(tmp_path)], "no sound files there")):
        assert main(["app", "--model", str(tmp_path), *options]) == 1
        assert message in capsys.readouterr().err


def test_page_has_no_api_and_no_analytics(listener, audio_dir):
    page = make_page(listener, "tiny", [str(path) for path in sorted(audio_dir.glob("*.flac"))])
    assert not page.analytics_enabled
    calls = [function for function in page.fns.values() if function.concurrency_id == "model"]
    assert len(calls) == 2
    assert all((call.concurrency_limit, call.api_visibility) == (1, "private") for call in calls)


def test_space_runs(model_folder, audio_dir, tmp_path, monkeypatch):
    space = shutil.copytree(REPOSITORY / "examples" / "space", tmp_path / "space")
    shutil.copytree(model_folder, space / "model")
    shutil.copytree(audio_dir, space / "examples")
    monkeypatch.delenv("SSLAM_MODEL", raising=False)
    names = runpy.run_path(str(space / "app.py"))
    assert names["page"].title == "SSLAM: model"
    assert len(names["examples"]) == 5
    monkeypatch.setenv("SSLAM_MODEL", str(model_folder))
    assert runpy.run_path(str(space / "app.py"))["page"].title == f"SSLAM: {model_folder.name}"


def test_space_requirements_equal_those_of_the_page():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def requirements(lines: list[str]) -> dict[str, Requirement]:
        """Return the requirements by name. A later line replaces an earlier one: extras narrow the package's own."""
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

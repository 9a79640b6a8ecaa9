"""Callbacks after imports."""

import inspect
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from modeling_sslam.after_import import after_import


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package `watched` with the submodule `part`, and import neither."""
    folder = tmp_path / "watched"
    folder.mkdir()
    (folder / "__init__.py").write_text("from .part import value")
    (folder / "part.py").write_text("value = 1")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("watched", "watched.part"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("package")
def test_callback_runs_once_after_the_module():
    seen = []
    after_import("watched", lambda: seen.append(sys.modules["watched"].value))
    after_import("watched.part", lambda: seen.append("part"))
    assert seen == []
    import watched

    assert seen == ["part", 1]
    assert watched.__path__
    after_import("watched", lambda: seen.append("at once"))
    import watched.part

    assert seen == ["part", 1, "at once"]


@pytest.mark.usefixtures("package")
def test_every_callback_of_a_module_runs():
    seen = []
    for number in range(3):
        after_import("watched.part", lambda number=number: seen.append(number))
    # Finding a module is not importing it.
    assert find_spec("watched.part").origin.endswith("part.py")
    import watched.part

    assert sorted(seen) == [0, 1, 2]
    assert inspect.getsource(watched.part).strip() == "value = 1"
    assert watched.part.__spec__.loader.get_source("watched.part") == "value = 1"


@pytest.mark.usefixtures("package")
def test_callback_waits_for_an_import_that_succeeds(tmp_path):
    seen = []
    (tmp_path / "watched" / "broken.py").write_text("raise ValueError")
    after_import("watched.broken", lambda: seen.append("imported"))
    with pytest.raises(ValueError):  # noqa: PT011
        import_module("watched.broken")
    assert seen == []
    (tmp_path / "watched" / "broken.py").write_text("# repaired")
    import_module("watched.broken")
    assert seen == ["imported"]


def test_missing_module_is_still_an_import_error():
    after_import("no_such_module", lambda: pytest.fail("The module does not exist."))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import no_such_module  # noqa: F401

"""Callbacks after imports."""

import sys

import pytest

from modeling_sslam.after_import import after_import


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package `watched` with the submodule `part`, neither of which is imported yet."""
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


def test_missing_module_is_still_an_import_error():
    after_import("no_such_module", lambda: pytest.fail("The module does not exist."))
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        import no_such_module  # noqa: F401

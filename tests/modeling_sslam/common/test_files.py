"""Publication of files and folders: whole or not at all, at whichever step it fails."""

import os
import shutil
from pathlib import Path

import pytest

from modeling_sslam.common import files
from modeling_sslam.common.files import publish, replacing, temporary_path, write_text


@pytest.fixture(params=["atomic exchange", "two renames"])
def exchange(request, monkeypatch) -> str:
    """Run a test with the system's atomic exchange of two paths, and without one."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    return request.param


def write_folder(path: Path, content: str) -> None:
    (path / "inner").mkdir(parents=True)
    (path / "inner" / "file").write_text(content)


def content(path: Path) -> str:
    return (path / "inner" / "file" if path.is_dir() else path).read_text()


def write(path: Path, text: str, kind: str) -> None:
    write_folder(path, text) if kind == "folder" else path.write_text(text)


def fail_at(monkeypatch, step: int) -> list[str]:
    """Make renames and flushes fail from the given one on. Return the list of those that were begun."""
    begun: list[str] = []

    def watch(owner, name):
        original = getattr(owner, name)

        def watched(*arguments, **options):
            begun.append(name)
            if len(begun) > step:
                raise OSError(f"{name} failed")
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, watched)

    watch(os, "fsync")
    watch(Path, "replace")
    watch(Path, "rename")
    watch(shutil, "rmtree")
    return begun


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_new_content_gets_the_name(tmp_path, kind):
    target = tmp_path / "result.out"
    with replacing(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".")
        assert temporary.suffix == ".out"
        write(temporary, "new", kind)
        assert not target.exists()
    assert content(target) == "new"
    assert os.listdir(tmp_path) == ["result.out"]


@pytest.mark.parametrize(("old", "new"), [("file", "file"), ("folder", "folder"), ("file", "folder")])
def test_old_content_is_replaced(tmp_path, exchange, old, new):
    target = tmp_path / "result"
    write(target, "old", old)
    with replacing(target) as temporary:
        write(temporary, "new", new)
        assert content(target) == "old"
    assert content(target) == "new"
    assert os.listdir(tmp_path) == ["result"]


def test_a_file_does_not_replace_a_folder(tmp_path, exchange):
    target = tmp_path / "result"
    write_folder(target, "old")
    with pytest.raises(OSError, match="result is a folder and is not replaced by a file"):
        write_text(target, "new")
    assert content(target) == "old"
    assert os.listdir(tmp_path) == ["result"]


def test_a_link_is_replaced_and_not_followed(tmp_path, exchange):
    for name in ("file", "folder"):
        write(tmp_path / f"old {name}", "old", name)
        (tmp_path / name).symlink_to(tmp_path / f"old {name}")
        with replacing(tmp_path / name) as temporary:
            write(temporary, "new", name)
        assert not (tmp_path / name).is_symlink()
        assert content(tmp_path / name) == "new"
        assert content(tmp_path / f"old {name}") == "old"


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_old_content_survives_an_error_of_the_writer(tmp_path, kind):
    target = tmp_path / "result"
    write(target, "old", kind)

    def interrupted():
        with replacing(target) as temporary:
            write(temporary, "half", kind)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert content(target) == "old"
    assert os.listdir(tmp_path) == ["result"]


def test_leftovers_of_a_killed_writer_are_replaced(tmp_path, exchange):
    target = tmp_path / "result"
    write_folder(target, "old")
    write_folder(temporary_path(target), "half")
    write_folder(tmp_path / ".sslam-old-result", "older")
    with replacing(target) as temporary:
        write_folder(temporary, "new")
    assert content(target) == "new"
    assert os.listdir(tmp_path) == ["result"]


@pytest.mark.parametrize("step", range(9))
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_the_target_is_old_or_new_at_every_step(tmp_path, monkeypatch, exchange, kind, step):
    """Each step of a publication fails in turn, and so do all later steps."""
    target = tmp_path / "result"
    write(target, "old", kind)
    temporary = temporary_path(target)
    write(temporary, "new", kind)
    begun = fail_at(monkeypatch, step)
    try:
        publish(temporary, target)
        done = True
    except OSError:
        done = False
    monkeypatch.undo()
    assert done == (len(begun) <= step)
    if target.exists():
        assert content(target) in (("new",) if done else ("old", "new"))
    else:
        # Without the exchange, and if even the way back fails, the old content waits beside its place.
        assert exchange == "two renames"
        assert content(tmp_path / ".sslam-old-result") == "old"


def test_a_rename_that_fails_is_undone(tmp_path, monkeypatch):
    target = tmp_path / "result"
    write_folder(target, "old")
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    rename = Path.rename

    def fail_for_the_new(self, other):
        if self == temporary_path(target):
            raise OSError("no")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail_for_the_new)

    def publish_new():
        with replacing(target) as temporary:
            write_folder(temporary, "new")

    with pytest.raises(OSError, match="no"):
        publish_new()
    assert content(target) == "old"
    assert os.listdir(tmp_path) == ["result"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_content_is_flushed_before_it_is_renamed_and_the_name_after(tmp_path, monkeypatch, exchange, kind):
    target, calls = tmp_path / "result", []
    write(target, "old", kind)

    def note(action, path):
        calls.append((action, Path(path).relative_to(tmp_path).as_posix()))

    force_to_disk, replace, rename = files.force_to_disk, Path.replace, Path.rename
    swap = files._exchange
    monkeypatch.setattr(files, "force_to_disk", lambda path: [note("flush", path), force_to_disk(path)])
    monkeypatch.setattr(files, "_exchange", lambda one, other: [note("swap", other), swap(one, other)][1])
    monkeypatch.setattr(Path, "replace", lambda self, other: [note("rename", other), replace(self, other)])
    monkeypatch.setattr(Path, "rename", lambda self, other: [note("rename", other), rename(self, other)])
    with replacing(target) as temporary:
        write(temporary, "new", kind)
    hidden = temporary_path(target).name
    inner = [("flush", f"{hidden}/inner"), ("flush", f"{hidden}/inner/file")] if kind == "folder" else []
    assert sorted(calls[: 1 + len(inner)]) == sorted([("flush", hidden), *inner])
    renames = [("rename", "result")]
    if kind == "folder":
        renames = (
            [("swap", "result")]
            if exchange == "atomic exchange"
            else [("swap", "result"), ("rename", ".sslam-old-result"), ("rename", "result")]
        )
    names = calls[1 + len(inner) :]
    assert [call for call in names if call[0] != "flush"] == renames
    assert names[-1] == ("flush", ".")


def test_a_folder_that_is_missing_or_not_writable_is_named(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=r"nowhere/result cannot be written: the folder .*nowhere does not exist"):
        write_text(tmp_path / "nowhere" / "result", "new")
    # Root may write everywhere, so the test replaces the system's answer.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="is not writable"):
        write_text(tmp_path / "result", "new")

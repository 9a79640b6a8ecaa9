"""Reading executes nothing in a file, and errors name the reference that is refused or the fault."""

import io
import json
import os
import pickle
import tarfile
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conversion import ConversionError
from conversion.reader import read_checkpoint


class Calls:
    """Object whose pickle calls a function when a plain unpickler loads it."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class HasSetstate:
    def __setstate__(self, state):
        Path(state["marker"]).touch()


class HasReduce:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (HasReduce._touch, (self.marker,))

    @staticmethod
    def _touch(marker):
        Path(marker).touch()


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


def evil(kind: str, marker: Path):
    if kind == "__setstate__":
        payload = HasSetstate()
        payload.marker = str(marker)
        return payload, "HasSetstate"
    command = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w').close()"
    return {
        "os.system": (Calls(os.system, command), "posix.system"),
        "builtins.eval": (Calls(eval, code), "builtins.eval"),
        "builtins.exec": (Calls(exec, code), "builtins.exec"),
        "subprocess": (Calls(__import__("subprocess").Popen, ["touch", str(marker)]), "subprocess.Popen"),
        "getattr": (Calls(getattr, marker, "touch"), "builtins.getattr"),
        "__reduce__": (HasReduce(str(marker)), "HasReduce._touch"),
    }[kind]


KINDS = ["os.system", "builtins.eval", "builtins.exec", "subprocess", "getattr", "__setstate__", "__reduce__"]
PLACES = {
    "alone": lambda payload, checkpoint: payload,
    "in cfg": lambda payload, checkpoint: {"cfg": {"model": {"depth": payload}}, "model": checkpoint.tensors},
    "among the weights": lambda payload, checkpoint: {"model": checkpoint.tensors | {"x": payload}},
    "beside the weights": lambda payload, checkpoint: {"model": checkpoint.tensors, "extra_state": [(payload,)]},
    "in a stand-in": lambda payload, checkpoint: {"args": Namespace(x=payload), "model": checkpoint.tensors},
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_hostile_pickle_is_refused_by_name(kind, place, protocol, pretrained, marker, tmp_path):
    payload, name = evil(kind, marker)
    source = tmp_path / "checkpoint.pt"
    if protocol == 2 and kind == "__reduce__":
        name = "builtins.getattr"  # protocol 2 references a static method by getattr
    torch.save(PLACES[place](payload, pretrained), source, pickle_protocol=protocol)
    with pytest.raises(ConversionError, match="refused") as refusal:
        read_checkpoint(source)
    assert name in str(refusal.value)
    assert not marker.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_pickle_of_the_older_format_is_refused_by_name(kind, pretrained, marker, tmp_path):
    payload, name = evil(kind, marker)
    name = "builtins.getattr" if kind == "__reduce__" else name  # as in protocol 2
    source = tmp_path / "checkpoint.pt"
    checkpoint = {"model": pretrained.tensors, "extra": payload}
    torch.save(checkpoint, source, _use_new_zipfile_serialization=False)
    with pytest.raises(ConversionError, match="refused") as refusal:
        read_checkpoint(source)
    assert name in str(refusal.value)
    assert not marker.exists()


HANDMADE = {
    "GLOBAL": "cposix\nsystem\n(S'touch {}'\ntR.",
    "INST": "(S'touch {}'\niposix\nsystem\n.",
    "OBJ": "(cposix\nsystem\nS'touch {}'\no.",
    "hidden in the memo": "\x80\x04\x8c\x05posix\x94\x8c\x06system\x9400h\x00h\x01\x93(S'touch {}'\ntR.",
    "behind another pickle": "N.cposix\nsystem\n(S'touch {}'\ntR.",
}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_pickles_run_in_a_plain_unpickler(kind, marker):
    loaded = pickle.loads(pickle.dumps(evil(kind, marker)[0]))
    if kind == "subprocess":
        loaded.wait()
    elif kind == "getattr":
        loaded()
    assert marker.exists()


@pytest.mark.parametrize("name", [name for name in HANDMADE if name != "behind another pickle"])
def test_handmade_programs_run_in_a_plain_unpickler(name, marker):
    pickle.loads(HANDMADE[name].format(marker).encode("latin-1"))
    assert marker.exists()


@pytest.mark.parametrize("container", ["zip", "bare"])
@pytest.mark.parametrize("program", HANDMADE.values(), ids=HANDMADE)
def test_handmade_program_is_refused_by_name(program, container, marker, tmp_path):
    code = program.format(marker).encode("latin-1")
    source = tmp_path / "checkpoint.pt"
    if container == "bare":
        source.write_bytes(code)
    else:
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("archive/data.pkl", code)
            archive.writestr("archive/version", "3\n")
    with pytest.raises(ConversionError) as refusal:
        read_checkpoint(source)
    assert not marker.exists()
    if not (container == "zip" and program.startswith("N.")):  # torch's zip format has one pickle
        assert "posix.system" in str(refusal.value)


def test_program_behind_a_second_record_of_the_same_name_is_not_run(pretrained, marker, tmp_path):
    source = tmp_path / "checkpoint.pt"
    torch.save({"model": pretrained.tensors}, source)
    with zipfile.ZipFile(source, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("checkpoint/data.pkl", HANDMADE["GLOBAL"].format(marker))
    with pytest.raises(ConversionError):
        read_checkpoint(source)
    assert not marker.exists()


def test_stand_ins_are_not_registered_after_reading(golden_dir):
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(golden_dir / "sslam_pretrained.pt")
    assert set(torch.serialization.get_safe_globals()) == before


def test_other_content_of_a_training_checkpoint_is_skipped(pretrained, tmp_path):
    extra = {
        "args": Namespace(lr=0.1),
        "best": np.float64(0.5),
        "path": Path("/somewhere"),
        "by_key": defaultdict(dict, {"a": {"b": 1}}),
        "ordered": OrderedDict(a=1),
    }
    torch.save({"model": pretrained.tensors, **extra}, tmp_path / "checkpoint.pt")
    assert read_checkpoint(tmp_path / "checkpoint.pt").tensors.keys() == pretrained.tensors.keys()


# Damage


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("source", ["sslam_pretrained.pt", "hub_pretrained/model.safetensors", "legacy"])
def test_file_that_is_cut_short_is_refused(source, share, golden_dir, pretrained, tmp_path):
    if source == "legacy":
        torch.save(pretrained.tensors, tmp_path / "whole", _use_new_zipfile_serialization=False)
        content = (tmp_path / "whole").read_bytes()
    else:
        content = (golden_dir / source).read_bytes()
    (tmp_path / "cut").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ConversionError, match=r"cut short|is empty"):
        read_checkpoint(tmp_path / "cut")


@given(data=st.data())
@settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_changed_bytes_are_an_error_or_plain_data(data, golden_dir, tmp_path):
    with zipfile.ZipFile(golden_dir / "sslam_finetuned.pt") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if name.endswith("data.pkl"))
    program = bytearray(records[name])
    for _ in range(data.draw(st.integers(1, 5))):
        program[data.draw(st.integers(0, len(program) - 1))] = data.draw(st.integers(0, 255))
    with zipfile.ZipFile(tmp_path / "changed.pt", "w") as archive:
        for record, content in (records | {name: bytes(program)}).items():
            archive.writestr(record, content)
    stand_ins = set(torch.serialization.get_safe_globals())
    refusal = None
    try:
        checkpoint = read_checkpoint(tmp_path / "changed.pt")
    except ConversionError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith(f"{tmp_path / 'changed.pt'} ")
    else:
        json.dumps(checkpoint.settings)  # a TypeError for anything but plain values
        for tensor in checkpoint.tensors.values():
            assert type(tensor) is torch.Tensor
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            end = tensor.storage_offset() + sum((size - 1) * stride for size, stride in steps) + 1
            assert end * tensor.itemsize <= tensor.untyped_storage().nbytes()
    assert set(torch.serialization.get_safe_globals()) == stand_ins


def bytes_of(write) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def cycle() -> dict:
    state: dict = {}
    state["again"] = state
    return state


def torchscript(buffer: io.BytesIO) -> None:
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}, protocol=2))
        archive.writestr("archive/constants.pkl", pickle.dumps((), protocol=2))


NOT_CHECKPOINTS = {
    "text": b"This is not a checkpoint.\n" * 100,
    "zeros": bytes(1000),
    "picture": b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4,
    "numpy archive": bytes_of(lambda buffer: np.savez(buffer, a=np.zeros(3))),
    "tar": bytes_of(lambda buffer: tarfile.open(fileobj=buffer, mode="w").close()),
    "pickled list": pickle.dumps([1, 2]),
    "saved tensor": bytes_of(lambda buffer: torch.save(torch.zeros(3), buffer)),
    "saved number": bytes_of(lambda buffer: torch.save({"model": {"x": 3}}, buffer)),
    "TorchScript": bytes_of(torchscript),
    "cycle": bytes_of(lambda buffer: torch.save(cycle(), buffer)),
}


@pytest.mark.parametrize("content", NOT_CHECKPOINTS.values(), ids=NOT_CHECKPOINTS)
@pytest.mark.filterwarnings("error")
def test_file_that_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ConversionError) as refusal:
        read_checkpoint(tmp_path / "file")
    assert str(tmp_path / "file") in str(refusal.value)
    # torch advises setting weights_only to False, which would execute the file.
    assert "weights_only" not in str(refusal.value).replace("weights_only=True", "")


def test_git_lfs_pointer_is_recognised(tmp_path):
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ConversionError, match="git lfs pull"):
        read_checkpoint(tmp_path)


def test_folder_needs_weights_and_only_one_choice_of_them(tmp_path, pretrained):
    with pytest.raises(ConversionError, match="holds no weights"):
        read_checkpoint(tmp_path)
    for name in ("one.pt", "two.pt"):
        torch.save(pretrained.tensors, tmp_path / name)
    with pytest.raises(ConversionError, match=r"one\.pt, two\.pt"):
        read_checkpoint(tmp_path)


@pytest.mark.parametrize("text", ["{", "[1]", ""])
def test_folder_with_a_broken_configuration_is_refused(text, golden_dir, tmp_path):
    (tmp_path / "model.safetensors").write_bytes((golden_dir / "hub_pretrained" / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConversionError, match=r"config\.json"):
        read_checkpoint(tmp_path)

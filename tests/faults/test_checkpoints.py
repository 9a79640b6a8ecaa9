"""Hostile, damaged and contradictory model files; kills, full disks and second calls while a model is written."""

import html
import json
import os
import pickle
import resource
import shutil
import signal
import stat
import struct
import time
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from conversion import ConversionError
from conversion import convert as conversion_module
from conversion.__main__ import main
from conversion.reader import read_checkpoint
from modeling_sslam import SSLAMConfig, SSLAMForAudioClassification
from modeling_sslam.common import files
from modeling_sslam.common.files import TargetInUseError, replacing, write_text
from modeling_sslam.common.model_card import code_span, render_card
from modeling_sslam.inference import InferenceError
from modeling_sslam.inference.loading import load_pretrained

pytestmark = pytest.mark.slow

SECONDS, BYTES = 1.0, 1 << 30


@pytest.fixture
def bounded() -> Iterator[None]:
    """Fail a test that takes much more than a second of processor time or a gigabyte of memory."""

    def stop(*_: object) -> None:
        raise AssertionError("it takes far too long")

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + BYTES, limits[1]))
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, 5 * SECONDS)
    start = time.process_time()
    try:
        yield
        assert time.process_time() - start < 3 * SECONDS  # one second on a free machine
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Return a function that runs the conversion's command line: exit status, stdout, stderr."""

    def command(*arguments: Any) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return command


@pytest.fixture(scope="module")
def classifier(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a converted classifier."""
    out = tmp_path_factory.mktemp("classifier") / "model"
    assert main([str(golden_dir / "sslam_finetuned.pt"), str(out), "--quiet"]) == 0
    return out


@pytest.fixture
def model(classifier: Path, tmp_path: Path) -> Path:
    """Return a copy of the classifier that a test may damage."""
    return shutil.copytree(classifier, tmp_path / "model")


def load(folder: Path) -> SSLAMForAudioClassification:
    return load_pretrained(SSLAMForAudioClassification, folder, "cpu", "auto", None)[0]


# D1: pickles that build too much


def doubled(value: Any, pair: Callable[[Any], Any], times: int = 45) -> Any:
    for _ in range(times):
        value = pair(value)
    return value


def holding_itself(container: Any, add: Callable[[Any, Any], object]) -> Any:
    add(container, container)
    return container


def tuple_in_its_list() -> list:
    inner: list = []
    inner.append((inner,))
    return inner


def ordered_by_itself() -> OrderedDict:
    ordered: OrderedDict = OrderedDict()
    ordered["again"] = ordered
    ordered.again = ordered  # type: ignore[attr-defined]  # the OrderedDict's state holds itself as well
    return ordered


WEIGHT = {"blocks.0.norm1.weight": torch.zeros(8)}
SAVED = {
    "a list twice in a list": {"cfg": {"model": doubled([1], lambda value: [value, value])}, "model": WEIGHT},
    "a tuple twice in a tuple": {"cfg": {"model": doubled((1,), lambda t: (t, t))}, "model": WEIGHT},
    "a dict twice in a dict of settings": {"cfg": doubled({}, lambda d: {"a": d, "b": d}), "model": WEIGHT},
    "a dict twice in a dict of weights": {"model": doubled(WEIGHT, lambda d: {"a": d, "b": d})},
    "an empty dict twice in a dict of weights": {"model": doubled({}, lambda d: {"a": d, "b": d}, 24)},
    "a list in itself": {"cfg": {"model": holding_itself([], list.append)}, "model": WEIGHT},
    "settings in themselves": {"cfg": holding_itself({}, lambda d, e: d.update(model=e)), "model": WEIGHT},
    "weights in themselves": {"model": holding_itself({}, lambda d, e: d.update(a=e))},
    "a tuple in its own list": {"cfg": {"model": tuple_in_its_list()}, "model": WEIGHT},
    "an OrderedDict in itself": {"cfg": ordered_by_itself(), "model": WEIGHT},
    "a long string 100 000 times": {"cfg": {"model": ["x" * 1_000_000] * 50_000}, "model": WEIGHT},
    "a name of a million characters": {"model": {"x" * 1_000_000: torch.zeros(1)}},
    "a view of 10^12 numbers": {"model": {"x": torch.zeros(1).expand(10**12)}},
    "a view of a million dimensions": {"model": {"x": torch.zeros(1).expand([1] * 60)}},
    "many views of the same numbers": {"model": {f"x{i}": torch.zeros(1).expand(2**20) for i in range(2000)}},
    "a long integer": {"cfg": {"model": 1 << 9_000_000}, "model": WEIGHT},
    "ten million characters": {"cfg": {"model": "x" * 10_000_000}, "model": WEIGHT},
    "half a million numbers": {"cfg": {}, "model": WEIGHT, "extra": list(range(500_000))},
}
BOMB = b"\x80\x02)q\x00" + 45 * b"h\x00h\x00\x86q\x000h\x00"
PROGRAMS = {
    "bytearray by REDUCE": b"\x80\x02cbuiltins\nbytearray\nJ\x00\x94\x35\x77\x85R.",
    "bytearrays among the settings": b"\x80\x02}X\x03\x00\x00\x00cfg"
    + b"cbuiltins\nbytearray\nJ\x00\x94\x35\x77\x85R"
    + b"s.",
    "a tensor by REDUCE": b"\x80\x02}X\x01\x00\x00\x00xctorch\nTensor\nJ\x00\x94\x35\x77\x85Rs.",
    "a storage by REDUCE": b"\x80\x02}X\x01\x00\x00\x00xctorch.storage\nUntypedStorage\nJ\x00\x94\x35\x77\x85Rs.",
    "a set by REDUCE": b"\x80\x02" + b"cbuiltins\nset\n]q\x00h\x00a\x85R.",
    "a tuple of tuples as a key": b"\x80\x02}" + BOMB[2:] + b"Ns.",
    "tuples as pairs of an OrderedDict": BOMB[:-1] + b"0ccollections\nOrderedDict\n]h\x00N\x86a\x85R.",
    "a list as a key": b"\x80\x02}]Ns.",
    "an integer of 4 GB": b"\x80\x02\x8b\xff\xff\xff\x7f\x01\x02.",
    "a string of 2^60 bytes": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"x.",
    "100 000 tuples": b"\x80\x02}X\x03\x00\x00\x00cfg)" + 100_000 * b"\x85" + b"s.",
    "100 000 states": b"\x80\x02}X\x03\x00\x00\x00cfg" + 50_000 * b"comegaconf\nX\n)R" + 49_999 * b"b" + b"s.",
    "instructions without an end": b"\x80\x02" + 2_000_000 * b"N0" + b"N.",
    "a node that contains itself": (
        b"\x80\x02}X\x03\x00\x00\x00cfgcomegaconf\nX\n)Rq\x00}X\x08\x00\x00\x00_contenth\x00sbs."
    ),
    "the state of a tensor's class": b"\x80\x02ctorch\nTensor\n}b.",
    "a number that is called": b"\x80\x02K\x01)R.",
    "an extension": b"\x80\x02\x82\x01.",
    "items beyond the stack": b"\x80\x02\x87.",
    "a mark too many": b"\x80\x02t.",
}


def write_zip(path: Path, program: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
    return path


def saved(path: Path, payload: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(payload, path)
    return path


@pytest.mark.parametrize("payload", SAVED.values(), ids=SAVED)
def test_a_file_that_describes_more_than_a_checkpoint_is_refused_at_once(payload, tmp_path, bounded):
    path = saved(tmp_path / "hostile.pt", payload)
    with pytest.raises(ConversionError, match=r"hostile\.pt cannot be read as plain data \(.+\), so it was refused"):
        read_checkpoint(path)


@pytest.mark.parametrize("container", ["zip", "bare"])
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_that_builds_more_than_data_is_refused_at_once(program, container, tmp_path, bounded):
    path = tmp_path / "hostile.pt"
    write_zip(path, program) if container == "zip" else path.write_bytes(
        b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {})) + program + b"\x80\x02]."
    )
    with pytest.raises(ConversionError, match=r"hostile\.pt "):
        read_checkpoint(path)


def test_deeply_nested_tuples_beside_the_weights_are_skipped(tmp_path, bounded):
    weights = saved(tmp_path / "plain.pt", {"model": WEIGHT})
    with zipfile.ZipFile(weights) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    program = records["plain/data.pkl"]
    extra = b"X\x05\x00\x00\x00extra)" + 100_000 * b"\x85" + b"s."
    with zipfile.ZipFile(tmp_path / "nested.pt", "w") as archive:
        for name, content in records.items():
            archive.writestr(name, program[:-1] + extra if content is program else content)
    assert torch.equal(read_checkpoint(tmp_path / "nested.pt").tensors["blocks.0.norm1.weight"], torch.zeros(8))


def test_compressed_records_are_refused_whatever_their_content(tmp_path, bounded):
    path = write_zip(tmp_path / "hostile.pt", bytes(64 << 20), zipfile.ZIP_DEFLATED)
    with pytest.raises(ConversionError, match=r"its record archive/data\.pkl is compressed"):
        read_checkpoint(path)


def test_a_record_larger_than_its_file_is_refused(tmp_path, bounded):
    path = write_zip(tmp_path / "hostile.pt", b"\x80\x02}.")
    content = path.read_bytes()
    declared = struct.pack("<LL", 4, 4)
    assert content.count(declared) == 2  # in the record's header and in the directory
    path.write_bytes(content.replace(declared, struct.pack("<LL", 2_000_000_000, 2_000_000_000)))
    with pytest.raises(ConversionError, match=r"its records claim 2000000002 bytes"):
        read_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_storage_larger_than_its_record_is_refused(legacy, tmp_path, bounded):
    path = tmp_path / "whole.pt"
    torch.save({"model": {"x": torch.arange(1000.0)}}, path, _use_new_zipfile_serialization=not legacy)
    if legacy:
        (tmp_path / "cut.pt").write_bytes(path.read_bytes()[:-4])
    else:
        with zipfile.ZipFile(path) as archive, zipfile.ZipFile(tmp_path / "cut.pt", "w") as cut:
            for name in archive.namelist():
                cut.writestr(name, archive.read(name)[: -4 if name == "whole/data/0" else None])
    with pytest.raises(ConversionError, match=r"claims 4000 bytes, but the file holds 3996|ends beyond the file"):
        read_checkpoint(tmp_path / "cut.pt")


def test_tensors_of_all_kinds_are_read_exactly(tmp_path):
    numbers = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    state = {
        "plain": numbers,
        "transposed": numbers.T,
        "part": numbers[2:4, 1:],
        "expanded": torch.ones(1).expand(5),
        "half": numbers.half(),
        "bfloat16": numbers.bfloat16(),
        "float8": numbers.to(torch.float8_e4m3fn),
        "integers": torch.arange(3),
        "bool": torch.tensor([True, False]),
        "complex": numbers[:2].to(torch.complex64),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(numbers),
    }
    for options in ({}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}):
        torch.save({"model": state}, tmp_path / "file.pt", **options)
        found = read_checkpoint(tmp_path / "file.pt").tensors
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert found[name].contiguous().view(-1).view(torch.uint8).tolist() == (
                tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()
            ), name


LEVELS = "\n".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))
MERGES = "\n".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}], k{i}: 1}}" for i in range(1, 10))
CARDS = {
    "aliases nine deep": (f"a0: &a0 [x, x]\n{LEVELS}\nlicense: *a9", "undefined alias"),
    "an alias of itself": ("license: &a [*a]", "it is no text"),
    "merged keys": ("license: {<<: [{a: 1}, {b: 2}]}", "it is no text"),
    "deep lists": ("license: " + 400 * "[" + 400 * "]", "it has 809 characters"),
    "lists without an end": ("license: " + 400 * "[", "while parsing"),
    "a table": ("license: {a: 1}", "it is no text"),
    "a table over lines": ("license:\n  a: 1\n  b: 2\ntags: [a]", "it is no text"),
    "a number": ("license: 3", "it is no text"),
    "a long name": ("license: " + 1000 * "x", "it has 1009 characters"),
}


@pytest.mark.parametrize(("metadata", "named"), CARDS.values(), ids=CARDS)
def test_a_card_whose_license_is_no_name_is_refused_at_once(metadata, named, model, tmp_path, run, bounded):
    (model / "README.md").write_text(f"---\n{metadata}\n---\n\n# Model\n")
    code, _, error = run(model, tmp_path / "out")
    assert code == 1
    assert named in error
    assert str(model / "README.md") in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ("license: mit", "mit"),
        ("license: [mit, apache-2.0]", "mit, apache-2.0"),
        ("license:\n- mit\n- other\ntags: [a]", "mit, other"),
        ("'license' : >\n  mit\n\ntags: [a]", "mit"),
        (f"a0: &a0 {{x: 1}}\n{MERGES}\nlicense: mit", "mit"),
        ("x: " + 100_000 * "[" + "\nlicense: mit", "mit"),
        ("license:", None),
        ("license: ''", None),
        ("tags: [a]", None),
        ("- a", None),
    ],
)
def test_the_license_of_a_card(metadata, expected, model, bounded):
    (model / "README.md").write_text(f"---\n{metadata}\n---\n\n# Model\n")
    assert read_checkpoint(model).license == expected


# D2: sizes that are stated and sizes of the weights

DEEP = json.loads(300 * "[" + 300 * "]")
HUGE = {
    "config.json": [
        *({name: 10**9} for name in ("hidden_size", "num_hidden_layers", "intermediate_size", "num_mel_bins")),
        *({name: 10**9} for name in ("max_position_embeddings", "patch_size", "num_attention_heads", "max_length")),
        {"num_hidden_layers": 250},
        {"hidden_size": 1024},
        {"intermediate_size": 65536},
        {"max_position_embeddings": 100_000},
        {"num_mel_bins": 4096, "max_position_embeddings": 1000},
        {"id2label": {str(i): f"label {i}" for i in range(200_000)}},
        {"patch_size": 0},
        {"patch_size": 16.0},
        {"patch_size": "16"},
        {"num_hidden_layers": True},
        {"num_hidden_layers": [3]},
        {"hidden_size": None},
        {"hidden_size": {"a": 1}},
        {"hidden_size": DEEP},
        {"hidden_size": 10**400},
        {"layer_norm_eps": float("nan")},
        {"layer_norm_eps": float("inf")},
        {"layer_norm_eps": 10**400},
        {"id2label": 5},
        {"id2label": [1]},
        {"qkv_bias": "no"},
        {"hidden_act": ["gelu"]},
        {"dtype": 5},
        {"dtype": "nothing"},
    ],
    "preprocessor_config.json": [
        {"num_mel_bins": 10**9},
        {"num_mel_bins": 64},
        {"num_mel_bins": [128]},
        {"max_length": 16 * 10**9},
        {"max_length": None},
        {"max_length": "1024"},
        {"patch_size": 0},
        {"patch_size": None},
        {"sampling_rate": 0},
        {"sampling_rate": 10**9},
        {"sampling_rate": -16000},
        {"sampling_rate": "16000"},
        {"sampling_rate": [16000]},
        {"std": "big"},
        {"std": float("inf")},
        {"mean": float("nan")},
        {"mean": [1.0]},
        {"feature_size": 2},
        {"padding_side": "left"},
    ],
}
CHANGES = [(file, change) for file, changes in HUGE.items() for change in changes]
IDS = [f"{file.partition('.')[0]}-{str(change)[:40]}" for file, change in CHANGES]
# Conversion takes these from the weights' shapes or from the other file and ignores the values here.
TAKEN_FROM_ELSEWHERE = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "patch_size", "num_mel_bins", "max_length"),
    *("qkv_bias", "dtype"),
)


def change_json(path: Path, change: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


@pytest.mark.parametrize(("file", "change"), CHANGES, ids=IDS)
def test_sizes_that_the_weights_do_not_have_are_refused_by_the_tagger(file, change, model, bounded):
    change_json(model / file, change)
    with pytest.raises(InferenceError) as refusal:
        load(model)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize(("file", "change"), CHANGES, ids=IDS)
def test_sizes_that_the_weights_do_not_have_are_refused_by_conversion(
    file, change, classifier, model, tmp_path, run, bounded
):
    change_json(model / file, change)
    before = SSLAMConfig.from_pretrained(classifier)
    code, _, error = run(model, tmp_path / "out")
    (name, *_) = change
    if code == 0:
        assert name in TAKEN_FROM_ELSEWHERE
        after = SSLAMConfig.from_pretrained(tmp_path / "out")
        assert getattr(after, name) == getattr(before, name)
        load(tmp_path / "out")
    else:
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert len(error) < 1000
        assert not (tmp_path / "out").exists()


def test_a_missing_layer_is_named_before_the_model_is_built(model, bounded):
    change_json(model / "config.json", {"num_hidden_layers": 4})
    with pytest.raises(InferenceError, match=r"has no weights for sslam\.encoder\.layers\.3\."):
        load(model)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("text", ["", "[1]", "3", "{", 100_000 * "[", '{"a": ' * 100_000, " " * (9 << 20)])
def test_broken_settings_are_named_in_one_line(name, text, model, tmp_path, run, bounded):
    (model / name).write_text(text)
    with pytest.raises(InferenceError, match=name.replace(".", r"\.")) as refusal:
        load(model)
    assert "\n" not in str(refusal.value)
    code, _, error = run(model, tmp_path / "out")
    assert code == 1
    assert str(model / name) in error
    assert error.count("\n") == 1


# D3: checksums


@pytest.mark.parametrize("record", ["data/0", "data/3", "data.pkl", "version", "byteorder"])
def test_a_flipped_bit_in_any_record_is_refused(record, golden_dir, tmp_path):
    path = tmp_path / "flipped.pt"
    content = bytearray((golden_dir / "sslam_finetuned.pt").read_bytes())
    with zipfile.ZipFile(golden_dir / "sslam_finetuned.pt") as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(f"/{record}")]
        info = archive.getinfo(name)
    start = info.header_offset + 30 + sum(struct.unpack_from("<HH", content, info.header_offset + 26))
    content[start + info.file_size // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ConversionError, match=rf"its record {name} does not have the checksum"):
        read_checkpoint(path)


def test_a_file_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"model": WEIGHT}, tmp_path / "unchecked.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "unchecked.pt").tensors.keys() == WEIGHT.keys()


# D4: indices of sharded weights


def shard(model: Path) -> Path:
    weights = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, model / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    index = model / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_sharded_weights_are_read(model, tmp_path, run):
    shard(model)
    assert load(model)
    assert run(model, tmp_path / "out")[0] == 0


INDICES = {
    "no map": {"metadata": {}},
    "an empty map": {"weight_map": {}},
    "a list": {"weight_map": ["model.safetensors"]},
    "text": {"weight_map": "model.safetensors"},
    "numbers": {"weight_map": {"a": 3}},
    "lists": {"weight_map": {"a": ["model.safetensors"]}},
    "nothing": {"weight_map": {"a": None}},
    "no name": {"weight_map": {"a": ""}},
    "the folder": {"weight_map": {"a": "."}},
    "the folder above": {"weight_map": {"a": ".."}},
    "another folder": {"weight_map": {"a": "../elsewhere/model.safetensors"}},
    "an absolute path": {"weight_map": {"a": "/etc/passwd"}},
    "a zero": {"weight_map": {"a": "model\0.safetensors"}},
    "itself": {"weight_map": {"a": "model.safetensors.index.json"}},
    "a file that is not there": {"weight_map": {"a": "model-00009-of-00009.safetensors"}},
    "a long name": {"weight_map": {"a": 5000 * "x"}},
    "its own list": [1],
}


@pytest.mark.parametrize("index", INDICES.values(), ids=INDICES)
def test_a_broken_index_is_refused_in_one_line(index, model, tmp_path, run, bounded):
    shard(model).write_text(json.dumps(index))
    with pytest.raises(InferenceError) as refusal:
        load(model)
    assert "\n" not in str(refusal.value)
    code, _, error = run(model, tmp_path / "out")
    assert code == 1
    assert error.startswith("error: ")
    assert str(model) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# D6: kills and second calls


@pytest.fixture(params=["atomic exchange", "two renames"])
def exchange(request, monkeypatch) -> str:
    """Run a test with the system's atomic exchange of two paths, and without one."""
    if request.param == "two renames":
        monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    return request.param


def in_killed_process(step: int, call: Callable[[], None]) -> bool:
    """Run a call in a forked process that is killed before its nth change of names. Return whether it was killed."""
    child = os.fork()
    if child == 0:
        changes = 0

        def killing(function: Callable) -> Callable:
            def change(*arguments: Any, **options: Any) -> Any:
                nonlocal changes
                changes += 1
                if changes > step:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return change

        for name in ("rename", "replace", "unlink", "rmdir", "fsync", "chmod"):
            setattr(os, name, killing(getattr(os, name)))
        files._exchange = killing(files._exchange)
        with suppress(BaseException):
            call()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def write_folder(target: Path, text: str) -> None:
    with replacing(target) as folder:
        (folder / "inner").mkdir(parents=True)
        (folder / "inner" / "file").write_text(text)


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_to_the_next_call(tmp_path, exchange):
    target = tmp_path / "result"
    states = set()
    for step in range(100):
        write_folder(target, "old")
        killed = in_killed_process(step, lambda: write_folder(target, "new"))
        if not killed:
            break
        with pytest.raises(RuntimeError), replacing(target):  # repairs, and changes nothing by itself
            raise RuntimeError("a later call that fails")
        states.add((target / "inner" / "file").read_text())
        assert os.listdir(tmp_path) == ["result"]
    assert not killed
    assert step > 8
    assert states == {"old", "new"}


def test_remove_leftovers_repairs_and_removes_only_the_programs_own_paths(tmp_path, exchange):
    target = tmp_path / "run" / "best"
    target.parent.mkdir()
    mine = [tmp_path / "run" / ".tmp-mine", tmp_path / "run" / ".hidden"]
    for path in mine:
        path.mkdir()
    step, killed = 0, True
    while killed:
        write_folder(target, "old")
        killed = in_killed_process(step, lambda: write_folder(target, "new"))
        files.remove_leftovers(tmp_path)
        assert (target / "inner" / "file").read_text() in ("old", "new")
        assert set(target.parent.iterdir()) == {target, *mine}
        step += 1


def test_a_conversion_killed_between_two_renames_is_repaired_by_the_next(golden_dir, tmp_path, run, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    out = tmp_path / "out"
    assert run(golden_dir / "sslam_pretrained.pt", out)[0] == 0
    old = (out / "model.safetensors").read_bytes()
    child = os.fork()
    if child == 0:
        rename = Path.rename

        def kill_after(self: Path, target: Path) -> None:
            rename(self, target)
            os.kill(os.getpid(), signal.SIGKILL)

        Path.rename = kill_after  # type: ignore[method-assign,assignment]  # in this process alone
        main([str(golden_dir / "sslam_finetuned.pt"), str(out), "--overwrite", "--quiet"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not out.exists()
    # Without --overwrite: the old result is still there.
    code, _, error = run(golden_dir / "sslam_finetuned.pt", out)
    assert code == 1
    assert "exists already" in error
    assert (out / "model.safetensors").read_bytes() == old
    assert list(tmp_path.iterdir()) == [out]


def test_a_second_conversion_to_the_same_target_is_refused(golden_dir, tmp_path, run):
    out = tmp_path / "out"
    with replacing(out) as place:
        place.mkdir()
        (place / "half").touch()
        code, _, error = run(golden_dir / "sslam_finetuned.pt", out)
        assert code == 1
        assert error == f"error: {out} is being written by another call; wait until that has ended.\n"
        assert (place / "half").exists()
    assert [path.name for path in out.iterdir()] == ["half"]
    assert list(tmp_path.iterdir()) == [out]


def test_leftovers_of_living_writers_stay(tmp_path):
    with replacing(tmp_path / "result") as place:
        place.mkdir()
        files.remove_leftovers(tmp_path)
        assert place.is_dir()
        with pytest.raises(TargetInUseError, match="is being written"), replacing(tmp_path / "result"):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["result"]


# D7: permissions


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
@pytest.mark.parametrize("to", ["transformers", "hub-eat", "fairseq"])
def test_files_are_written_with_the_modes_of_the_umask(to, umask, golden_dir, tmp_path, run):
    before = os.umask(umask)
    try:
        assert run(golden_dir / "sslam_finetuned.pt", tmp_path / "out", "--to", to)[0] == 0
    finally:
        os.umask(before)
    out = tmp_path / "out"
    paths = list(out.rglob("*")) if out.is_dir() else [out]
    assert {stat.S_IMODE(path.stat().st_mode) for path in paths} == {0o666 & ~umask}
    if out.is_dir():
        assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask


# D8: full disks


@pytest.mark.parametrize("limit", [100, 5_000, 30_000, 100_000])
@pytest.mark.parametrize("to", ["transformers", "hub-eat", "fairseq"])
def test_a_full_disk_is_one_line_and_leaves_nothing(to, limit, golden_dir, tmp_path, run):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        code, _, error = run(golden_dir / "sslam_finetuned.pt", tmp_path / "out", "--to", to, "--quiet")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert str(tmp_path / "out") in error
    assert ".sslam-" not in error
    assert list(tmp_path.iterdir()) == []


# D11: text from files

TEXTS = [
    "two\nlines",
    "a|b",
    r"a\|b",
    "\\",
    "<script>&amp;</script>",
    "Speech & music",
    "\r\n",
    "`x`",
    "&#124;",
    "näive 音 👩‍🚒",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_cell_of_a_model_card_parses_back(text):
    card = render_card(
        "T", "S", {"Key": text}, model_class="SSLAMModel", sampling_rate=16_000, sections={}, license_name=text
    )
    (row,) = [line for line in card.splitlines() if line.startswith("| Key ")]
    assert row.count("|") == 3
    assert html.unescape(row.removeprefix("| Key | ").removesuffix(" |")) == text.replace("\r", r"\r")
    assert ModelCard(card).data.to_dict()["license"] == text


def test_code_in_a_card_stays_in_its_line():
    assert code_span("mit") == "`mit`"
    assert code_span("a`b") == "`` a`b ``"
    assert code_span("x\n# Heading\x1b") == r"`x\n# Heading\x1b`"


def test_names_and_licenses_from_a_source_are_escaped_on_terminal_and_card(golden_dir, tmp_path, run):
    source = tmp_path / "a\x1b[31m|b\n# c"
    shutil.copytree(golden_dir / "hub_finetuned", source)
    (source / "README.md").write_text('---\nlicense: "x`\\n# y\\e[0m"\n---\n')
    code, out, _ = run(source, tmp_path / "out")
    assert code == 0
    assert "\x1b" not in out
    assert r"a\x1b[31m|b\n# c" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "\x1b" not in card
    assert "\n# c" not in card
    assert "\n# y" not in card
    assert r"| Converted from | a\x1b[31m&#124;b&#10;# c |" in card
    assert r"`` x`\n# y\x1b[0m ``, as its source states." in card
    assert ModelCard(card).data.to_dict()["license"] == "x`\n# y\x1b[0m"
    code, out, error = run(source, tmp_path / "out", "--num-attention-heads", "5", "--overwrite")
    assert code == 1
    assert "\x1b" not in error + out


def test_names_of_weights_are_escaped_on_the_terminal(tmp_path, run):
    torch.save({"\x1b]0;title\x07\nblocks": torch.zeros(1)}, tmp_path / "x.pt")
    code, _, error = run(tmp_path / "x.pt", tmp_path / "out")
    assert code == 1
    assert r"\x1b]0;title\x07\nblocks" in error
    assert error.count("\n") == 1


def test_labels_survive_conversion(model, tmp_path, run):
    labels = {str(i): f"{text}{i}" for i, text in enumerate([*TEXTS, "\x1b[0m"])}
    config = json.loads((model / "config.json").read_text())
    labels |= {str(i): f"label {i}" for i in range(len(labels), len(config["id2label"]))}
    labels = {str(i): labels[str(i)] for i in range(len(config["id2label"]))}
    change_json(model / "config.json", {"id2label": labels, "label2id": {name: int(i) for i, name in labels.items()}})
    assert run(model, tmp_path / "out")[0] == 0
    assert SSLAMConfig.from_pretrained(tmp_path / "out").id2label == {int(i): name for i, name in labels.items()}


# D13: Ctrl-C


@pytest.mark.usefixtures("_python_s_own_sigint")
def test_an_interrupted_conversion_says_so_in_one_line(golden_dir, tmp_path, run, monkeypatch):
    def interrupt(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(10)

    for step in ("read_checkpoint", "describe", "_build"):
        with monkeypatch.context() as patch:
            patch.setattr(conversion_module, step, interrupt)
            assert run(golden_dir / "sslam_finetuned.pt", tmp_path / "out", "--quiet") == (
                130,
                "",
                "error: interrupted; OUT is as it was, or complete.\n",
            )
        assert list(tmp_path.iterdir()) == []


# E10: everything is on the disk before it has its name


@pytest.mark.parametrize("kind", ["text", "folder", "model"])
def test_everything_is_flushed_before_it_gets_its_name(kind, tmp_path, golden_dir, monkeypatch, run, exchange):
    target = tmp_path / "out"
    events: list[tuple[str, Any]] = []
    fsync, replace, rename, swap = os.fsync, Path.replace, Path.rename, files._exchange

    def note_flush(descriptor: int) -> None:
        events.append(("flush", os.fstat(descriptor).st_ino))
        fsync(descriptor)

    def noting(function: Callable) -> Callable:
        def change(source: Path, name: Path) -> Any:
            inodes = {path.stat().st_ino for path in (source, *source.rglob("*"))}
            events.append(("name", inodes))
            return function(source, name)

        return change

    monkeypatch.setattr(os, "fsync", note_flush)
    monkeypatch.setattr(Path, "replace", noting(replace))
    monkeypatch.setattr(Path, "rename", noting(rename))
    monkeypatch.setattr(files, "_exchange", noting(swap))
    for _ in range(2):
        events.clear()
        if kind == "text":
            write_text(target, "text")
        elif kind == "folder":
            write_folder(target, "text")
        else:
            assert run(golden_dir / "sslam_finetuned.pt", target, "--overwrite", "--quiet")[0] == 0
        content = {path.stat().st_ino for path in (target, *target.rglob("*"))}
        named = next(i for i, (event, inodes) in enumerate(events) if event == "name" and inodes == content)
        assert content <= {inode for event, inode in events[:named] if event == "flush"}
        assert events[-1] == ("flush", tmp_path.stat().st_ino)

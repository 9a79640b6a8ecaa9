"""Takes weights and settings out of a checkpoint, whatever its form, and executes nothing of it.

A `.pt` file is a pickle: a program that may call anything. It is read by torch's weights-only unpickler, which imports
nothing and calls only what it was told to. For the classes of the training code that wrote the file (omegaconf's,
fairseq's, enumerations of EAT's own module) it is told of stand-ins that keep what they are given and do nothing.
A file that names anything else is refused by that name.
"""

import json
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import safetensors
import safetensors.torch
import torch
import yaml
from huggingface_hub import metadata_load

from . import ConversionError

# Where savers put the weights when the file holds more than them.
STATE_KEYS = ("model", "state_dict", "model_state_dict")
# Of a folder's files the first that is there is read; the rest are other forms of the same weights.
FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "*.safetensors",
    "*.pt",
    "*.pth",
    "*.bin",
)

# What weights are made of: torch's unpickler knows these itself.
_WEIGHTS = re.compile(
    r"collections\.OrderedDict|_codecs\.encode"
    r"|torch\.(\w+Storage|Size|device|Tensor|b?float\d+|u?int\d+|bool)|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\.nn\.parameter\.Parameter|builtins\.(bytearray|complex|set)"
)
# What a checkpoint may hold beside its weights: instances of these get a stand-in.
_STANDS_IN = re.compile(
    r"(omegaconf|fairseq)\.[\w.]+"
    r"|(typing|pathlib)\.\w+"
    r"|argparse\.Namespace|collections\.defaultdict"
    r"|builtins\.(bool|bytes|dict|float|int|list|object|str|tuple)"
    r"|numpy\.(dtype|ndarray)|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)"
    r"|[\w.]+\.(Modality|PredictionMode|\w+Config)"
)
_ZIP, _LFS_POINTER = b"PK\x03\x04", b"version https://git-lfs"
# The format before torch 1.6 is this many pickles one after another, then the numbers.
_LEGACY_PICKLES = 5


@dataclass(frozen=True)
class Checkpoint:
    """What a source holds: `tensors` by their full names in it, and the `settings` beside them, which are fairseq's
    cfg or a config.json; `preprocessor` is a folder's preprocessor_config.json, `license` what its README.md states.
    They are empty if there are none. `files` are those that the tensors came from."""

    files: tuple[Path, ...]
    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    license: str | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a file (.pt, .bin, .safetensors; told apart by content, not by name) or a folder with its config.json.

    The tensors are views of the mapped file, except those of the format before torch 1.6.

    Raises:
        ConversionError: If there is no such file, or it is damaged, no checkpoint, or would have to be executed.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ConversionError(f"{path} is not there. SOURCE is a file, a folder, or the name of a Hub repository.")
    try:
        return _read_file(path)
    except ConversionError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0].strip()
        raise ConversionError(
            f"{path} cannot be read as plain data ({reason}), so it was refused, and nothing of it was executed. It "
            "can be when it is saved again by torch.save as it comes, or as safetensors."
        ) from error
    # What a damaged file makes torch, zipfile and safetensors raise.
    except (
        RuntimeError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        safetensors.SafetensorError,
    ) as error:
        reason = re.split(r"\.\s|\n", str(error))[0] or type(error).__name__
        raise ConversionError(f"{path} is no checkpoint, or is cut short or damaged: {reason}.") from error


def _read_folder(folder: Path) -> Checkpoint:
    for pattern in FOLDER_WEIGHTS:
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            raise ConversionError(
                f"{folder} holds {', '.join(file.name for file in files)}; name one of them as SOURCE."
            )
        if files:
            break
    else:
        raise ConversionError(f"{folder} holds no weights: none of {', '.join(FOLDER_WEIGHTS)}.")
    if files[0].name.endswith(".index.json"):
        # Only names, so that an index cannot point outside its folder.
        files = [folder / Path(name).name for name in sorted(set(_read_json(files[0])["weight_map"].values()))]
    parts = [read_checkpoint(file) for file in files]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    config, preprocessor = (
        _read_json(path) if (path := folder / name).is_file() else {}
        for name in ("config.json", "preprocessor_config.json")
    )
    return Checkpoint(
        tuple(files), tensors, config or parts[0].settings, preprocessor, _stated_license(folder / "README.md")
    )


def _stated_license(card: Path) -> str | None:
    try:
        metadata = metadata_load(card) if card.is_file() else None
    except (ValueError, yaml.YAMLError):
        return None  # a card is prose: what cannot be read in it states nothing
    return (metadata or {}).get("license")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConversionError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} holds a {type(content).__name__}, not settings by name.")
    return content


def _read_file(path: Path) -> Checkpoint:
    with path.open("rb") as stream:
        head = stream.read(len(_LFS_POINTER))
    if not head:
        raise ConversionError(f"{path} is empty.")
    if head == _LFS_POINTER:
        raise ConversionError(
            f"{path} is a git-lfs pointer, not the file it points at; fetch that with `git lfs pull`."
        )
    # A safetensors file begins with the length of its header, eight bytes, and the header, which is JSON.
    payload = safetensors.torch.load_file(path) if head[8:9] == b"{" else _unpickle(path, head.startswith(_ZIP))
    if not isinstance(payload, dict):
        raise ConversionError(f"{path} holds a {type(payload).__name__}, not weights by name.")
    settings = _plain(payload.get("cfg"))
    state = next((payload[key] for key in STATE_KEYS if isinstance(payload.get(key), dict)), payload)
    return Checkpoint((path,), dict(_tensors(state)), settings if isinstance(settings, dict) else {})


def _unpickle(path: Path, is_zip: bool) -> Any:
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            records = [name for name in archive.namelist() if name.endswith("data.pkl")]
            named = {name for record in records for name in _named_globals(archive.open(record), 1)}
    else:
        with path.open("rb") as stream:
            named = set(_named_globals(stream, _LEGACY_PICKLES))
    # This decides what gets a stand-in and what the error says. What may pass is the unpickler's own decision.
    refused = sorted(name for name in named if not _WEIGHTS.fullmatch(name) and not _STANDS_IN.fullmatch(name))
    if refused:
        raise ConversionError(
            f"{path} asks for {', '.join(refused)}, which no checkpoint needs. Reading it could run code of its "
            "author's, so it was refused, and nothing of it was executed."
        )
    stand_ins = [(_stand_in(name), name) for name in named if _STANDS_IN.fullmatch(name)]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice on what is refused here in any case
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _named_globals(stream: BinaryIO, num_pickles: int) -> Iterator[str]:
    """The names that pickles ask to import, told without unpickling them."""
    for _ in range(num_pickles):
        texts: list[str] = ["?", "?"]  # that were pushed, to know what STACK_GLOBAL takes
        memo: list[str] = []
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    yield _modern_name(*argument.split(" ", 1))
                elif opcode.name == "STACK_GLOBAL":
                    yield _modern_name(*texts[-2:])
                elif "UNICODE" in opcode.name or "STRING" in opcode.name:
                    texts.append(str(argument))
                elif opcode.name == "MEMOIZE":
                    memo.append(texts[-1])
                elif opcode.name in ("BINGET", "LONG_BINGET") and argument < len(memo):
                    texts.append(memo[argument])
        except ValueError:  # no opcode, or none of a pickle's any more: the pickles end here
            return


def _modern_name(module: str, name: str) -> str:
    # Protocol 2 writes the names of Python 2 (__builtin__.long); the unpickler knows those of Python 3.
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


class _StandIn:
    """An object whose class was not imported: it keeps the arguments and the state that it is given."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stand_in(name: str) -> Any:
    # The unpickler fills a defaultdict item by item, and does that to a dict alone.
    return (lambda *_: {}) if name == "collections.defaultdict" else type(name, (_StandIn,), {})


def _plain(value: Any) -> Any:
    """Settings without stand-ins: omegaconf's containers and nodes become what they hold, enumerations a number."""
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, _StandIn):
        if isinstance(value.state, dict):
            return _plain(next((value.state[key] for key in ("_content", "_val") if key in value.state), value.state))
        return _plain(value.arguments[0]) if len(value.arguments) == 1 else None
    return value if isinstance(value, (str, int, float)) else None


def _tensors(state: dict, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by name; those of a dict inside (the teacher's, `_ema`) have its name in front."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value.detach()
        else:
            raise ValueError(f"it holds {prefix}{key}, a {type(value).__name__}, where weights should be")

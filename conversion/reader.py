"""Reading of weights and settings from checkpoints of all forms, without executing anything in them.

A `.pt` file is a pickle: a program that can call any function. torch's weights-only unpickler reads it: it imports
nothing and calls only functions on its list. For classes of the training code (omegaconf's, fairseq's, enumerations of
EAT's module) the list gets stand-ins, which store their arguments and do nothing else. A file that references any
other name is refused, and the error names the reference.
"""

import json
import pickle
import pickletools
import re
import warnings
import zipfile
import zlib
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
import yaml
from huggingface_hub import metadata_load

from . import ConversionError

# Keys under which training programs store the weights in a file that holds more than weights.
STATE_KEYS = ("model", "state_dict", "model_state_dict")
# The first of these that a folder has is read. The others are other forms of the same weights.
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

# Names that weights consist of. torch's unpickler allows them by itself.
_WEIGHTS = re.compile(
    r"collections\.OrderedDict|_codecs\.encode"
    r"|torch\.(\w+Storage|Size|device|Tensor|b?float\d+|u?int\d+|bool)|torch\.storage\.(Untyped|Typed)Storage"
    r"|torch\._utils\._rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch\.nn\.parameter\.Parameter|builtins\.(bytearray|complex|set)"
)
# Names of classes that published checkpoints hold beside their weights. Each gets a stand-in.
_STANDS_IN = re.compile(
    r"(omegaconf|fairseq)\.[\w.]+"
    r"|(typing|pathlib)\.\w+"
    r"|argparse\.Namespace|collections\.defaultdict"
    r"|builtins\.(bool|bytes|dict|float|int|list|object|str|tuple)"
    r"|numpy\.(dtype|ndarray)|numpy\.(core|_core)\.multiarray\.(scalar|_reconstruct)"
    r"|[\w.]+\.(Modality|PredictionMode|\w+Config)"
)
_ZIP, _LFS_POINTER = b"PK\x03\x04", b"version https://git-lfs"
# A file in the format before torch 1.6 consists of this many pickles, then the numbers.
_LEGACY_PICKLES = 5


@dataclass(frozen=True)
class Checkpoint:
    """Content of a source.

    Attributes:
        files: The files that the tensors were read from.
        tensors: The weights by the source's own names.
        settings: fairseq's `cfg`, or a folder's config.json. Empty if the source has none.
        preprocessor: A folder's preprocessor_config.json. Empty if the source has none.
        license: The license in the metadata of a folder's README.md.
    """

    files: tuple[Path, ...]
    tensors: dict[str, torch.Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    preprocessor: dict[str, Any] = field(default_factory=dict)
    license: str | None = None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint: a file, or a folder with its config.json.

    A file is a `.pt` or `.bin` (a pickle in torch's zip format or the one before torch 1.6) or a `.safetensors`. Its
    content decides, not its name. Nothing in it is executed.

    Args:
        path: The file or folder. Of a folder, the first match of `FOLDER_WEIGHTS` is read, with all its shards.

    Returns:
        The content. Tensors are on the CPU and keep their dtype and shape. They are views of the mapped file, except
        for the format before torch 1.6.

    Raises:
        ConversionError: If there is no such file, if it is damaged or no checkpoint, or if reading it would execute
            code.
    """
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise ConversionError(f"{path} does not exist. SOURCE is a file, a folder, or a Hub repository's OWNER/NAME.")
    try:
        return _read_file(path)
    except ConversionError:
        raise
    except pickle.UnpicklingError as error:
        reason = str(error).rpartition("WeightsUnpickler error: ")[2].partition("\n")[0].strip()
        detail = f" ({reason})" if reason else ""
        raise ConversionError(
            f"{path} cannot be read as plain data{detail}, so it was refused, and nothing in it was executed. Save "
            "its weights again by a plain torch.save, or as safetensors."
        ) from error
    # torch, zipfile and safetensors raise any of these on damaged files.
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
        raise ConversionError(f"{path} is no checkpoint, or it is cut short or damaged: {reason}.") from error


def _read_folder(folder: Path) -> Checkpoint:
    """Read a folder's weights, with config.json, preprocessor_config.json and the license in README.md."""
    for pattern in FOLDER_WEIGHTS:
        files = sorted(folder.glob(pattern))
        if len(files) > 1:
            raise ConversionError(
                f"{folder} holds {', '.join(file.name for file in files)}; pass one of them as SOURCE."
            )
        if files:
            break
    else:
        raise ConversionError(f"{folder} holds no weights: none of {', '.join(FOLDER_WEIGHTS)}.")
    if files[0].name.endswith(".index.json"):
        # Only the names are used, so that an index cannot refer to files outside its folder.
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
    """Return the license in the metadata of a README.md."""
    try:
        metadata = metadata_load(card) if card.is_file() else None
    except (ValueError, yaml.YAMLError):
        return None  # a card is free text: unreadable metadata state no license
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
        raise ConversionError(f"{path} is a git-lfs pointer in place of the file; fetch the file with `git lfs pull`.")
    # A safetensors file begins with the length of its header in eight bytes. The header is JSON.
    payload: Any = safetensors.torch.load_file(path) if head[8:9] == b"{" else _unpickle(path, head.startswith(_ZIP))
    if not isinstance(payload, dict):
        raise ConversionError(f"{path} holds a {type(payload).__name__}, not weights by name.")
    settings = _plain(payload.get("cfg"))
    state = next((found for key in STATE_KEYS if isinstance(found := payload.get(key), dict)), payload)
    return Checkpoint((path,), dict(_tensors(state)), settings if isinstance(settings, dict) else {})


def _unpickle(path: Path, is_zip: bool) -> Any:
    """Read a pickle, in torch's zip format or the one before torch 1.6, with stand-ins for unknown classes."""
    if is_zip:
        with zipfile.ZipFile(path) as archive:
            records = [name for name in archive.namelist() if name.endswith("data.pkl")]
            named = {name for record in records for name in _named_globals(archive.open(record), 1)}
    else:
        with path.open("rb") as stream:
            named = set(_named_globals(stream, _LEGACY_PICKLES))
    # Selects the classes that get stand-ins and words the error. torch's weights-only unpickler decides what may load.
    refused = sorted(name for name in named if not _WEIGHTS.fullmatch(name) and not _STANDS_IN.fullmatch(name))
    if refused:
        raise ConversionError(
            f"{path} references {', '.join(refused)}, which no checkpoint needs. Reading it could run its author's "
            "code, so it was refused, and nothing in it was executed."
        )
    stand_ins: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        (_stand_in(name), name) for name in named if _STANDS_IN.fullmatch(name)
    ]
    with torch.serialization.safe_globals(stand_ins), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice about files that are refused in any case
        return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)


def _named_globals(stream: IO[bytes], num_pickles: int) -> Iterator[str]:
    """Yield the names that pickles import, without unpickling them."""
    for _ in range(num_pickles):
        strings: list[str] = ["?", "?"]  # those pushed so far: STACK_GLOBAL takes the last two
        memo: list[str] = []
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    yield _modern_name(*str(argument).split(" ", 1))
                elif opcode.name == "STACK_GLOBAL":
                    yield _modern_name(*strings[-2:])
                elif "UNICODE" in opcode.name or "STRING" in opcode.name:
                    strings.append(str(argument))
                elif opcode.name == "MEMOIZE":
                    memo.append(strings[-1])
                elif opcode.name in ("BINGET", "LONG_BINGET") and isinstance(argument, int) and argument < len(memo):
                    strings.append(memo[argument])
        except ValueError:  # an unknown opcode, or the end of the file: the pickles end here
            return


def _modern_name(module: str, name: str) -> str:
    # Protocol 2 writes Python 2's names (__builtin__.long). The unpickler maps them to Python 3's.
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


class _StandIn:
    """Object whose class is not imported. It stores the arguments and the state from the pickle."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments, self.state = arguments, None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _stand_in(name: str) -> Any:
    # The unpickler fills a defaultdict item by item, which it does for a dict only.
    return (lambda *_: {}) if name == "collections.defaultdict" else type(name, (_StandIn,), {})


def _plain(value: Any) -> Any:
    """Replace stand-ins in settings: omegaconf's containers and nodes by their content, enumerations by a number."""
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, _StandIn):
        if isinstance(value.state, dict):
            return _plain(next((value.state[key] for key in ("_content", "_val") if key in value.state), value.state))
        return _plain(value.arguments[0]) if len(value.arguments) == 1 else None
    return value if isinstance(value, (str, int, float)) else None


def _tensors(state: dict[Any, Any], prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and weights. Names in a nested dict (the teacher's, `_ema`) get the dict's key as prefix."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _tensors(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value.detach()
        else:
            raise ValueError(f"it holds {prefix}{key}, a {type(value).__name__}, among the weights")

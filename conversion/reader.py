"""Reading of weights and settings from checkpoints of all forms, without executing anything in them.

A `.pt` file is a pickle: a program that can call any function. `pickles` runs it without calling any. A file that
references a name that no checkpoint needs is refused, and the error names the reference. A file that describes more
than a checkpoint can hold is refused too.
"""

import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from modeling_sslam.common.model_folder import ModelFolderError, read_json, shard_names

from . import ConversionError
from .pickles import Budget, ForbiddenReferenceError, Instance, PickleError, TensorView
from .torch_files import read_torch_file

# Keys under which training programs store the weights in a file that holds more than weights.
STATE_KEYS = ("model", "state_dict", "model_state_dict")
# Only the first of these that a folder has is read, because all are forms of the same weights.
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

_ZIP, _LFS_POINTER = b"PK\x03\x04", b"version https://git-lfs"
# Far above what a checkpoint holds: 700 tensors for the pre-training of a large model, 2000 settings of fairseq.
MAX_WEIGHTS, MAX_NAME_LENGTH, MAX_DEPTH = 10_000, 500, 50
MAX_SETTINGS = 100_000
MAX_CARD_BYTES, MAX_LICENSE_LENGTH = 4 << 20, 500
# The line of a card's metadata that states the license, with the indented or listed lines that belong to it.
_LICENSE_ENTRY = re.compile(r"""^(["']?)license\1[ \t]*:.*(\n[ \t-].*)*""", re.MULTILINE)


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
        path: The file or folder. In a folder, the first match of `FOLDER_WEIGHTS` is read, with all its shards.

    Returns:
        The content. Tensors are on the CPU and keep their dtype and shape. They are views of the mapped file, except
        where the file holds them unaligned, as the format before torch 1.6 does.

    Raises:
        ConversionError: If the file is missing, damaged or no checkpoint, or if reading it would execute code.
    """
    if path.is_dir():
        try:
            return _read_folder(path)
        except ModelFolderError as error:
            raise ConversionError(str(error)) from error
    if not path.is_file():
        raise ConversionError(f"{path} does not exist. SOURCE is a file, a folder, or a Hub repository's OWNER/NAME.")
    try:
        return _read_file(path)
    except ConversionError:
        raise
    except ForbiddenReferenceError as error:
        raise ConversionError(
            f"{path} references {error}, which no checkpoint needs. Reading it could run its author's code, so it was "
            "refused, and nothing in it was executed."
        ) from error
    except PickleError as error:
        raise ConversionError(
            f"{path} cannot be read as plain data ({error}), so it was refused, and nothing in it was executed. Save "
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
        files = [folder / name for name in shard_names(files[0])]
    parts = [read_checkpoint(file) for file in files]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    config, preprocessor = (
        read_json(path) if (path := folder / name).is_file() else {}
        for name in ("config.json", "preprocessor_config.json")
    )
    return Checkpoint(
        tuple(files), tensors, config or parts[0].settings, preprocessor, _stated_license(folder / "README.md")
    )


def _stated_license(card: Path) -> str | None:
    """Return the license in the metadata of a README.md.

    Raises:
        ConversionError: If the card is too large, or the license is no short text.
    """
    if not card.is_file():
        return None
    if card.stat().st_size > MAX_CARD_BYTES:
        raise ConversionError(f"{card} has {card.stat().st_size} bytes, more than the {MAX_CARD_BYTES} of a README.")
    # Only this entry is parsed: YAML takes very long for nested metadata, and its aliases can describe endless ones.
    entry = _LICENSE_ENTRY.search(_metadata(card.read_text(encoding="utf-8", errors="replace")))
    if entry is None:
        return None
    try:
        if len(entry[0]) > MAX_LICENSE_LENGTH:
            raise ValueError(f"it has {len(entry[0])} characters")
        stated = yaml.safe_load(entry[0])["license"]
        names = stated if isinstance(stated, list) else [stated or ""]
        if not all(isinstance(name, str) for name in names):
            raise ValueError("it is no text")
    except (ValueError, TypeError, LookupError, RecursionError, yaml.YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise ConversionError(
            f"The license in the metadata of {card} is no short name ({reason}); correct it."
        ) from error
    return ", ".join(names) or None


def _metadata(card: str) -> str:
    block = REGEX_YAML_BLOCK.search(card)
    return block[2] if block else ""


def _read_file(path: Path) -> Checkpoint:
    with path.open("rb") as stream:
        head = stream.read(len(_LFS_POINTER))
    if not head:
        raise ConversionError(f"{path} is empty.")
    if head == _LFS_POINTER:
        raise ConversionError(f"{path} is a git-lfs pointer in place of the file; fetch the file with `git lfs pull`.")
    # A safetensors file begins with the length of its header in eight bytes. The header is JSON.
    if head[8:9] == b"{":
        return Checkpoint((path,), safetensors.torch.load_file(path))
    file = read_torch_file(path, is_zip=head.startswith(_ZIP))
    payload = file.payload
    if not isinstance(payload, dict):
        raise ConversionError(f"{path} holds a {type(payload).__name__}, not weights by name.")
    settings = _plain(payload.get("cfg"), Budget(MAX_SETTINGS, "its settings"))
    state = next((found for key in STATE_KEYS if isinstance(found := payload.get(key), dict)), payload)
    views = dict(_views(state, Budget(MAX_WEIGHTS, "its weights")))
    return Checkpoint((path,), file.tensors(views), settings if isinstance(settings, dict) else {})


def _plain(value: Any, budget: Budget, depth: int = 0) -> Any:
    """Replace instances in settings: omegaconf's containers and nodes by their content, enumerations by a number.

    Raises:
        PickleError: If the settings are too large or nested too deeply.
    """
    budget.spend(1 + (len(value) // 16 if isinstance(value, str) else 0))
    _check_depth(depth, budget.what)
    if isinstance(value, dict):
        return {str(_plain(key, budget, depth + 1)): _plain(item, budget, depth + 1) for key, item in value.items()}
    if type(value) in (list, tuple):
        return [_plain(item, budget, depth + 1) for item in value]
    if isinstance(value, Instance):
        if isinstance(state := value.state, dict):
            return _plain(next((state[key] for key in ("_content", "_val") if key in state), state), budget, depth + 1)
        return _plain(value.arguments[0], budget, depth + 1) if len(value.arguments) == 1 else None
    return value if isinstance(value, (str, int, float)) else None


def _views(
    state: dict[Any, Any], budget: Budget, prefix: str = "", depth: int = 0
) -> Iterator[tuple[str, TensorView]]:
    """Yield names and weights. Names in a nested dict (the teacher's, `_ema`) get the dict's key as prefix.

    Raises:
        PickleError: If the dicts are too large or nested too deeply.
        ValueError: If they hold anything but weights.
    """
    _check_depth(depth, budget.what)
    for key, value in state.items():
        budget.spend()
        name = f"{prefix}{key}" if type(key) in (str, int) else ""
        if not 0 < len(name) <= MAX_NAME_LENGTH:
            raise PickleError(f"a weight has a name of {len(name)} characters")
        if isinstance(value, dict):
            yield from _views(value, budget, f"{name}.", depth + 1)
        elif isinstance(value, TensorView):
            yield name, value
        else:
            raise ValueError(f"it holds {name}, a {type(value).__name__}, among the weights")


def _check_depth(depth: int, what: str) -> None:
    if depth > MAX_DEPTH:
        raise PickleError(f"{what} are nested more than {MAX_DEPTH} deep, or hold themselves")

"""Sources on the Hugging Face Hub, and results to it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub

from . import ConversionError

# Never a repository's own code.
DESCRIPTIONS = ("config.json", "preprocessor_config.json", "README.md")
# Of a repository that keeps its weights in several formats, the first is downloaded.
WEIGHT_FORMATS = ((".safetensors", ".safetensors.index.json"), (".bin", ".bin.index.json"), (".pt", ".pth"))


def fetch(source: str, revision: str | None = None) -> tuple[Path, str]:
    """Where SOURCE lies on this machine, downloaded if it is OWNER/NAME and no path, and what to call it.

    Raises:
        ConversionError: If the repository cannot be read or has no weights.
    """
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        if revision is not None:
            raise ConversionError(f"--revision goes with a repository on the Hub; {source} is a path.")
        return path, path.name
    api = huggingface_hub.HfApi()
    with _explaining(f"{source} is no path here and cannot be had from the Hub"):
        info = api.model_info(source, revision=revision)
        files = [file.rfilename for file in info.siblings if "/" not in file.rfilename]
        weights = next((found for suffixes in WEIGHT_FORMATS if (found := _ending(files, suffixes))), [])
        folder = api.snapshot_download(source, revision=info.sha, allow_patterns=[*DESCRIPTIONS, *weights])
    return Path(folder), f"{source} (revision {info.sha})"


def push(folder: Path, name: str, private: bool) -> str:
    """Uploads a converted folder as the model repository `name`, which is made if it is new; returns its address.

    Raises:
        ConversionError: If the Hub does not take it.
    """
    api = huggingface_hub.HfApi()
    with _explaining(f"{folder} is written, but was not uploaded to {name}"):
        address = api.create_repo(name, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=address.repo_id, folder_path=folder, commit_message="Add converted checkpoint")
    return str(address)


def _ending(files: list[str], suffixes: tuple[str, ...]) -> list[str]:
    return [name for name in files if name.endswith(suffixes)]


@contextmanager
def _explaining(failure: str) -> Iterator[None]:
    try:
        yield
    # Not by type: with its version huggingface_hub lets through the errors of one HTTP library or another.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConversionError(f"{failure}: {reason}") from error

"""Download of sources from the Hugging Face Hub, and upload of results."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub

from . import ConversionError
from .avex import LABEL_MAP

# The files downloaded beside the weights. A repository's own code is never among them.
DESCRIPTIONS = ("config.json", "preprocessor_config.json", "README.md", LABEL_MAP)
# If a repository has its weights in several formats, only the first is downloaded.
WEIGHT_FORMATS = ((".safetensors", ".safetensors.index.json"), (".bin", ".bin.index.json"), (".pt", ".pth"))


def fetch(source: str, revision: str | None = None) -> tuple[Path, str]:
    """Return the local path of SOURCE and its title, after a download if SOURCE is a Hub repository.

    Args:
        source: A path, or OWNER/NAME of a repository. A path that exists takes precedence.
        revision: The repository's branch, tag or commit.

    Raises:
        ConversionError: If the repository cannot be read, or a path has a revision.
    """
    path = Path(source)
    if path.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        if revision is not None:
            raise ConversionError(f"--revision needs a repository on the Hub, but {source} is a path; leave it out.")
        return path, path.name
    api = huggingface_hub.HfApi()
    with _explaining(f"{source} is not a local path and cannot be downloaded from the Hub"):
        info = api.model_info(source, revision=revision)
        files = [file.rfilename for file in info.siblings or [] if "/" not in file.rfilename]
        weights = next((found for suffixes in WEIGHT_FORMATS if (found := _ending(files, suffixes))), [])
        folder = api.snapshot_download(source, revision=info.sha, allow_patterns=[*DESCRIPTIONS, *weights])
    return Path(folder), f"{source} (revision {info.sha})"


def push(folder: Path, name: str, private: bool) -> str:
    """Upload a converted folder to the model repository `name` and return the repository's address.

    Args:
        folder: The converted folder.
        name: OWNER/NAME. The repository is created if it does not exist.
        private: Whether a new repository is private.

    Raises:
        ConversionError: If the Hub refuses the upload.
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
    """Turn the Hub client's errors into a ConversionError that begins with `failure`."""
    try:
        yield
    # Catch any type: huggingface_hub raises errors of requests or of httpx, depending on its version.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConversionError(f"{failure}: {reason}") from error

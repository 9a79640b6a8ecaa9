"""The documentation's Python runs, its commands parse, the files that it names exist, and the README is short."""

import argparse
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

import training.arguments
from conversion.convert import convert

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PAGES = [
    name
    for pattern in ("*.md", "docs/*.md", "conversion/README.md", "training/README.md", "benchmarks/README.md")
    for name in sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))
]
MAX_README_LINES = 150

FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE_CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
# Folders that the repository has; a path in backticks that starts with one of them must exist.
FOLDERS = ("modeling_sslam", "conversion", "training", "benchmarks", "examples", "tests", "docs", ".github", ".ci")
REPOSITORY_FILE = re.compile(rf"(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*|[A-Z]+\.(?:md|cff)|\w+\.toml")
# Stands for a name that the reader chooses.
PLACEHOLDER = "NAME"
TREE_LINE = re.compile(r"(?P<indent> *)(?P<names>\S+(?: \S+)*)(?: {2,}.*)?")

# Shell programs that pages use beside those of this repository.
OTHER_PROGRAMS = {"apt-get", "cd", "cp", "find", "git", "hf", "ls", "mkdir", "pip", "pre-commit"}


class Parsed(BaseException):
    """The argument parser accepted a command. Not an Exception, so that no program handles it."""


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """Text of a page without its fenced blocks."""
    return FENCED.sub("", read(page))


def blocks(page: str, *languages: str) -> list[str]:
    return [block for language, block in FENCED.findall(read(page)) if language in languages]


def shell_commands(page: str) -> Iterator[list[str]]:
    """The words of each command in fenced shell blocks, and in backticks where a program has arguments."""
    for block in blocks(page, "bash", "sh", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s\|\s|&&", line.removeprefix("$ ")):
                if words := shlex.split(part, comments=True):
                    yield words
    for code in INLINE_CODE.findall(prose(page)):
        program = re.match(r"(?:sslam|python -m|accelerate launch|make) ", code)
        if program and "..." not in code and (words := shlex.split(code, comments=True)):
            # `sslam tag` and `python -m training.report` without arguments name a program and are not commands.
            named = {"sslam": 2, "make": 1, "accelerate": 4}.get(words[0], 3)
            if len(words) > named and PLACEHOLDER not in words:
                yield words


# ---------------------------------------------------------------------------------------------------------- the README


def test_readme_is_short():
    assert len(read("README.md").splitlines()) <= MAX_README_LINES


def test_readme_shows_code_on_its_first_screen():
    before = read("README.md").partition("```python")[0]
    assert len(before.splitlines()) <= 40


# ------------------------------------------------------------------------------------------------------------- Python

# Held-out clips that the quickstart leaves beside its models.
QUICKSTART_RECORDINGS = {
    name for page in PAGES for name in re.findall(r"outputs/quickstart/([\w-]+\.flac)", read(page))
}


@pytest.fixture(scope="session")
def clone(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like a clone after `make quickstart` and the README's conversions, with tiny models."""
    folder = tmp_path_factory.mktemp("clone")
    quickstart = folder / "outputs" / "quickstart"
    for source, out in {
        "sslam_finetuned.pt": quickstart / "classifier" / "model",
        "sslam_pretrained.pt": quickstart / "stage2" / "model",
    }.items():
        convert(golden_dir / source, out, report=lambda line: None)
    shutil.copytree(quickstart / "classifier" / "model", folder / "sslam-as2m")
    shutil.copytree(quickstart / "stage2" / "model", folder / "sslam-base")
    for name in QUICKSTART_RECORDINGS:
        shutil.copy(ROOT / "tests" / "fixtures" / "audio" / "misc_crow.flac", quickstart / name)
    # Folders with the names of published repositories take the place of downloads.
    for source, name in {"hub_finetuned": "SSLAM_AS2M_Finetuned", "hub_pretrained": "SSLAM_pretrain"}.items():
        shutil.copytree(golden_dir / source, folder / "ta012" / name)
    shutil.copy(ROOT / "tests" / "fixtures" / "audio" / "misc_crow.flac", folder / "recording.flac")
    for name in ("tests", "examples"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run_as_printed(clone: Path, page: str):
    """Blocks of a page run one after the other as one program."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-"],
        input="\n".join(blocks(page, "python")),
        cwd=clone,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    if page == "README.md":
        assert re.match(r"(?:\d\.\d\d  LABEL_\d+\n){3}0\.0 \d\.\d+ \(32,\)\n", done.stdout), done.stdout


# ----------------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def complaint(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[list[str]], str | None]:
    """A function that returns the error of a program's own argument parser for a command, or None."""
    parse_args, build = argparse.ArgumentParser.parse_args, training.arguments.build

    def parse_and_stop(self: argparse.ArgumentParser, *arguments: object) -> None:
        parse_args(self, *arguments)
        raise Parsed

    def build_and_stop(*arguments: object) -> None:
        build(*arguments)
        raise Parsed

    def check_module(module: str, *arguments: str) -> str | None:
        if module == "pytest":
            missing = [word for word in arguments if "/" in word and not (ROOT / word.partition("::")[0]).exists()]
            return f"no {', '.join(missing)}" if missing else None
        if importlib.util.find_spec(module).submodule_search_locations:
            module += ".__main__"
        with monkeypatch.context() as patch:
            program = importlib.import_module(module)
            patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
            patch.setattr(training.arguments, "build", build_and_stop)
            patch.setattr(sys, "argv", [program.__file__, *arguments])
            try:
                program.main()
            except Parsed:
                return None
            except SystemExit as end:
                printed = capsys.readouterr()
                return None if end.code in (0, None) else f"{end.code}: {printed.err}"
        return "the program ended without parsing its arguments"

    def check(words: list[str]) -> str | None:
        while "=" in words[0] and "/" not in words[0]:  # VARIABLE=value
            words = words[1:]
        program, *arguments = words
        if program == "sslam":
            return check_module("modeling_sslam", *arguments)
        if program == "accelerate" and arguments[0] == "launch":
            launched = parse_args(launch_command_parser(), arguments[1:])
            return check_module(launched.training_script, *launched.training_script_args)
        if program == "make":
            targets = re.findall(r"^([\w-]+):", read("Makefile"), flags=re.MULTILINE)
            return next((f"no target {word}" for word in arguments if word not in targets), None)
        if Path(program).name in ("python", "python3") and arguments[0] == "-m":
            return check_module(*arguments[1:])
        if Path(program).name in ("python", "sh", "bash"):
            return None if (ROOT / arguments[0]).exists() else f"no file {arguments[0]}"
        if program == "pip":
            wanted = {extra for word in arguments for extra in re.findall(r"\[([\w,-]+)\]", word)}
            known = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
            unknown = {name for extras in wanted for name in extras.split(",")} - set(known)
            return f"no extra {', '.join(sorted(unknown))}" if unknown else None
        return None if program in OTHER_PROGRAMS or program.startswith(".venv/bin/") else f"unknown program {program}"

    monkeypatch.chdir(ROOT)
    return check


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(shell_commands(page))])
def test_commands_are_accepted_by_their_parsers(page: str, complaint: Callable[[list[str]], str | None]):
    refused = {shlex.join(words): found for words in shell_commands(page) if (found := complaint(words))}
    assert not refused, "\n".join(f"{command}\n    {found}" for command, found in refused.items())


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        ("sslam tag crow.flac --model m --top-q 3", "unrecognized arguments: --top-q"),
        ("python -m conversion a b --to tensorflow", "invalid choice: 'tensorflow'"),
        ("accelerate launch -m training.pretrain --config training/configs/pretrain_tiny.yaml --epoch 3", "--epoch"),
        ("python -m training.finetune --config training/configs/none.yaml --model m --data d", "none.yaml"),
        ('pip install ".[sound]"', "no extra sound"),
        ("make tea", "no target tea"),
        ("python examples/none.py", "no file examples/none.py"),
        ("slam tag crow.flac", "unknown program slam"),
    ],
)
def test_wrong_commands_are_found(command: str, reason: str, complaint: Callable[[list[str]], str | None]):
    assert reason in complaint(shlex.split(command))


# -------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str):
    names = {name for name in INLINE_CODE.findall(prose(page)) if REPOSITORY_FILE.fullmatch(name)}
    assert {name for name in names if PLACEHOLDER not in name and not (ROOT / name).exists()} == set()


@pytest.mark.parametrize("page", PAGES)
def test_relative_links_lead_somewhere(page: str):
    broken = []
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+)$", FENCED.sub("", page.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "tree")])
def test_trees_show_what_is_there(page: str):
    """In a block of the language `tree`, two spaces of indentation are one folder level; two spaces end the names."""
    for block in blocks(page, "tree"):
        folders: list[str] = []
        for line in block.splitlines():
            found = TREE_LINE.fullmatch(line)
            depth = len(found["indent"]) // 2
            names = found["names"].split()
            for name in names:
                path = "/".join([*folders[:depth], name.rstrip("/")])
                assert (ROOT / path).exists(), f"{page} shows {path}, which does not exist"
            folders[depth:] = [names[-1].rstrip("/")]

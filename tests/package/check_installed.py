"""Check of an installed wheel: the commands of the README that need no clone, run in a folder of its own.

    python tests/package/check_installed.py WHEEL

Run it with the Python of an environment in which the wheel is installed with the extra `inference`. The clone that
this file lies in is not on the path; its fixtures stand for published checkpoints and recordings.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

CLONE = Path(__file__).resolve().parents[2]
GOLDEN = CLONE / "tests" / "fixtures" / "golden"
MODEL, ENCODER = "ta012/SSLAM_AS2M_Finetuned", "ta012/SSLAM_pretrain"
COMMANDS = (
    "sslam --help",
    "sslam tag --help",
    "sslam timeline --help",
    "sslam embed --help",
    "sslam app --help",
    "sslam convert --help",
    f"sslam tag recording.flac --model {MODEL} --top-k 3",
    f"sslam timeline recording.flac --model {MODEL} --out night.csv",
    f"sslam convert {MODEL} sslam-as2m",
    "sslam tag recording.flac --model sslam-as2m --top-k 3",
    "sslam convert SSLAM_Pretrained.pt sslam-base",
    f"{sys.executable} -m modeling_sslam convert sslam-as2m sslam-as2m.pt --to fairseq",
)
# transformers 4.57 needs an older Hub client than `datasets` does.
EMBED = "sslam embed . --model sslam-base --out embeddings"
IMPORTS = """
import importlib.util, sys
import modeling_sslam
assert not modeling_sslam.__file__.startswith(sys.argv[1]), modeling_sslam.__file__
assert importlib.util.find_spec("modeling_sslam.conversion")
for name in ("conversion", "training", "benchmarks", "examples", "tests"):
    spec = importlib.util.find_spec(name)
    assert spec is None or not (spec.origin or "").startswith(sys.argv[1]), spec
import modeling_sslam.__main__ as program
program.make_parser()
assert "torch" not in sys.modules and "transformers" not in sys.modules, "sslam --help imports torch or transformers"
"""


def check_files(wheel: Path) -> None:
    """Check that a wheel holds the library with its data, and nothing else."""
    names = zipfile.ZipFile(wheel).namelist()
    other = [name for name in names if not re.match(r"modeling_sslam/|modeling_sslam-[\w.]+\.dist-info/", name)]
    if other:
        sys.exit(f"{wheel} holds {', '.join(other)}")
    library = {path.relative_to(CLONE) for path in (CLONE / "modeling_sslam").rglob("*")}
    conversion = {path.relative_to(CLONE) for path in (CLONE / "conversion").rglob("*.py")}
    suffixes = (".py", ".csv", ".css", ".js", ".typed")
    expected = {str(path) for path in library if path.suffix in suffixes or path.name == "py.typed"}
    expected |= {f"modeling_sslam/{path}" for path in conversion}
    found = {name for name in names if ".dist-info/" not in name}
    if expected != found:
        sys.exit(f"{wheel} lacks {sorted(expected - found)} and has {sorted(found - expected)} besides")


def run(words: list[str], folder: Path) -> None:
    """Run a command in a folder, without the clone on the path, and stop if it fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")]),
    }
    print("$", " ".join(words) if len(words) < 12 and "\n" not in " ".join(words) else "python -c ...", flush=True)
    status = subprocess.run(words, cwd=folder, env=environment, stdout=subprocess.DEVNULL).returncode
    if status:
        sys.exit(f"exit status {status}")


def main() -> None:
    """Check the wheel and the installed package."""
    check_files(Path(sys.argv[1]))
    readme = (CLONE / "README.md").read_text(encoding="utf-8")
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if MODEL in block]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(GOLDEN / "hub_finetuned", folder / MODEL)
        shutil.copytree(GOLDEN / "hub_pretrained", folder / ENCODER)
        shutil.copy(GOLDEN / "sslam_pretrained.pt", folder / "SSLAM_Pretrained.pt")
        shutil.copy(CLONE / "tests" / "fixtures" / "audio" / "misc_crow.flac", folder / "recording.flac")
        run([sys.executable, "-c", IMPORTS, str(CLONE)], folder)
        run([sys.executable, "-c", example], folder)
        for command in COMMANDS:
            run(command.split(), folder)
        if subprocess.run([sys.executable, "-c", "import datasets"], stderr=subprocess.DEVNULL).returncode == 0:
            run(EMBED.split(), folder)


if __name__ == "__main__":
    main()

"""The README's Python runs as printed, one block after the other, in a folder like a clone after `make quickstart`."""

import os
import re
import subprocess
import sys
from pathlib import Path

from conversion.convert import convert

ROOT = Path(__file__).parent.parent


def test_python_blocks_run_as_printed(golden_dir: Path, tmp_path: Path):
    convert(golden_dir / "sslam_finetuned.pt", tmp_path / "outputs" / "quickstart" / "classifier" / "model")
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) >= 2
    (tmp_path / "readme.py").write_text("\n".join(blocks))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    outcome = subprocess.run(
        [sys.executable, "readme.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "'label': 'LABEL_11'" in outcome.stdout


def test_files_that_it_names_are_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:modeling_sslam|conversion|training|tests|examples)/[\w./]*)`", text)
    assert len(names) >= 8
    assert [name for name in names if not (ROOT / name).exists()] == []

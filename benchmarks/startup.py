"""Time to the first model: import of the package, and loading of the base size from safetensors.

    python -m benchmarks.startup [--rounds 7]

Imports are timed in new processes that take turns: `import torch, transformers` alone, then with transformers' Auto
classes, with `modeling_sslam`, and with its model. The benchmark also counts the optional packages that these imports
load, if they are installed.

Loading is timed in one process that has imported everything, with the file in the page cache. The rival reads the file
into memory (`Path.read_bytes`). safetensors maps the file rather than reading it, so weights are fetched at their
first use. Both are therefore also timed with a sum over all weights. `safetensors.torch.load_file`, which returns the
mapped weights without a model, is recorded, too.
"""

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
import transformers
from safetensors.torch import load as load_tensors
from safetensors.torch import load_file

from benchmarks.measurement import Measurement, ratio, time_in_turn
from benchmarks.report import Report, Row, base_config, make_parser
from modeling_sslam import SSLAMForAudioClassification, SSLAMModel

FORBIDDEN = ("torchaudio", "datasets", "scipy")
IMPORTS = {
    "torch and transformers": "import torch, transformers",
    "with transformers' Auto classes": "import torch; from transformers import AutoConfig, AutoModel",
    "modeling_sslam": "import torch, modeling_sslam",
    "SSLAMModel": "import torch; from modeling_sslam import SSLAMModel",
}
BY_TRANSFORMERS = "by transformers' own modules"


def import_seconds(statement: str) -> float:
    """Return the seconds that a statement takes in a new process, without the start of the interpreter."""
    script = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return float(subprocess.check_output([sys.executable, "-c", script], text=True))


def forbidden_imports(statement: str) -> list[str]:
    """Return the packages of `FORBIDDEN` that a statement imports in a new process."""
    script = f"{statement}; import json, sys; print(json.dumps([m for m in {FORBIDDEN} if m in sys.modules]))"
    return json.loads(subprocess.check_output([sys.executable, "-c", script], text=True))


def time_imports(rounds: int) -> dict[str, Measurement]:
    seconds: dict[str, list[float]] = {name: [] for name in IMPORTS}
    for index in range(rounds + 1):
        for name, statement in IMPORTS.items():
            value = import_seconds(statement)
            # The first round fills the page cache.
            if index:
                seconds[name].append(value)
    return {name: Measurement.of(values) for name, values in seconds.items()}


def sum_of(tensors: Iterable[torch.Tensor]) -> float:
    return sum(float(tensor.detach().sum()) for tensor in tensors)


def make_loaders(folder: Path) -> dict[str, Callable[[], object]]:
    """Return the contestants. Those "and used" touch every weight."""
    path = folder / "model.safetensors"
    load: Callable[[], torch.nn.Module] = partial(SSLAMForAudioClassification.from_pretrained, folder)
    return {
        "read": path.read_bytes,
        "load_file": partial(load_file, path),
        "classifier": load,
        "encoder": partial(SSLAMModel.from_pretrained, folder),
        "read and used": lambda: sum_of(load_tensors(path.read_bytes()).values()),
        "classifier and used": lambda: sum_of(load().parameters()),
    }


def main(argv: list[str] | None = None) -> None:
    arguments = make_parser("startup", __doc__, rounds=7).parse_args(argv)
    torch.set_num_threads(arguments.threads)
    transformers.logging.disable_progress_bar()
    report = Report("startup", {name: getattr(arguments, name) for name in ("rounds", "threads", "layers")})

    if missing := [name for name in FORBIDDEN if importlib.util.find_spec(name) is None]:
        raise SystemExit(f"{', '.join(missing)} not installed: what is not there cannot be imported needlessly.")
    imported = {name: forbidden_imports(statement) for name, statement in IMPORTS.items()}
    report.record("forbidden imports", imported)
    where = "CPU, optional packages installed"
    names = ", ".join(FORBIDDEN)
    report.add(
        Row("import modeling_sslam", where, f"imported of {names}", len(imported["modeling_sslam"]), at_most=0),
        Row("import SSLAMModel", where, f"imported of {names}", len(imported["SSLAMModel"]), note=BY_TRANSFORMERS),
    )
    seconds = time_imports(arguments.rounds)
    for name, measurement in seconds.items():
        report.record(f"seconds of importing: {name}", measurement)
    for name in ("with transformers' Auto classes", "modeling_sslam", "SSLAMModel"):
        value = ratio(seconds[name], seconds["torch and transformers"])
        report.add(Row(f"import {name}", "CPU", "of importing torch and transformers", value))

    with tempfile.TemporaryDirectory() as folder:
        SSLAMForAudioClassification(base_config(arguments.layers)).save_pretrained(folder)
        report.record("bytes of the file", (Path(folder) / "model.safetensors").stat().st_size)
        seconds = time_in_turn(make_loaders(Path(folder)), arguments.rounds, torch.device("cpu"))
    for name, measurement in seconds.items():
        report.record(f"seconds of loading: {name}", measurement)
    where = f"CPU, {arguments.threads} threads"
    report.add(
        *(
            Row(f"load {name}", where, "of reading the file", ratio(seconds[name], seconds["read"]), at_most=1.2)
            for name in ("classifier", "encoder")
        ),
        Row(
            "load classifier and sum all weights",
            where,
            "of reading the file and summing all weights",
            ratio(seconds["classifier and used"], seconds["read and used"]),
            note="the file is mapped: loading alone leaves the weights to be fetched",
        ),
    )
    report.write(arguments.out)


if __name__ == "__main__":
    main()

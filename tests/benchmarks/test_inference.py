"""The benchmarks of inference and of scaling, with a model of one block."""

import json

import pytest

from benchmarks import inference, scaling

pytestmark = pytest.mark.slow


def test_inference(tmp_path):
    out = tmp_path / "inference.json"
    inference.main(["--rounds", "1", "--layers", "1", "--batch-size", "1", "--threads", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    rows = {(row["what"], row["figure"]): row for row in report["rows"]}
    ours = rows["inference base, fp32, batch 1, optimised, float32", "of the GEMM limit"]
    assert ours["value"]["median"] > 0
    assert ours["at_least"] == 0.85
    assert rows["inference base, int8, batch 1", "cosine of embeddings"]["value"] > 0.998
    seconds = report["measurements"]["seconds, as loaded"]
    assert len(seconds["repeats"]) == 1
    assert report["settings"]["layers"] == 1
    assert report["machine"]["cores"] >= 1
    assert report["versions"]["torch"].startswith("2.")


def test_scaling(tmp_path):
    out, picture = tmp_path / "scaling.json", tmp_path / "pictures" / "scaling.png"
    sizes = ["--batch-sizes", "1", "--lengths", "96", "--clones", "1"]
    options = ["--rounds", "1", "--layers", "1", "--threads", "1", "--out", str(out), "--picture", str(picture)]
    scaling.main([*sizes, *options])
    curves = json.loads(out.read_text())["measurements"]
    assert list(curves) == ["clips of 10 s at a time", "seconds of one clip", "clones, step of 2 clips"]
    assert set(curves["seconds of one clip"]) == {"SSLAM", "AST"}
    point = curves["clones, step of 2 clips"]["SSLAM, stage 2"]["1"]
    # Weights of one block, gradients and moments alone are more than a tenth of a gigabyte.
    assert point["clips/s"] > 0
    assert point["GiB"] > 0.1
    assert picture.read_bytes().startswith(b"\x89PNG")

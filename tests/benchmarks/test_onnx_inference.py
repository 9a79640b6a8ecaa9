"""The program runs on a small model and writes its results; speed is not checked."""

import json

import pytest

from benchmarks.onnx_inference import main

pytestmark = pytest.mark.slow


def test_program_writes_its_rows(tmp_path, capsys):
    out = tmp_path / "onnx.json"
    sizes = ["--layers", "1", "--batch-size", "2", "--frames", "32", "--rounds", "2", "--threads", "1"]
    main([*sizes, "--out", str(out)])
    written = json.loads(out.read_text())
    assert written["settings"] == {"layers": 1, "batch_size": 2, "frames": 32, "threads": 1, "rounds": 2}
    assert {"torch", "onnx", "onnxruntime"} <= written["versions"].keys()
    *parities, speed, masked = written["rows"]
    assert [row["what"] for row in parities] == ["ONNX encoder in onnxruntime", "ONNX classifier in onnxruntime"]
    assert all(0 < row["value"] <= row["at_most"] == 1e-4 and row["reached"] for row in parities)
    assert speed["at_least"] == 1.0
    assert masked["reached"] is None
    assert all(len(row["value"]["repeats"]) == 2 and row["value"]["median"] > 0 for row in (speed, masked))
    assert set(written["measurements"]) == {
        f"clips per second: {name}" for name in ("torch", "onnxruntime", "onnxruntime, masked")
    }
    assert str(out) in capsys.readouterr().out

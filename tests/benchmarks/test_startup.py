import json

import pytest

from benchmarks import startup

pytestmark = pytest.mark.slow


def test_report(tmp_path, monkeypatch):
    monkeypatch.setattr(startup, "import_seconds", lambda statement: float(len(statement)))
    out = tmp_path / "startup.json"
    startup.main(["--rounds", "2", "--threads", "1", "--layers", "1", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["program"] == "startup"
    rows = {(row["what"], row["figure"]): row for row in report["rows"]}
    assert rows["load classifier", "of reading the file"]["at_most"] == 1.2
    assert rows["import SSLAMModel", "of importing torch and transformers"]["value"]["median"] > 1
    # 7 million weights of one block, 28 MB.
    assert 25e6 < report["measurements"]["bytes of the file"] < 35e6
    assert len(report["measurements"]["seconds of loading: encoder"]["repeats"]) == 2


def test_forbidden_imports_are_found():
    assert startup.forbidden_imports("import scipy") == ["scipy"]
    assert startup.forbidden_imports("import json") == []


def test_an_import_takes_time():
    assert startup.import_seconds("import json") > 0

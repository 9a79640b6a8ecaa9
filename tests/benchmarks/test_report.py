"""Measurement in turn, peak memory, and the results as JSON and Markdown."""

import json
from functools import partial

import pytest
import torch

from benchmarks import __main__ as all_benchmarks
from benchmarks.measurement import (
    CallTime,
    Measurement,
    peak_memory,
    print_ratios,
    ratio,
    scaled,
    time_call,
    time_in_turn,
)
from benchmarks.report import Report, Row, table_of

pytestmark = pytest.mark.slow

MIB = 2**20


def test_contestants_take_turns():
    calls = []
    contestants = {name: partial(calls.append, name) for name in "ab"}
    seconds = time_in_turn(contestants, rounds=2, device=torch.device("cpu"))
    assert calls == ["a", "b"] * 3  # the first round does not count
    assert [len(measurement.repeats) for measurement in seconds.values()] == [2, 2]


def test_ratios_are_of_the_same_round():
    found = ratio(Measurement.of([2.0, 30.0, 6.0]), Measurement.of([1.0, 10.0, 2.0]))
    assert found.repeats == [2.0, 3.0, 3.0]
    assert (found.lower, found.median, found.upper) == (2.5, 3.0, 3.0)
    assert scaled(found, lambda value: 6 / value).repeats == [3.0, 2.0, 2.0]


def test_ratios_of_calls(capsys):
    assert time_call(partial(sum, range(10_000))).wall > 0
    print_ratios("embed", [CallTime(1, 2), CallTime(2, 3), CallTime(9, 9)], [CallTime(4, 4)] * 3)
    assert capsys.readouterr().out == (
        "wall-clock time: embed at 0.500 of the bare model\nprocessor time: embed at 0.750 of the bare model\n"
    )


def _hold(held: int, passing: int):
    kept = torch.ones(held, dtype=torch.uint8)

    def run() -> None:
        kept.add_(torch.ones(passing, dtype=torch.uint8)[: len(kept)])

    return run


def test_peak_memory_is_of_the_run():
    peak = peak_memory(partial(_hold, 40 * MIB, 200 * MIB))
    assert 195 * MIB < peak.of_run < 260 * MIB
    assert 235 * MIB < peak.in_all < 320 * MIB


def _fail():
    raise ValueError("there is nothing to run")


def test_error_of_a_failing_process_is_reported(capfd):
    with pytest.raises(RuntimeError, match="ended with exit code 1"):
        peak_memory(_fail)
    assert "there is nothing to run" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("value", "bounds", "reached"),
    [
        (2.0, {"at_least": 2.0}, True),
        (Measurement.of([1.0, 1.5, 9.0]), {"at_least": 2.0}, False),
        (0.8, {"at_most": 0.7}, False),
        (None, {"at_least": 2.0}, None),
        (2.0, {}, None),
    ],
)
def test_reached_targets(value, bounds, reached):
    assert Row("what", "where", "figure", value, **bounds).is_reached is reached


def test_results_as_json_and_as_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(all_benchmarks, "OUTPUT_DIR", tmp_path)
    report = Report("inference", {"rounds": 2})
    report.add(
        Row("speed", "CPU", "times the rival's", Measurement.of([2.0, 4.0]), at_least=2.5),
        Row("speed", "GPU", "times the rival's", None, at_least=2.5),
    )
    report.record("seconds", Measurement.of([0.5, 0.5]))
    report.write(tmp_path / "inference.json")
    rows = json.loads((tmp_path / "inference.json").read_text())["rows"]
    assert rows[0]["value"] == {"median": 3.0, "lower": 2.5, "upper": 3.5, "repeats": [2.0, 4.0]}
    lines = table_of(rows).splitlines()
    assert "3 (2.5 to 3.5)" in lines[2]
    assert "not measured" in lines[3]
    assert len({len(line) for line in lines}) == 1
    assert lines[2] in capsys.readouterr().out

    def run(command, check):
        return type("Outcome", (), {"returncode": int(command[2] == "benchmarks.data")})()

    monkeypatch.setattr(all_benchmarks.subprocess, "run", run)
    page = tmp_path / "pages" / "RESULTS.md"
    assert all_benchmarks.main(["startup", "--results", str(page)]) == 0
    assert all_benchmarks.main(["--results", str(page)]) == 1
    assert "Failed: data" in capsys.readouterr().err
    assert lines[2] in page.read_text()
    assert "seconds: 0.5 (0.5 to 0.5, 2 rounds)" in page.read_text()
    with pytest.raises(SystemExit):
        all_benchmarks.main(["speed"])

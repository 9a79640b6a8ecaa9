"""All rows for GPUs run on the CPU at a tiny size; a run that is cut short keeps what it has measured."""

import gzip
import json
import time

import pytest
import torch

from benchmarks import __main__ as all_benchmarks
from benchmarks.gpu.__main__ import main
from benchmarks.gpu.bench import TRIAL_SIZES, Bench, Figure, Sizes, Stage, run_stages
from benchmarks.gpu.budget import Budget, OutOfTimeError
from benchmarks.gpu.stages import planned_rows, stages
from benchmarks.gpu.trace import covered, trace
from benchmarks.measurement import process_age, read_peak, reset_peak, time_in_turn
from benchmarks.report import Report, Row

CPU = torch.device("cpu")
TRIAL = ["--device", "cpu", "--layers", "1", "--rounds", "1", "--threads", "1"]


@pytest.fixture
def _no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def bench(tmp_path):
    return Bench(CPU, TRIAL_SIZES, Report("gpu", {}), tmp_path / "gpu.json", tmp_path)


@pytest.mark.usefixtures("_no_gpu")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert all_benchmarks.main(["gpu", "--out", str(tmp_path / "gpu.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("no GPU")
    assert "--device cpu --layers 2" in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_all_rows_at_a_tiny_size(tmp_path, capsys):
    path = tmp_path / "results" / "gpu.json"
    with torch.compiler.set_stance("force_eager"):  # generating code takes minutes; the next test compiles
        assert main([*TRIAL, "--minutes", "60", "--out", str(path)]) == 0
    report = json.loads(path.read_text())
    planned = [row for stage in stages(TRIAL_SIZES, "CPU, trial run") for row in stage.rows.values()]
    assert {(row["what"], row["figure"]) for row in report["rows"]} == {(row.what, row.figure) for row in planned}
    assert all(row["value"] is not None for row in report["rows"])

    header, *lines = map(json.loads, path.with_suffix(".jsonl").read_text().splitlines())
    assert header["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert [line["what"] for line in lines] == [row["what"] for row in report["rows"]]
    assert lines[0]["seconds"] <= lines[-1]["seconds"]
    rows = {(row["what"], row["figure"]): row for row in report["rows"]}

    # A share of the limit is the products' time at the measured rate over the row's time.
    step = "pre-training step base, stage 2, B 2, C 1, bf16, eager, memory small"
    (milliseconds,) = rows[step, "ms"]["value"]["repeats"]
    (share,) = rows[step, "of the limit by large products"]["value"]["repeats"]
    at_the_limit = float(rows[step, "of the limit by large products"]["note"].split("; ")[1].split(" ms")[0])
    assert share == pytest.approx(at_the_limit / milliseconds, rel=0.01)

    compiled = "pre-training step base, stage 2, B 2, C 1, bf16, compiled, memory fast"
    fed = rows[f"{compiled}, from FLAC shards, 1 workers", "loader's clips/s, times the step's"]
    assert f"feeds that step without waiting: {'yes' if fed['reached'] else 'no'}" in fed["note"]
    assert 0 <= rows[compiled, "idle share of the device"]["value"] <= 1
    printed = capsys.readouterr().out
    page = path.with_suffix(".md").read_text()
    assert page.startswith("## gpu\n")
    assert f"| {compiled} " in page
    for name in ("inference", "stage_1_step", "stage_2_step"):
        text = (path.parent / f"gpu_{name}_kernels.txt").read_text()
        assert text in printed
        assert len(text.splitlines()) > 5
        with gzip.open(path.parent / f"gpu_{name}_trace.json.gz") as file:
            assert json.load(file)["traceEvents"]


@pytest.mark.slow
def test_no_time_no_rows(tmp_path):
    path = tmp_path / "gpu.json"
    assert main([*TRIAL, "--minutes", "0", "--out", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert {row["if_missing"] for row in rows} == {"not measured: out of time"}
    assert all(row["value"] is None for row in rows)


def rows(*names):
    return {name: Row(name, "CPU", "s", None) for name in names}


def written(bench):
    return {row["what"]: row for row in json.loads(bench.path.read_text())["rows"]}


def test_a_stage_that_fails_does_not_stop_the_others(bench, capsys):
    def fail(bench):
        yield Figure("before", 2.0, "note")
        raise ValueError("there is nothing to measure")

    def exhaust(bench):
        raise torch.OutOfMemoryError
        yield

    def depend(bench):
        yield from bench.share_of_limit("share", 1, None)

    planned = [
        Stage("failing", rows("before", "after"), fail),
        Stage("large", rows("large"), exhaust),
        Stage("dependent", rows("share"), depend),
    ]
    assert run_stages(bench, planned, Budget(10_000)) == ["failing"]
    assert "there is nothing to measure" in capsys.readouterr().err
    found = written(bench)
    assert (found["before"]["value"], found["before"]["note"]) == (2.0, "note")
    assert {name: row["if_missing"] for name, row in found.items() if name != "before"} == {
        "after": "not measured: ValueError",
        "large": "not measured: out of memory",
        "share": "not measured: it needs a figure that is missing",
    }


def test_a_run_that_is_cut_short_keeps_its_rows(bench):
    budget = Budget(10_000)

    def wait(bench):
        budget.end = time.monotonic() + 0.5
        yield Figure("quick", 1.0)
        while True:
            time.sleep(0.01)

    planned = [Stage("slow", rows("quick", "slow"), wait), Stage("late", rows("late"), wait)]
    assert run_stages(bench, planned, budget) == []
    found = written(bench)
    assert found["quick"]["value"] == 1.0
    assert {found[name]["if_missing"] for name in ("slow", "late")} == {"not measured: out of time"}


def test_a_budget_interrupts():
    budget = Budget(10_000)
    budget.end = time.monotonic() + 0.1
    with pytest.raises(OutOfTimeError), budget.limit():
        time.sleep(60)


def test_a_budget_that_is_used_up_refuses_at_once():
    with pytest.raises(OutOfTimeError), Budget(process_age() / 60 - 1).limit():
        raise AssertionError("the body ran")


def test_rows_are_distinct_and_on_the_page():
    rows = planned_rows()
    assert len({(row.what, row.figure) for row in rows}) == len(rows)
    page = all_benchmarks.page_of([])
    assert page.count("not measured at this state") == len(rows)
    assert Sizes().clones == {"sslam": 8, "ua": 16}


def test_overlapping_kernels_count_once():
    assert covered([(0.0, 2.0), (1.0, 3.0), (5.0, 6.0), (5.5, 5.7)]) == 4.0


def test_a_trace_names_the_kernels(tmp_path):
    left, right = torch.randn(2, 64, 64)
    found = trace(lambda: torch.mm(left, right), 3, CPU, tmp_path / "trace.json.gz")
    assert next(iter(found.shares())) == "aten::mm"
    assert sum(found.shares().values()) == pytest.approx(1)
    assert 0 < found.busy_seconds <= found.seconds
    assert 0 <= found.idle_share < 1
    assert (tmp_path / "trace.json.gz").exists()


def test_a_turn_repeats_short_calls():
    calls = []
    seconds = time_in_turn({"a": lambda: calls.append(time.sleep(0.01))}, 2, CPU, turn_seconds=0.1)
    # One call in the warm-up round, then as many as a turn has time for by that call.
    assert 2 < len(calls) <= 1 + 2 * 10
    assert all(value >= 0.01 for value in seconds["a"].repeats)


def test_peak_memory_within_a_process():
    before = reset_peak(CPU)
    torch.ones(64 << 20, dtype=torch.uint8).sum()
    assert read_peak(CPU) - before > 32 << 20

"""The program runs at a small size, and its table and JSON are consistent."""

import json
import sys

import pytest
import torch

from benchmarks import pretraining_step
from benchmarks.gemm import matrix_products, total_flops
from benchmarks.pretraining_step import Setting, cost_of_step, make_plain_step, make_step, measure, products_of_step
from benchmarks.report import Report, base_config
from training.pretrain import compile_blocks

pytestmark = pytest.mark.slow

TINY = ["--layers", "1", "--batch", "2", "--clones", "1", "--frames", "64", "--rounds", "2", "--threads", "1"]


def test_program_writes_its_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["pretraining_step", *TINY, "--out", str(path)])
    pretraining_step.main()
    written = json.loads(path.read_text())

    on_cpu, on_gpu = written["rows"][:3], written["rows"][3:]
    assert [row["figure"] for row in on_cpu] == [
        "of the GEMM limit",
        "times the plain speed",
        "of the plain peak memory",
    ]
    assert all(len(row["value"]["repeats"]) == 2 for row in on_cpu[:2])
    assert on_cpu[2]["value"] > 0
    assert [(row["value"], row["reached"]) for row in on_gpu] == [(None, None)] * 3

    # The row's ratio is that of the two measured times.
    measured = written["measurements"]
    limit, ours = (measured[f"cpu: seconds, {name}"]["repeats"] for name in ("limit", "ours"))
    assert on_cpu[0]["value"]["repeats"] == [first / second for first, second in zip(limit, ours, strict=True)]
    assert written["settings"]["frames"] == 64


def test_cost_is_seconds_and_bytes():
    small, large = (cost_of_step(Setting(2, clones, 64, layers=1), rounds=1) for clones in (1, 8))
    for seconds, peak in (small, large):
        assert seconds.median > 0
        assert peak.in_all > peak.of_run
    # Weights, gradients and Adam's moments are the same in both. Only the clones add memory.
    assert large[1].in_all > small[1].in_all


def test_the_limit_counts_each_product_once():
    setting = Setting(2, 2, 64, layers=1)
    ours, with_repeats, plain = (
        total_flops(products)
        for products in (
            products_of_step(setting),
            matrix_products(make_step(setting)),
            matrix_products(make_plain_step(setting)),
        )
    )
    config = base_config(setting.layers)
    width, patches, visible = config.hidden_size, 4 * 8, 6
    grids = 2 * setting.batch * setting.clones
    convolution = 2 * grids * patches * 9 * width * width // config.decoder_groups
    assert with_repeats - ours == config.decoder_num_layers * convolution
    # The transcription projects visible places too, forward and backward. It computes no mean deviation of targets.
    projection, deviation = 3 * 2 * grids * visible * width * width, 2 * 2 * 2 * setting.batch * patches * width
    assert plain - ours == projection - deviation


def test_what_runs_on_gpus_runs(monkeypatch):
    """Half precision and compiled blocks, which are for GPUs, run here on the CPU with one block."""
    compiled = []
    monkeypatch.setattr(pretraining_step, "compile_blocks", lambda model: compiled.append(compile_blocks(model)))
    report = Report("pretraining_step", {})
    seconds, peaks = measure(report, Setting(2, 2, 64, layers=1, half_precision=True), rounds=1)
    assert len(compiled) == 1  # the process that measures memory compiles a copy of its own
    assert all(seconds[name].median > 0 for name in ("ours", "plain", "limit"))
    assert all(peak.of_run > 0 for peak in peaks.values())


def test_half_precision_is_what_it_says():
    setting = Setting(2, 2, 64, layers=1, half_precision=True)
    ours, plain = (matrix_products(step) for step in (make_step(setting, compiled=False), make_plain_step(setting)))
    assert {product.dtype for product in ours} == {torch.bfloat16}
    assert {product.dtype for product in plain} == {torch.float16}

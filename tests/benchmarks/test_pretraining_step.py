"""The program runs at a small size, and its table and JSON are consistent."""

import json
import sys

import pytest
import torch

from benchmarks import pretraining_step
from benchmarks.gemm import matrix_products, total_flops
from benchmarks.plain import PlainPreTraining
from benchmarks.pretraining_step import (
    Setting,
    cost_of_step,
    make_plain_step,
    make_step,
    on_device,
    products_of_step,
)
from benchmarks.report import base_config
from modeling_sslam import SSLAMForPreTraining
from training.pretrain import compile_blocks

pytestmark = pytest.mark.slow

TINY = ["--layers", "1", "--batch", "2", "--clones", "1", "--frames", "64", "--rounds", "2", "--threads", "1"]


def test_program_writes_its_rows(tmp_path, monkeypatch):
    path = tmp_path / "step.json"
    monkeypatch.setattr(sys, "argv", ["pretraining_step", *TINY, "--out", str(path)])
    pretraining_step.main()
    written = json.loads(path.read_text())

    rows = written["rows"]
    assert [row["figure"] for row in rows] == [
        "of the GEMM limit",
        "times the plain speed",
        "of the plain peak memory",
    ]
    assert all(len(row["value"]["repeats"]) == 2 for row in rows[:2])
    assert rows[2]["value"] > 0

    # The row's ratio is that of the two measured times.
    measured = written["measurements"]
    limit, ours = (measured[f"cpu: seconds, {name}"]["repeats"] for name in ("limit", "ours"))
    assert rows[0]["value"]["repeats"] == [first / second for first, second in zip(limit, ours, strict=True)]
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


@pytest.mark.parametrize("make", [SSLAMForPreTraining, PlainPreTraining])
def test_a_model_is_on_its_device_as_a_whole(make):
    model = on_device(Setting(2, 2, 64, layers=1, device="meta"), make)
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


def test_a_step_of_compiled_blocks():
    make_step(Setting(2, 2, 64, layers=1, half_precision=True), prepare=compile_blocks)()


def test_half_precision_is_what_it_says():
    setting = Setting(2, 2, 64, layers=1, half_precision=True)
    ours, plain = (matrix_products(make(setting)) for make in (make_step, make_plain_step))
    assert {product.dtype for product in ours} == {torch.bfloat16}
    assert {product.dtype for product in plain} == {torch.float16}

"""The measurement behind the choice of the filter bank's form on devices."""

from benchmarks.filter_bank_forms import errors

LIMIT = 2e-4


def test_the_chosen_form_keeps_the_limit_and_low_precision_does_not():
    table = errors()
    for signal, row in table.items():
        assert row["FFT"] <= max(LIMIT, 2 * row["on CPUs, as published"]), signal
    for form in ("product, bf16x3", "product, TF32"):
        assert max(row[form] for row in table.values()) > 10 * LIMIT
    assert table["tone 90 dB above noise"]["product, TF32"] > 0.1

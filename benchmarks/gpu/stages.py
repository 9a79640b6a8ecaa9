"""The stages of a run in their order: fast ones first, and of those that compile the most important first."""

from benchmarks.gpu import inference, loading, step
from benchmarks.gpu.bench import Sizes, Stage
from benchmarks.report import Row


def stages(sizes: Sizes, where: str) -> list[Stage]:
    """Return the stages, with rows for the device of the name `where`."""
    return [
        inference.products_stage(sizes, where),
        inference.filter_bank_stage(sizes, where),
        loading.model_stage(sizes, where),
        inference.eager_stage(sizes, where),
        step.eager_stage(sizes, where, "sslam"),
        step.eager_stage(sizes, where, "ua"),
        loading.data_stage(sizes, where),
        step.fast_stage(sizes, where, "sslam"),
        inference.compiled_stage(sizes, where),
        step.fast_stage(sizes, where, "ua"),
        step.other_stage(sizes, where, "sslam", step.GRAPHS),
        step.other_stage(sizes, where, "sslam", step.SMALL),
        step.other_stage(sizes, where, "ua", step.GRAPHS),
        step.other_stage(sizes, where, "ua", step.SMALL),
    ]


def planned_rows() -> list[Row]:
    """Return all rows of a run without their values."""
    return [row for stage in stages(Sizes(), "GPU") for row in stage.rows.values()]

"""Markdown tables of scores over seeds."""

import statistics
from collections.abc import Sequence


def cell(values: Sequence[float], num_seeds: int) -> str:
    """Return mean and standard deviation in per cent, with the number of values if it is not that of the seeds."""
    if not values:
        return "-"
    text = f"{100 * statistics.mean(values):.1f}"
    if len(values) > 1:
        text += f" ± {100 * statistics.stdev(values):.1f}"
    return text if len(values) == num_seeds else f"{text} (n = {len(values)})"


def line(cells: Sequence[str]) -> str:
    """Return a line of a Markdown table."""
    return f"| {' | '.join(cells)} |"

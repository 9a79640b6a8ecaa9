"""Scores of the finished steps: mAP by encoder, number of sources and seed, and over resamples of the test clips."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from examples.polyphony_study.steps import ENCODERS, FOREST, PROTOCOLS, forest_results_file, results_file

# Stands for all numbers of sources together.
ALL = "all"
RESAMPLES = 1000

# mAP by (protocol, encoder), then by number of sources, then by seed.
Scores = dict[tuple[str, str], dict[str, dict[int, float]]]


def finished_results(out: Path, seeds: Sequence[int]) -> dict[tuple[str, str], dict[int, Path]]:
    """Return the results files that exist, by (protocol, encoder) and seed. The forest's protocol is an empty text."""
    files = {
        (protocol, encoder): {seed: results_file(out, seed, encoder, protocol) for seed in seeds}
        for protocol in PROTOCOLS
        for encoder in ENCODERS
    }
    files["", FOREST] = {seed: forest_results_file(out, seed) for seed in seeds}
    return {row: {seed: path for seed, path in by.items() if path.exists()} for row, by in files.items()}


def read_scores(results: Path, metric: str = "map") -> dict[str, float]:
    """Read a metric of the test clips by number of sources, and of all test clips."""
    found = json.loads(results.read_text(encoding="utf-8"))
    by_sources = {str(row["group"]): row[metric] for row in found["by_group"]}
    return by_sources | {ALL: found["metrics"][metric]}


def gather_scores(files: dict[tuple[str, str], dict[int, Path]]) -> Scores:
    """Read the mAP of all results files of [`finished_results`]."""
    scores: Scores = {}
    for row, by_seed in files.items():
        scores[row] = {}
        for seed, path in by_seed.items():
            for sources, value in read_scores(path).items():
                scores[row].setdefault(sources, {})[seed] = value
    return scores


def average_precisions(scores: np.ndarray, targets: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the average precision of a class for each of R resamples of N clips.

    The result equals that of scikit-learn's `average_precision_score` with the counts as sample weights.

    Args:
        scores: Scores of the class, shape `(N,)`.
        targets: Whether the clips have the class, shape `(N,)`.
        counts: How often each clip is in each resample, shape `(R, N)`.

    Returns:
        Values of shape `(R,)`; NaN where no clip of a resample has the class.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    # Clips with equal scores share the threshold after the last of them.
    last = np.searchsorted(-ordered, -ordered, side="right") - 1
    counts = counts[:, order].astype(np.float64)
    hits = counts * targets[order]
    retrieved, found = counts.cumsum(1)[:, last], hits.cumsum(1)
    total = found[:, -1]
    precision = np.divide(found[:, last], retrieved, out=np.zeros_like(retrieved), where=retrieved > 0)
    return np.divide((hits * precision).sum(1), total, out=np.full(len(counts), np.nan), where=total > 0)


@cache
def resampled_scores(results: Path, sources: str) -> np.ndarray:
    """Return the mAP of an evaluation over resamples of its test clips, drawn with replacement.

    The draws depend only on the number of clips, so two encoders have the same resamples of the same clips.

    Args:
        results: A results file. The predictions are beside it.
        sources: Number of sources of the clips, or `ALL`.

    Returns:
        mAP of shape `(RESAMPLES,)`.
    """
    names = [row["label"] for row in json.loads(results.read_text(encoding="utf-8"))["per_class"]]
    table = pq.read_table(results.with_name("predictions.parquet")).to_pydict()
    rows = [i for i, group in enumerate(table["group"]) if sources in (ALL, str(group))]
    scores = np.array([table["scores"][i] for i in rows], np.float32)
    targets = np.array([[name in table["labels"][i] for name in names] for i in rows])
    counts = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), RESAMPLES)
    columns = [average_precisions(scores[:, k], targets[:, k], counts) for k in range(len(names))]
    present = np.array(columns)[targets.any(0)]
    return np.nanmean(present, axis=0)

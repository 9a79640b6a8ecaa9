"""Table and picture of the polyphony study. The commands that it runs have tests of their own."""

import json

import pytest

from examples import polyphony_study as study


def scores(step: float) -> study.Scores:
    """Return scores of two seeds that grow by `step` for each encoder and a tenth of it for each number of sources."""
    return {
        (protocol, name): {
            n: [step * i + step / 10 * k, step * i + step / 10 * k + 0.02] for k, n in enumerate(study.columns())
        }
        for protocol in study.PROTOCOLS
        for i, name in enumerate((study.STAGE1, *study.OBJECTIVES))
    }


def test_scores_are_read_by_number_of_sources(tmp_path):
    path = tmp_path / "results.json"
    groups = [{"group": n, "map": n / 10, "chance_map": n / 100} for n in range(1, 6)]
    path.write_text(json.dumps({"by_group": groups, "metrics": {"map": 0.9, "chance_map": 0.09}}))
    assert study.read_scores(path) == {"1": 0.1, "2": 0.2, "3": 0.3, "4": 0.4, "5": 0.5, "all": 0.9}
    assert study.read_scores(path, "chance_map")["all"] == 0.09


def test_moments():
    assert study.moments([0.1, 0.3]) == (pytest.approx(0.2), pytest.approx(0.02**0.5))
    assert study.moments([0.4]) == (0.4, 0.0)


def test_table_and_picture(tmp_path):
    chance = dict.fromkeys(study.columns(), 0.05)
    lines = study.table(scores(0.1), chance, 2).splitlines()
    assert "over 2 seeds" in lines[0]
    rows = {tuple(cell.strip() for cell in line.split("|")[1:3]): line for line in lines[4:]}
    assert len(rows) == 1 + 2 * 5
    # The fourth encoder with three sources has 0.3 + 0.02, and 0.02 more with the other seed.
    assert "| 33.0 ± 1.4 |" in rows["linear evaluation", "ua+pma"]
    assert rows["", "random scores"].count("5.0") == 6
    study.plot(scores(0.1), tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000

import json
import sys

import pytest
import torch

from benchmarks import front_end
from modeling_sslam import SSLAMFeatureExtractor

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("seconds", [1.0, 2.5])
def test_rival_computes_the_same(seconds):
    extractor = SSLAMFeatureExtractor()
    clips = front_end.make_clips(3, seconds, extractor.sampling_rate, torch.device("cpu"))
    max_length = front_end.padded_frames(extractor, seconds)
    actual, expected = (run(extractor, clips, max_length) for run in (front_end.ours, front_end.published))
    assert actual.shape == (3, max_length, 128)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_writes_all_figures(tmp_path, monkeypatch):
    out = tmp_path / "front_end.json"
    options = ["--clips", "2", "--seconds", "1", "--rounds", "1", "--lengths", "0.5", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["front_end", *options])
    front_end.main()
    report = json.loads(out.read_text())
    assert report["settings"]["clips"] == 2
    rows = {(row["where"], row["figure"]): row for row in report["rows"]}
    ratio, clips, memory = "x kaldi.fbank clip by clip", "clips/s", "peak memory, x the input"
    for key in [("CPU, 1 thread", ratio), ("CPU, 2 threads", ratio), ("CPU, 2 threads", clips)]:
        assert rows[key]["value"]["median"] > 0
    assert rows["CPU, 2 threads", ratio]["at_least"] == 3
    assert rows["CPU, 2 threads", memory]["value"] > 0
    assert rows["CPU, 2 threads", memory]["at_most"] == 4
    differences = [value for name, value in report["measurements"].items() if "difference" in name]
    assert len(differences) >= 2
    assert max(differences) < 1e-5
    assert any(name.startswith("ms a clip") for name in report["measurements"])

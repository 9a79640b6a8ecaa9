import json

import pytest
import torch

from benchmarks import data
from benchmarks.pretraining_step import make_update
from modeling_sslam import SSLAMFeatureExtractor, SSLAMForPreTraining

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SECONDS", 2.0)
    data.write_clips(tmp_path, 12, num_shards=2)
    return tmp_path


def test_rival_gives_the_same_clips(folder):
    extractor = SSLAMFeatureExtractor(max_length=256)
    (batch,) = data.own_loader(folder, extractor, 0, "worker")
    plain = {clip["ids"]: clip["input_values"] for clip in data.PlainClips(folder, extractor)}
    assert sorted(batch["ids"]) == sorted(plain)
    # The unit is two standard deviations. Quiet mel bins magnify the rounding of both.
    expected = torch.stack([plain[id_] for id_ in batch["ids"]])
    torch.testing.assert_close(batch["input_values"], expected, atol=2e-3, rtol=0)


def test_steps_on_the_loader_and_on_a_ready_batch(folder, make_config):
    extractor = SSLAMFeatureExtractor(max_length=64, num_mel_bins=32)
    model = SSLAMForPreTraining(make_config()).train()
    before = model.sslam.encoder.cls_token.detach().clone()
    teacher = model.teacher.encoder.cls_token.detach().clone()
    loader = data.own_loader(folder, extractor, 0, "worker", endless=True, batch_size=2)
    step = make_update(model, half_precision=False)
    seconds = data.time_steps(step, loader, 0, num_steps=2, rounds=3, device=CPU)
    assert {name: len(measurement.repeats) for name, measurement in seconds.items()} == {"ready batch": 3, "loader": 3}
    assert loader.num_clips == 2 * (1 + 3 * 2)
    assert not torch.equal(model.sslam.encoder.cls_token, before)
    assert not torch.equal(model.teacher.encoder.cls_token, teacher)


def test_pass_refuses_to_miss_a_clip():
    with pytest.raises(RuntimeError, match="gave 3 of 4 clips"):
        data.Pass(lambda: [torch.zeros(2), torch.zeros(1)], 4)()


def test_writes_its_report(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SECONDS", 2.0)
    out = tmp_path / "data.json"
    data.main(["--rounds", "2", "--layers", "1", "--workers", "1", "--clips-per-worker", "3", "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["settings"]["workers"] == 1
    rows = {(row["what"], row["figure"]): row["value"] for row in report["rows"]}
    assert rows["batches, workers", "clips/s per core"]["median"] > 0
    assert rows["decode, by itself", "of the whole"]["median"] > 0
    assert set(report["measurements"]) >= {"seconds of a stage: resample", "bytes of a clip"}

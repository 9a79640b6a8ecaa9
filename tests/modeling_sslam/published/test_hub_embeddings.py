"""`sslam embed` by a published id. It needs a newer Hub client than transformers 4.57 allows."""

import pytest


@pytest.mark.slow
def test_embeddings(sslam, tmp_path, audio_dir):
    sslam("embed", audio_dir, "--model", "ta012/SSLAM_pretrain", "--out", tmp_path / "embeddings")
    assert list((tmp_path / "embeddings").rglob("*.parquet"))

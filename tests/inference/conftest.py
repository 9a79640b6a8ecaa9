from pathlib import Path

import datasets
import pytest

from modeling_sslam.inference.dataset import EncodedAudio


@pytest.fixture
def write_audio_parquet(tmp_path):
    """Sound files as a data set of parquet shards with the columns `id` and `audio`."""

    def write(paths, shards=1, name="dataset"):
        rows = [{"id": Path(p).name, "audio": {"bytes": Path(p).read_bytes(), "path": None}} for p in paths]
        features = datasets.Features({"id": datasets.Value("string"), "audio": EncodedAudio()})
        dataset = datasets.Dataset.from_list(rows, features=features)
        folder = tmp_path / name / "data"
        folder.mkdir(parents=True)
        for index in range(shards):
            shard = dataset.shard(shards, index, contiguous=True)
            shard.to_parquet(str(folder / f"train-{index:05d}-of-{shards:05d}.parquet"))
        return folder.parent

    return write

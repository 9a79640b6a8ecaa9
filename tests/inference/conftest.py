"""A model folder made from the tiny fine-tuned checkpoint, and recordings and data sets of one's choice."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from conversion.convert import convert
from modeling_sslam.inference import SSLAMTagger, stream_blocks


@pytest.fixture(scope="session")
def model_folder(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier of twelve classes, several a clip, on clips of 1024 frames."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    convert(golden_dir / "sslam_finetuned.pt", folder, report=lambda line: None)
    return folder


@pytest.fixture(scope="session")
def tagger(model_folder: Path) -> SSLAMTagger:
    return SSLAMTagger.from_pretrained(model_folder, device="cpu")


@pytest.fixture
def write_sound(tmp_path: Path) -> Callable[..., Path]:
    """Writes noise of so many seconds, or the samples given, as float samples; returns the path."""

    def write(name: str, seconds: float = 1.0, rate: int = 16_000, channels: int = 1, samples=None) -> Path:
        if samples is None:
            generator = np.random.default_rng(0)
            samples = 0.1 * generator.standard_normal((round(seconds * rate), channels)).astype(np.float32)
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, samples, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
        return path

    return write


@pytest.fixture
def recording(audio_dir: Path) -> torch.Tensor:
    """The five recordings one after the other, with a breath between them: 10 s at 16 kHz."""
    parts = [torch.cat(list(stream_blocks(str(path), 16_000))) for path in sorted(audio_dir.glob("*.flac"))]
    return torch.cat([torch.cat((part, torch.zeros(6400))) for part in parts])


@pytest.fixture
def write_audio_parquet(tmp_path):
    """Sound files as a data set of parquet shards with the columns `id` and `audio`."""
    # Not at the top: the other tests also run beside an older transformers, whose hub client is too old for datasets.
    import datasets

    from modeling_sslam.inference.dataset import EncodedAudio

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

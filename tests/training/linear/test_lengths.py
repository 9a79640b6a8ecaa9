"""Lengths of clips against that of the encoder's input."""

import dataclasses

import numpy as np
import pytest
import soundfile

from modeling_sslam import SSLAMFeatureExtractor
from training.data.config import DataConfig
from training.data.sources import open_source
from training.linear.lengths import length_advice, typical_seconds


@pytest.mark.parametrize(
    ("seconds", "advice"), [(5.0, "max_length 496"), (0.5, "max_length 48"), (2.5, None), (60.0, "max_length 1024")]
)
def test_advice_fits_the_clips(make_config, seconds, advice):
    extractor = SSLAMFeatureExtractor(num_mel_bins=32, max_length=256)
    config = make_config(max_length=256, max_position_embeddings=64)
    found = length_advice(seconds, extractor, config)
    assert (found is None) if advice is None else found.endswith(f"{advice} to fit the clips.")


def test_clips_longer_than_the_position_table_are_not_worth_a_warning(make_config):
    """Nothing longer can be read."""
    config = make_config(max_length=256, max_position_embeddings=16)
    assert length_advice(60.0, SSLAMFeatureExtractor(num_mel_bins=32, max_length=256), config) is None


def test_typical_length_of_a_folder(tmp_path):
    for i, seconds in enumerate((0.5, 1.0, 30.0)):
        soundfile.write(tmp_path / f"{i}.wav", np.zeros(round(8000 * seconds)), 8000)
    (tmp_path / "broken.wav").write_bytes(b"no sound")
    source = open_source(DataConfig(str(tmp_path)))
    assert typical_seconds(source) == 1.0
    assert typical_seconds(dataclasses.replace(source, config=DataConfig("a/dataset"))) is None

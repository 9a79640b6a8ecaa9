"""The tables of names are one-to-one and cover every parameter."""

import pytest

from modeling_sslam import SSLAMForAudioClassification, SSLAMForPreTraining
from modeling_sslam.layouts import (
    AVEX,
    CLASSIFIER_NORM_EPS,
    FAIRSEQ_CLASSIFICATION,
    FAIRSEQ_PRETRAINING,
    HUB_EAT,
    LAYOUTS,
    TRANSFORMERS,
    recognise,
    to_ours,
    to_theirs,
)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.title)
def test_names_are_one_to_one(layout):
    pairs = [(part + ours, prefix + theirs) for part, prefix, names in layout.parts for ours, theirs in names]
    assert len({ours for ours, _ in pairs}) == len(pairs) == len({theirs for _, theirs in pairs})


@pytest.mark.parametrize(
    ("layout", "model_class"),
    [
        (FAIRSEQ_PRETRAINING, SSLAMForPreTraining),
        (FAIRSEQ_CLASSIFICATION, SSLAMForAudioClassification),
        (HUB_EAT, SSLAMForAudioClassification),
        (AVEX, SSLAMForAudioClassification),
        (TRANSFORMERS, SSLAMForPreTraining),
        (TRANSFORMERS, SSLAMForAudioClassification),
    ],
)
def test_every_parameter_is_renamed_and_back(layout, model_class, make_config):
    config = make_config(num_hidden_layers=11, classifier_norm_eps=CLASSIFIER_NORM_EPS.get(layout.family, 1e-6))
    ours = list(model_class(config).state_dict())
    theirs = {to_theirs(name, layout): name for name in ours}
    assert len(theirs) == len(ours)
    assert to_ours(theirs, layout) == theirs
    assert recognise(theirs) == (layout, theirs)


@pytest.mark.parametrize(
    "key", ["", ".", "blocks", "blocks.x.norm1.weight", "blocks.0.norm1.gamma", "model.", "0.weight"]
)
def test_unknown_keys_have_no_name(key):
    assert recognise([key])[1] == {key: None}


def test_parameter_without_a_place_is_an_error():
    with pytest.raises(KeyError, match=r"Hub \(EATModel\) has no place for decoder\.projection\.weight"):
        to_theirs("decoder.projection.weight", HUB_EAT)

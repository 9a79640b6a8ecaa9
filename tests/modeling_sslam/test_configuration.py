import copy
import json
import pickle
import warnings

import pytest

from modeling_sslam import SSLAMConfig, SSLAMForAudioClassification, SSLAMModel


def same(config: SSLAMConfig, other: SSLAMConfig) -> bool:
    """Compare all fields that describe the model, but not the version that wrote the configuration."""
    ignored = {"transformers_version", "auto_map"}
    first, second = ({k: v for k, v in c.to_dict().items() if k not in ignored} for c in (config, other))
    return first == second


def test_defaults_are_the_published_base_size():
    config = SSLAMConfig()
    size = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert size == (768, 12, 12, 3072)
    assert (config.patch_size, config.num_mel_bins, config.num_mel_patches, config.max_length) == (16, 128, 8, 1024)
    assert config.layer_norm_eps == config.classifier_norm_eps == 1e-6
    model = SSLAMModel(config)
    assert 85.2e6 < model.num_parameters() < 85.4e6


def test_large_preset():
    config = SSLAMConfig.large()
    size = (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.intermediate_size)
    assert size == (1024, 24, 16, 4096)
    assert (config.mask_prob, config.mask_prob_adjust) == (0.75, 0.1)
    assert (config.decoder_num_layers, config.decoder_kernel_size, config.ema_anneal_end_step) == (3, 5, 150_000)
    assert SSLAMConfig.large(num_labels=7, mask_prob=0.8).num_labels == 7
    assert SSLAMConfig.large(mask_prob=0.8).mask_prob == 0.8


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"hidden_size": 770}, "hidden_size=770 is not divisible by num_attention_heads=12"),
        ({"hidden_size": 6, "num_attention_heads": 3}, "hidden_size=6 is not divisible by 4"),
        ({"hidden_size": 0}, "hidden_size=0 must be a positive integer"),
        ({"num_hidden_layers": 1.5}, "num_hidden_layers=1.5 must be a positive integer"),
        ({"num_mel_bins": 100}, "num_mel_bins=100 is not a multiple of patch_size=16"),
        ({"max_length": 1000}, "max_length=1000 is not a multiple of patch_size=16"),
        ({"max_length": 16 * 769}, "max_length=12304 exceeds the position table"),
        ({"num_labels": 0}, "num_labels=0 must be a positive integer"),
        ({"hidden_act": "geglu"}, "hidden_act='geglu' is not one of .*gelu"),
        ({"hidden_dropout_prob": 1.1}, "hidden_dropout_prob=1.1 must lie between 0 and 1"),
        ({"hidden_dropout_prob": "0.1"}, "hidden_dropout_prob='0.1' must be a number"),
        ({"attention_probs_dropout_prob": -0.1}, "attention_probs_dropout_prob=-0.1 must lie"),
        ({"drop_path_rate": float("nan")}, "drop_path_rate=nan must lie between"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps=0.0 must be positive"),
        ({"classifier_norm_eps": -1e-6}, "classifier_norm_eps=-1e-06 must be positive"),
        ({"initializer_range": -0.02}, "initializer_range=-0.02 must not be negative"),
        ({"classifier_pooling": "max"}, "classifier_pooling='max' is not one of cls, mean, lin_softmax"),
        ({"pretraining_objective": "mae"}, "pretraining_objective='mae' is not one of ua, pma"),
        ({"mask_prob": 1.0}, "mask_prob=1.0 must leave some patches visible"),
        ({"mask_prob_adjust": -0.1}, "mask_prob_adjust=-0.1 must not be negative"),
        ({"mask_block_size": 4}, "mask_block_size=4 must be odd"),
        ({"decoder_kernel_size": 2}, "decoder_kernel_size=2 must be odd"),
        ({"decoder_groups": 5}, "decoder_groups=5 does not divide hidden_size=768"),
        ({"num_target_layers": 13}, "num_target_layers=13 must be None or lie between 1 and num_hidden_layers=12"),
        ({"num_global_target_layers": 0}, "num_global_target_layers=0 must be None or a positive integer"),
        ({"ema_decay": 1.5}, "ema_decay=1.5 must lie between 0 and 1"),
        ({"ema_anneal_end_step": 0}, "ema_anneal_end_step=0 must be a positive integer"),
    ],
)
def test_refuses_wrong_and_contradictory_fields(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        SSLAMConfig(**fields)


def test_names_the_first_contradiction_only_after_every_field_is_right():
    with pytest.raises(ValueError, match="decoder_groups=0 must be a positive integer"):
        SSLAMConfig(hidden_size=770, decoder_groups=0)


def test_refuses_unknown_problem_type():
    with pytest.raises(ValueError, match="problem_type"):
        SSLAMConfig(problem_type="multilabel")


def test_checks_fields_given_to_from_pretrained(tmp_path, make_config):
    SSLAMForAudioClassification(make_config()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="classifier_pooling='avg' is not one of"):
        SSLAMForAudioClassification.from_pretrained(tmp_path, classifier_pooling="avg")
    model = SSLAMForAudioClassification.from_pretrained(tmp_path, classifier_pooling="mean")
    assert model.classifier.pooling == "mean"


def test_round_trip_through_json(tmp_path, make_config):
    config = make_config(num_labels=3, problem_type="multi_label_classification", classifier_pooling="mean")
    config.save_pretrained(tmp_path)
    loaded = SSLAMConfig.from_pretrained(tmp_path)
    assert same(config, loaded)
    assert same(config, SSLAMConfig.from_dict(json.loads(config.to_json_string(use_diff=False))))
    assert loaded.id2label == {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert json.loads((tmp_path / "config.json").read_text())["max_length"] == config.max_length


def test_equality():
    assert SSLAMConfig() == SSLAMConfig()
    assert SSLAMConfig() != SSLAMConfig(num_hidden_layers=11)
    assert same(copy.deepcopy(SSLAMConfig.large()), SSLAMConfig.large())
    assert pickle.loads(pickle.dumps(SSLAMConfig())) == SSLAMConfig()


def test_keeps_unknown_fields(tmp_path):
    SSLAMConfig(dataset_revision="2024-01").save_pretrained(tmp_path)
    assert SSLAMConfig.from_pretrained(tmp_path).dataset_revision == "2024-01"


def test_labels(make_config):
    config = make_config(
        id2label={0: "crow", 1: "cowbell", 2: "choir"}, label2id={"crow": 0, "cowbell": 1, "choir": 2}
    )
    assert config.num_labels == 3
    assert SSLAMForAudioClassification(config).classifier.dense.out_features == 3


def test_max_length_is_not_taken_for_a_generation_parameter(tmp_path, make_config, transformers_log):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_config(max_length=32).save_pretrained(tmp_path)
    assert not transformers_log.records
    assert SSLAMConfig.from_pretrained(tmp_path).max_length == 32

"""Folders in the published layouts, loaded by `from_pretrained` without a conversion."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, pipeline

from conversion.convert import convert
from modeling_sslam import (
    DATASET_PRESETS,
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForPreTraining,
    SSLAMModel,
)
from modeling_sslam.common.labels import audioset_labels
from modeling_sslam.layouts import HUB_EAT, to_ours
from modeling_sslam.published import key_mapping

MODELS = {"hub_pretrained": SSLAMModel, "hub_finetuned": SSLAMForAudioClassification}


@pytest.fixture(scope="module")
def converted(golden_dir, tmp_path_factory) -> dict[str, Path]:
    """Return the folders that the conversion makes of the published ones."""
    folders = {name: tmp_path_factory.mktemp("converted") / name for name in MODELS}
    for name, folder in folders.items():
        convert(golden_dir / name, folder, report=lambda line: None)
    return folders


@pytest.fixture
def copy(golden_dir, tmp_path):
    """Return a function that copies a published folder with changed settings and weights."""

    def make(name: str, weights=lambda tensors: tensors, **settings) -> Path:
        folder = tmp_path / name
        shutil.copytree(golden_dir / name, folder)
        config = json.loads((folder / "config.json").read_text()) | settings
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / "config.json").write_text(json.dumps(kept))
        save_file(weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@torch.no_grad()
def outputs(model, inputs):
    return model(inputs)[0]


class TestWeights:
    @pytest.mark.parametrize("frames", [304, 512, 1024])
    def test_encoder_gives_the_golden_states(self, golden_dir, frames, parity):
        golden = load_file(golden_dir / "encoder.safetensors")
        model = SSLAMModel.from_pretrained(golden_dir / "hub_pretrained")
        states = outputs(model, golden[f"input_{frames}"].float())
        error = (states - golden[f"last_hidden_state_{frames}"]).abs().max()
        parity(f"published encoder, as it is, {frames} frames", error, 1e-5)

    def test_classifier_gives_the_golden_logits(self, golden_dir, parity):
        golden = load_file(golden_dir / "classifier.safetensors")
        # The vectors come from fairseq, whose norm has another epsilon than the code of this layout.
        model = SSLAMForAudioClassification.from_pretrained(golden_dir / "hub_finetuned", classifier_norm_eps=1e-6)
        error = (outputs(model, golden["input_1024"].float()) - golden["logits_1024"]).abs().max()
        parity("published classifier, as it is", error, 1e-5)

    @pytest.mark.parametrize("name", MODELS)
    def test_equals_the_converted_folder(self, golden_dir, converted, name):
        theirs, ours = (MODELS[name].from_pretrained(folder) for folder in (golden_dir / name, converted[name]))
        state, expected = theirs.state_dict(), ours.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[key], expected[key]) for key in state)
        inputs = torch.randn(2, 64, 128)
        torch.testing.assert_close(outputs(theirs, inputs), outputs(ours, inputs), atol=1e-6, rtol=0)

    @pytest.mark.parametrize("name", MODELS)
    def test_loads_every_weight_and_writes_nothing(self, golden_dir, tmp_path, name):
        folder = tmp_path / name
        shutil.copytree(golden_dir / name, folder)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        _, info = MODELS[name].from_pretrained(folder, output_loading_info=True)
        assert not any(info.values())
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    @pytest.mark.parametrize("arguments", [{"dtype": torch.bfloat16}, {"device_map": "cpu"}, {"dtype": "auto"}])
    def test_arguments_of_from_pretrained(self, golden_dir, arguments):
        model = SSLAMForAudioClassification.from_pretrained(golden_dir / "hub_finetuned", **arguments)
        expected = load_file(golden_dir / "hub_finetuned" / "model.safetensors")["model.head.weight"]
        assert torch.equal(model.classifier.dense.weight, expected.to(model.dtype))

    def test_other_forms_of_the_same_weights(self, golden_dir, tmp_path):
        source = golden_dir / "hub_finetuned"
        tensors = load_file(source / "model.safetensors")
        expected = SSLAMForAudioClassification.from_pretrained(source).state_dict()
        (tmp_path / "bin").mkdir()
        torch.save(tensors, tmp_path / "bin" / "pytorch_model.bin")
        (tmp_path / "shards").mkdir()
        names = sorted(tensors)
        parts = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, keys in parts.items():
            save_file({key: tensors[key] for key in keys}, tmp_path / "shards" / file, {"format": "pt"})
        weight_map = {key: file for file, keys in parts.items() for key in keys}
        index = {"metadata": {}, "weight_map": weight_map}
        (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
        for form in ("bin", "shards"):
            shutil.copy(source / "config.json", tmp_path / form)
            state = SSLAMForAudioClassification.from_pretrained(tmp_path / form).state_dict()
            assert all(torch.equal(state[key], expected[key]) for key in expected)
        config = SSLAMConfig.from_pretrained(source)
        state = SSLAMForAudioClassification.from_pretrained(None, config=config, state_dict=tensors).state_dict()
        assert all(torch.equal(state[key], expected[key]) for key in expected)

    @pytest.mark.parametrize("name", MODELS)
    def test_is_saved_in_our_layout(self, golden_dir, tmp_path, name):
        model = MODELS[name].from_pretrained(golden_dir / name)
        model.save_pretrained(tmp_path)
        assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
        config = json.loads((tmp_path / "config.json").read_text())
        assert config["model_type"] == "sslam"
        assert config["architectures"] == [MODELS[name].__name__]
        assert config["auto_map"]["AutoConfig"] == "configuration_sslam.SSLAMConfig"
        again = MODELS[name].from_pretrained(tmp_path)
        assert all(torch.equal(again.state_dict()[key], value) for key, value in model.state_dict().items())

    def test_key_mapping_is_the_table_of_the_conversion(self, golden_dir):
        import re

        keys = load_file(golden_dir / "hub_finetuned" / "model.safetensors").keys()
        mapping = key_mapping(HUB_EAT)
        renamed = {}
        for key in keys:
            matching = [(pattern, ours) for pattern, ours in mapping.items() if re.search(pattern, key)]
            assert len(matching) == 1
            renamed[key] = re.sub(*matching[0], key)
            assert not any(re.search(pattern, renamed[key]) for pattern in mapping)
        assert renamed == to_ours(keys, HUB_EAT)


class TestParts:
    def test_encoder_of_a_classifier(self, golden_dir):
        encoder = SSLAMModel.from_pretrained(golden_dir / "hub_finetuned")
        classifier = SSLAMForAudioClassification.from_pretrained(golden_dir / "hub_finetuned")
        assert all(torch.equal(encoder.state_dict()[k], v) for k, v in classifier.sslam.state_dict().items())

    def test_classifier_from_an_encoder_has_a_new_head(self, golden_dir):
        model, info = SSLAMForAudioClassification.from_pretrained(
            golden_dir / "hub_pretrained", num_labels=5, output_loading_info=True
        )
        assert {key.partition(".")[0] for key in info["missing_keys"]} == {"classifier"}
        assert model.config.num_labels == 5
        encoder = SSLAMModel.from_pretrained(golden_dir / "hub_pretrained")
        assert all(torch.equal(encoder.state_dict()[k], v) for k, v in model.sslam.state_dict().items())

    def test_pretraining_from_an_encoder_has_a_new_decoder_and_a_copied_teacher(self, golden_dir):
        model, info = SSLAMForPreTraining.from_pretrained(golden_dir / "hub_pretrained", output_loading_info=True)
        assert {key.partition(".")[0] for key in info["missing_keys"]} == {"decoder", "teacher"}
        teacher = model.teacher.state_dict()
        assert all(torch.equal(teacher[key], value) for key, value in model.sslam.state_dict().items())

    def test_other_number_of_classes(self, golden_dir):
        model = SSLAMForAudioClassification.from_pretrained(
            golden_dir / "hub_finetuned", num_labels=3, ignore_mismatched_sizes=True
        )
        assert model.classifier.dense.out_features == 3


class TestConfiguration:
    @pytest.mark.parametrize("name", MODELS)
    def test_equals_the_converted_configuration(self, golden_dir, converted, name):
        ours, theirs = (
            SSLAMConfig.from_pretrained(folder).to_dict() for folder in (golden_dir / name, converted[name])
        )
        assert theirs.pop("auto_map")
        assert ours == theirs

    def test_audiosets_classes_have_their_names(self, copy):
        def widen(tensors):
            head = {"weight": torch.randn(527, 32), "bias": torch.randn(527)}
            return tensors | {f"model.head.{name}": value for name, value in head.items()}

        folder = copy("hub_finetuned", widen, num_classes=527)
        model = AutoModelForAudioClassification.from_pretrained(folder)
        assert list(model.config.id2label.values()) == audioset_labels()
        assert model.config.label2id["Speech"] == 0
        assert model.config.problem_type == "multi_label_classification"

    def test_defaults_of_the_published_class(self):
        config = SSLAMConfig.from_dict({"model_type": "eat", "model_variant": "finetune"})
        assert (config.hidden_size, config.num_hidden_layers, config.intermediate_size) == (768, 12, 3072)
        assert (config.num_labels, config.max_length, config.classifier_norm_eps) == (527, 1024, 1e-5)

    def test_large_size(self):
        settings = {"model_type": "eat", "embed_dim": 1024, "depth": 24, "num_heads": 16}
        assert SSLAMConfig.from_dict(settings).intermediate_size == 4096

    def test_names_of_classes_in_the_file_stay(self, golden_dir):
        settings = json.loads((golden_dir / "hub_finetuned" / "config.json").read_text())
        names = {str(index): f"class {index}" for index in range(12)}
        config = SSLAMConfig.from_dict(settings | {"id2label": names})
        assert config.id2label[11] == "class 11"

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"fixed_positions": False}, "fixed_positions=False"),
            ({"layer_norm_first": True}, "layer_norm_first=True"),
            ({"patch_size": 16, "stride": 10}, "patches overlap"),
            ({"embed_dim": "wide"}, "no valid model"),
            ({"img_size": 1024}, "no valid model"),
            ({"model_variant": "finetune", "num_classes": 10**9}, "num_labels=1000000000 is more than"),
            ({"depth": 10**9}, "num_hidden_layers=1000000000 is more than"),
        ],
    )
    def test_other_models_are_refused(self, settings, message):
        with pytest.raises(ValueError, match=message):
            SSLAMConfig.from_dict({"model_type": "eat"} | settings)


class TestAutoClasses:
    @pytest.mark.parametrize("name", MODELS)
    def test_all(self, golden_dir, name):
        folder = golden_dir / name
        assert type(AutoConfig.from_pretrained(folder)) is SSLAMConfig
        assert type(AutoFeatureExtractor.from_pretrained(folder)) is SSLAMFeatureExtractor
        assert type(AutoModel.from_pretrained(folder)) is SSLAMModel
        assert type(AutoModelForAudioClassification.from_pretrained(folder)) is SSLAMForAudioClassification

    def test_pipeline(self, golden_dir, recording):
        folder = golden_dir / "hub_finetuned"
        scores = pipeline("audio-classification", str(folder), top_k=12)(recording.numpy())
        inputs = SSLAMFeatureExtractor.from_pretrained(folder)(recording, sampling_rate=16_000, return_tensors="pt")
        logits = outputs(SSLAMForAudioClassification.from_pretrained(folder), inputs["input_values"])[0]
        assert [int(score["label"].removeprefix("LABEL_")) for score in scores] == logits.argsort(
            descending=True
        ).tolist()

    def test_other_models_without_a_feature_extractor_are_still_an_error(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(OSError, match="preprocessor_config"):
            AutoFeatureExtractor.from_pretrained(tmp_path)
        with pytest.raises(OSError, match="preprocessor_config"):
            transformers.ASTFeatureExtractor.from_pretrained(tmp_path)


class TestFeatureExtractor:
    def test_normalisation_and_length(self, golden_dir, copy):
        extractor = SSLAMFeatureExtractor.from_pretrained(golden_dir / "hub_pretrained")
        assert {name: getattr(extractor, name) for name in ("mean", "std", "max_length")} == DATASET_PRESETS[
            "audioset"
        ]
        assert SSLAMFeatureExtractor.from_pretrained(copy("hub_pretrained", img_size=[512, 128])).max_length == 512

    def test_arguments_take_precedence(self, golden_dir):
        extractor = SSLAMFeatureExtractor.from_pretrained(golden_dir / "hub_pretrained", mean=-6.627, std=5.359)
        assert (extractor.mean, extractor.std) == (-6.627, 5.359)
        extractor, unused = SSLAMFeatureExtractor.from_pretrained(
            golden_dir / "hub_pretrained", return_unused_kwargs=True, other=1, revision="main"
        )
        assert unused == {"other": 1}

    def test_is_saved(self, golden_dir, tmp_path):
        extractor = SSLAMFeatureExtractor.from_pretrained(golden_dir / "hub_pretrained")
        extractor.save_pretrained(tmp_path)
        assert SSLAMFeatureExtractor.from_pretrained(tmp_path).to_dict() == extractor.to_dict()

    def test_a_folder_of_another_model_is_an_error(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        with pytest.raises(OSError, match="preprocessor_config"):
            SSLAMFeatureExtractor.from_pretrained(tmp_path)

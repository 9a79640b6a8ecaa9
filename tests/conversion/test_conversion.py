"""Published checkpoints of every form become models that compute the published numbers."""

import importlib.util
import json
import os
import subprocess
import sys
from enum import Enum
from pathlib import Path
from types import ModuleType

import pytest
import torch
from huggingface_hub import metadata_load
from safetensors.torch import load_file, save_file

from conversion.__main__ import make_parser
from conversion.convert import HEAD_PARTS, HEADS, WRITERS, convert
from conversion.reader import read_checkpoint
from modeling_sslam import (
    DATASET_PRESETS,
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForPreTraining,
    SSLAMModel,
)
from modeling_sslam.common.labels import audioset_labels
from modeling_sslam.layouts import FAIRSEQ_POOLINGS, HUB_EAT, recognise

# Eight units in the last place of float32 values between 4 and 8, the largest states and logits: two machines sum in
# different orders in each of the three blocks.
TOLERANCE = 8 * 2.0**-21
ENCODER_LENGTHS = (16, 304, 512, 1024, 1536)
CLASSIFIER_LENGTHS = (512, 1024)


def max_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual - expected).abs().max().item()


@pytest.mark.parametrize("length", ENCODER_LENGTHS)
@pytest.mark.parametrize(
    ("source", "options", "title"),
    [
        ("sslam_pretrained.pt", (), "fairseq pre-trained"),
        ("sslam_pretrained.pt", ("--head", "pretraining"), "fairseq pre-trained, student of pretraining"),
        ("hub_pretrained", (), "Hub pre-trained"),
    ],
)
def test_encoder_computes_the_published_states(source, options, title, length, golden_dir, converted, parity):
    vectors = load_file(golden_dir / "encoder.safetensors")
    model = SSLAMModel.from_pretrained(converted(source, *options))
    with torch.inference_mode():
        states = model(vectors[f"input_{length}"].float()).last_hidden_state
    parity(
        f"{title}: last_hidden_state T={length}", max_error(states, vectors[f"last_hidden_state_{length}"]), TOLERANCE
    )


@pytest.mark.parametrize("length", CLASSIFIER_LENGTHS)
@pytest.mark.parametrize(("pooling", "vector"), [("cls", "logits"), ("mean", "logits_meanpool")])
@pytest.mark.parametrize(
    ("source", "title"), [("sslam_finetuned.pt", "fairseq fine-tuned"), ("hub_finetuned", "Hub fine-tuned")]
)
def test_classifier_computes_the_published_logits(
    source, title, pooling, vector, length, golden_dir, converted, parity
):
    vectors = load_file(golden_dir / "classifier.safetensors")
    # The vectors come from fairseq's code, which has this epsilon for every layout.
    model = SSLAMForAudioClassification.from_pretrained(
        converted(source, "--pooling", pooling), classifier_norm_eps=1e-6
    )
    with torch.inference_mode():
        logits = model(vectors[f"input_{length}"].float()).logits
    parity(f"{title}, {pooling}: logits T={length}", max_error(logits, vectors[f"{vector}_{length}"]), TOLERANCE)


def test_norm_epsilon_of_the_classifier_follows_the_layout(converted):
    assert SSLAMConfig.from_pretrained(converted("sslam_finetuned.pt")).classifier_norm_eps == 1e-6
    assert SSLAMConfig.from_pretrained(converted("hub_finetuned")).classifier_norm_eps == 1e-5


def test_both_layouts_give_the_same_weights(converted):
    for fairseq, hub in (("sslam_pretrained.pt", "hub_pretrained"), ("sslam_finetuned.pt", "hub_finetuned")):
        from_fairseq, from_hub = (load_file(converted(name) / "model.safetensors") for name in (fairseq, hub))
        assert from_fairseq.keys() == from_hub.keys()
        assert all(torch.equal(from_fairseq[name], from_hub[name]) for name in from_fairseq)


def test_configuration_has_the_settings_of_a_pretrained_checkpoint(converted):
    config = SSLAMConfig.from_pretrained(converted("sslam_pretrained.pt", "--head", "pretraining"))
    expected = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "layer_norm_eps": 1e-6,
        "patch_size": 16,
        "num_mel_bins": 128,
        "max_length": 1024,
        "max_position_embeddings": 768,
        "qkv_bias": True,
        "num_clones": 3,
        "mask_prob": 0.8,
        "mask_prob_adjust": 0.07,
        "mask_block_size": 5,
        "mask_noise_std": 0.01,
        "decoder_num_layers": 3,
        "decoder_kernel_size": 3,
        "decoder_groups": 16,
        "num_target_layers": None,
        "global_loss_weight": 1.0,
        "ema_decay": 0.9998,
        "ema_end_decay": 0.99999,
        "ema_anneal_end_step": 100_000,
    }
    assert {name: getattr(config, name) for name in expected} == expected


def test_auto_keeps_the_classifier_of_a_fine_tuned_checkpoint_and_the_encoder_of_a_pretrained_one(converted):
    architectures = {
        name: SSLAMConfig.from_pretrained(converted(name)).architectures
        for name in ("sslam_finetuned.pt", "hub_finetuned", "sslam_pretrained.pt", "hub_pretrained")
    }
    assert architectures == {
        "sslam_finetuned.pt": ["SSLAMForAudioClassification"],
        "hub_finetuned": ["SSLAMForAudioClassification"],
        "sslam_pretrained.pt": ["SSLAMModel"],
        "hub_pretrained": ["SSLAMModel"],
    }


def test_head_encoder_keeps_the_classifiers_encoder(converted):
    encoder = SSLAMModel.from_pretrained(converted("sslam_finetuned.pt", "--head", "encoder"))
    classifier = SSLAMForAudioClassification.from_pretrained(converted("sslam_finetuned.pt"))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, classifier.sslam.state_dict()[name]), name


def test_teacher_has_the_weights_of_the_moving_average(converted, pretrained):
    teacher = SSLAMModel.from_pretrained(converted("sslam_pretrained.pt", "--weights", "teacher"))
    whole = SSLAMForPreTraining.from_pretrained(converted("sslam_pretrained.pt", "--head", "pretraining"))
    published = pretrained.tensors["_ema.blocks.1.mlp.fc1.weight"]
    assert torch.equal(teacher.encoder.layers[1].mlp.fc1.weight, published)
    assert torch.equal(whole.teacher.encoder.layers[1].mlp.fc1.weight, published)
    assert not torch.equal(whole.sslam.encoder.layers[1].mlp.fc1.weight, published)
    student = pretrained.tensors["modality_encoders.IMAGE.decoder.blocks.2.0.weight"]
    assert torch.equal(whole.decoder.layers[2].weight, student)


# Bare state dicts and file formats


def fairseq_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name: tensor for name, tensor in tensors.items() if not name.startswith("_ema.") and ".decoder." not in name
    }


BARE = {
    "as it is": lambda state: state,
    "under model": lambda state: {"model": state},
    "under state_dict": lambda state: {"state_dict": state, "epoch": 3},
    "under model_state_dict": lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
    "of DistributedDataParallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "of torch.compile": lambda state: {f"_orig_mod.{name}": tensor for name, tensor in state.items()},
    "of an outer module": lambda state: {f"model.{name}": tensor for name, tensor in state.items()},
    "without the modality": lambda state: {
        name.replace("modality_encoders.IMAGE.", ""): tensor for name, tensor in state.items()
    },
    "without positions": lambda state: {name: state[name] for name in state if "positional" not in name},
    "as parameters": lambda state: {name: torch.nn.Parameter(tensor) for name, tensor in state.items()},
}


@pytest.mark.parametrize("wrap", BARE.values(), ids=BARE)
@pytest.mark.parametrize("naming", ["fairseq", "hub"])
def test_bare_state_dict(naming, wrap, golden_dir, pretrained, converted, run, tmp_path):
    if naming == "fairseq":
        state = fairseq_names(pretrained.tensors)
    else:
        state = read_checkpoint(golden_dir / "hub_pretrained").tensors
        state = {name.removeprefix("model."): tensor for name, tensor in state.items()}
    torch.save(wrap(state), tmp_path / "bare.pt")
    outcome = run(tmp_path / "bare.pt", tmp_path / "out", "--num-attention-heads", 4)
    assert outcome.code == 0, outcome.error
    found, expected = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", converted("sslam_pretrained.pt"))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors", "folder of .bin", "shards"])
def test_every_file_format_gives_the_same_weights(form, golden_dir, fine_tuned, converted, run, tmp_path):
    state, source, options = fine_tuned.tensors, tmp_path / "weights", ("--num-attention-heads", 4)
    if form == "zip":
        torch.save(state, source)
    elif form == "legacy":
        torch.save(state, source, _use_new_zipfile_serialization=False)
    elif form == "safetensors":
        save_file(state, source)
    else:
        source.mkdir()
        (source / "config.json").write_text((golden_dir / "hub_finetuned" / "config.json").read_text())
        state, options = read_checkpoint(golden_dir / "hub_finetuned").tensors, ()
        if form == "folder of .bin":
            torch.save(state, source / "pytorch_model.bin")
        else:
            names = sorted(state)
            files = {name: f"model-0000{1 + (i > 9)}-of-00002.safetensors" for i, name in enumerate(names)}
            for file in set(files.values()):
                save_file({name: state[name] for name in names if files[name] == file}, source / file)
            (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    outcome = run(source, tmp_path / "out", *options)
    assert outcome.code == 0, outcome.error
    found, expected = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", converted("sslam_finetuned.pt"))
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept(dtype, pretrained, save, run, tmp_path):
    source = save(pretrained, {name: tensor.to(dtype) for name, tensor in pretrained.tensors.items()})
    assert run(source, tmp_path / "out").code == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {dtype}
    assert SSLAMModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == dtype


def test_unstated_heads_have_64_channels(run, tmp_path, make_config):
    config = make_config(hidden_size=128, num_attention_heads=2, num_mel_bins=128)
    torch.save(SSLAMModel(config).state_dict(), tmp_path / "bare.pt")
    outcome = run(tmp_path / "bare.pt", tmp_path / "out")
    assert outcome.code == 0, outcome.error
    assert any("2 of 64 channels are assumed" in line for line in outcome.lines)
    assert SSLAMConfig.from_pretrained(tmp_path / "out").num_attention_heads == 2


# Settings


@pytest.mark.parametrize(
    ("settings", "problem_type", "mean", "max_length"),
    [
        ({}, "multi_label_classification", -4.268, 1024),
        ({"model.esc50_eval": True, "model.target_length": 512}, "single_label_classification", -6.627, 512),
        ({"model.spcv2_eval": True, "model.target_length": 128}, "single_label_classification", -6.846, 128),
        ({"model.audio_mae": False}, "single_label_classification", -4.268, 1024),
        (
            {"model.target_length": "${task.target_length}", "task.target_length": 256},
            "multi_label_classification",
            -4.268,
            256,
        ),
    ],
)
def test_settings_of_a_fine_tuned_checkpoint_determine_the_task(
    settings, problem_type, mean, max_length, fine_tuned, save, run, tmp_path
):
    outcome = run(save(fine_tuned, settings=settings), tmp_path / "out")
    assert outcome.code == 0, outcome.error
    config = SSLAMConfig.from_pretrained(tmp_path / "out")
    extractor = SSLAMFeatureExtractor.from_pretrained(tmp_path / "out")
    assert (config.problem_type, config.max_length) == (problem_type, max_length)
    assert (extractor.mean, extractor.max_length) == (mean, max_length)


def test_options_take_precedence_over_settings(fine_tuned, save, run, tmp_path):
    options = {
        "--problem-type": "single_label_classification",
        "--dataset-preset": "esc50",
        "--pooling": "mean",
        "--num-attention-heads": 8,
    }
    assert run(save(fine_tuned), tmp_path / "out", *(x for pair in options.items() for x in pair)).code == 0
    config = SSLAMConfig.from_pretrained(tmp_path / "out")
    assert (config.problem_type, config.classifier_pooling) == ("single_label_classification", "mean")
    assert (config.num_attention_heads, config.max_length) == (8, 512)
    assert SSLAMFeatureExtractor.from_pretrained(tmp_path / "out").mean == -6.627


@pytest.mark.parametrize(("number", "pooling"), [(1, "mean"), (2, "cls"), (3, "lin_softmax")])
def test_pooling_is_read_from_a_pickled_enumeration(number, pooling, fine_tuned, save, run, tmp_path, monkeypatch):
    module = ModuleType("user_module_of_eat")
    module.PredictionMode = Enum(
        "PredictionMode", ["MEAN_POOLING", "CLS_TOKEN", "LIN_SOFTMAX"], module=module.__name__
    )
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)
        source = save(fine_tuned, settings={"model.prediction_mode": module.PredictionMode(number)})
    assert run(source, tmp_path / "out").code == 0
    assert module.__name__ not in sys.modules
    assert SSLAMConfig.from_pretrained(tmp_path / "out").classifier_pooling == pooling


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("model.layer_norm_first", True),
        ("model.modalities.image.prenet_depth", 2),
        ("model.modalities.image.fixed_positions", False),
    ],
)
def test_settings_of_another_architecture_are_refused(path, value, pretrained, save, run, tmp_path):
    outcome = run(save(pretrained, settings={path: value}), tmp_path / "out")
    assert outcome.code == 1
    assert f"{path}={value!r}" in outcome.error


def test_settings_of_another_objective_are_refused_only_for_pretraining(pretrained, save, run, tmp_path):
    source = save(pretrained, settings={"model.recon_loss": 1.0})
    assert run(source, tmp_path / "encoder").code == 0
    outcome = run(source, tmp_path / "pretraining", "--head", "pretraining")
    assert outcome.code == 1
    assert "model.recon_loss=1.0" in outcome.error


def test_settings_that_contradict_the_weights_are_noted(pretrained, save, run, tmp_path):
    outcome = run(save(pretrained, settings={"model.depth": 12}), tmp_path / "out")
    assert outcome.code == 0
    assert any("num_hidden_layers=12, but the weights have 3" in line for line in outcome.lines)


def test_pooling_without_a_counterpart_is_refused(fine_tuned, save, run, tmp_path):
    outcome = run(save(fine_tuned, settings={"model.prediction_mode": "MAX_POOLING"}), tmp_path / "out")
    assert outcome.code == 1
    assert "'MAX_POOLING'" in outcome.error


# Labels


def test_527_classes_get_audiosets_names(fine_tuned, save, run, tmp_path):
    generator = torch.Generator().manual_seed(0)
    head = {"head.weight": torch.randn(527, 32, generator=generator), "head.bias": torch.zeros(527)}
    assert run(save(fine_tuned, head), tmp_path / "out").code == 0
    config = SSLAMConfig.from_pretrained(tmp_path / "out")
    assert config.num_labels == 527
    assert [config.id2label[i] for i in range(527)] == audioset_labels()
    assert config.label2id["Field recording"] == 526


def test_labels_are_read_from_a_file(golden_dir, run, tmp_path):
    names = [f"sound, no. {i}" for i in range(12)]
    rows = "".join(f'{i},/m/{i},"{name}"\n' for i, name in enumerate(names))
    (tmp_path / "labels.csv").write_text(f"index,mid,display_name\n{rows}")
    outcome = run(golden_dir / "sslam_finetuned.pt", tmp_path / "out", "--labels", tmp_path / "labels.csv")
    assert outcome.code == 0, outcome.error
    assert list(SSLAMConfig.from_pretrained(tmp_path / "out").id2label.values()) == names
    again = run(tmp_path / "out", tmp_path / "again")
    assert again.code == 0
    assert list(SSLAMConfig.from_pretrained(tmp_path / "again").id2label.values()) == names


def test_wrong_number_of_labels_is_refused(golden_dir, run, tmp_path):
    (tmp_path / "labels.csv").write_text("dog\ncat\n")
    options = ("--labels", tmp_path / "labels.csv")
    outcome = run(golden_dir / "sslam_finetuned.pt", tmp_path / "out", *options)
    assert outcome.code == 1
    assert "names 2 classes, but the classifier has 12" in outcome.error
    for source in ((golden_dir / "sslam_pretrained.pt",), (golden_dir / "sslam_finetuned.pt", "--head", "encoder")):
        outcome = run(source[0], tmp_path / "out", *source[1:], *options)
        assert outcome.code == 1
        assert "no classifier" in outcome.error


# Results


def test_model_card_states_the_facts(golden_dir, converted):
    folder = converted("sslam_finetuned.pt")
    metadata = metadata_load(folder / "README.md")
    assert metadata["library_name"] == "transformers"
    assert metadata["pipeline_tag"] == "audio-classification"
    card = (folder / "README.md").read_text()
    sha256 = subprocess.run(
        ["sha256sum", golden_dir / "sslam_finetuned.pt"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    for fact in (sha256, "fairseq, fine-tuned", "46,892 parameters", "400000", "mean -4.268", "epsilon 1e-06"):
        assert fact in card


def test_model_card_states_the_license_of_the_source(golden_dir, run, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).write_bytes((golden_dir / "hub_pretrained" / name).read_bytes())
    (source / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# A model\n")
    assert run(source, tmp_path / "out").code == 0
    assert metadata_load(tmp_path / "out" / "README.md")["license"] == "cc-by-4.0"


def test_report_and_quiet(golden_dir, run, tmp_path):
    assert run(golden_dir / "hub_pretrained", tmp_path / "quiet", "--quiet").lines == []
    lines = run(golden_dir / "sslam_pretrained.pt", tmp_path / "out").lines
    assert lines[0] == (
        "sslam_pretrained.pt: fairseq, pre-trained; encoder (42 tensors), decoder (8 tensors), teacher (42 tensors)"
    )
    assert lines[-1].endswith("SSLAMModel, 0.05 M parameters; read back and found equal")


def test_training_code_is_not_imported_even_where_it_is_installed(golden_dir, tmp_path, monkeypatch):
    source, packages = golden_dir / "sslam_pretrained.pt", ("omegaconf", "EAT")
    for package in packages:
        assert f"{package}.".encode() in source.read_bytes()
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert all(importlib.util.find_spec(package) for package in packages)
    convert(source, tmp_path / "out", report=lambda line: None)
    assert not sys.modules.keys() & set(packages)


REMOTE = """
import sys
import torch
from transformers import AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, AutoModelForPreTraining
classifier, pretraining = sys.argv[1:]
inputs = AutoFeatureExtractor.from_pretrained(classifier, trust_remote_code=True)(
    torch.sin(torch.arange(16000) / 9), sampling_rate=16000, return_tensors="pt"
)
print(AutoModelForAudioClassification.from_pretrained(classifier, trust_remote_code=True)(**inputs).logits.shape)
print(AutoModel.from_pretrained(pretraining, trust_remote_code=True)(**inputs).pooler_output.shape)
print(type(AutoModelForPreTraining.from_pretrained(pretraining, trust_remote_code=True)).__name__)
assert "modeling_sslam" not in sys.modules
"""


@pytest.mark.slow
def test_folders_load_without_the_package(converted, tmp_path):
    folders = [converted("sslam_finetuned.pt"), converted("sslam_pretrained.pt", "--head", "pretraining")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, *folders], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split("\n")[:3] == ["torch.Size([1, 12])", "torch.Size([1, 32])", "SSLAMForPreTraining"]


def test_choices_of_the_options_are_complete():
    options = {action.dest: action.choices for action in make_parser()._actions}
    assert set(options["dataset_preset"]) == set(DATASET_PRESETS)
    assert set(options["to"]) == set(WRITERS) == set(HEADS)
    assert set(options["head"]) == {"auto", *HEAD_PARTS}
    assert set(options["pooling"]) == set(FAIRSEQ_POOLINGS.values())


def test_help_shows_examples():
    result = subprocess.run(
        [sys.executable, "-m", "conversion", "--help"], cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert "python -m conversion SSLAM_AS2M_Finetuned.pt sslam-as2m" in result.stdout


def test_hub_layout_is_recognised_without_its_prefix(golden_dir):
    tensors = read_checkpoint(golden_dir / "hub_finetuned").tensors
    layout, names = recognise(name.removeprefix("model.") for name in tensors)
    assert layout is HUB_EAT
    assert None not in names.values()

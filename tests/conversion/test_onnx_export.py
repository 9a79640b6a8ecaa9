"""ONNX graphs compute the model's numbers for any batch size and length. Graphs that do not are not written."""

import importlib.util
import json

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoFeatureExtractor

from conversion import onnx_export
from modeling_sslam import SSLAMConfig, SSLAMForAudioClassification, SSLAMModel

pytestmark = pytest.mark.slow

# Eight units in the last place of float32 values between 4 and 8, the largest states and logits: two runtimes sum in
# different orders in each of the three blocks.
TOLERANCE = 8 * 2.0**-21
# onnxruntime sums the mean over up to 1032 patches in one sequence, which rounds more often. In linear softmax the
# logarithm magnifies the rounding of that sum where a probability is near 0 or 1.
TOLERANCES = {"mean": 1e-5, "lin_softmax": 5e-5}
MODELS = {
    "encoder": ("sslam_pretrained.pt", (), SSLAMModel),
    "encoder of a classifier": ("sslam_finetuned.pt", ("--head", "encoder"), SSLAMModel),
    "cls": ("sslam_finetuned.pt", (), SSLAMForAudioClassification),
    "mean": ("sslam_finetuned.pt", ("--pooling", "mean"), SSLAMForAudioClassification),
    "lin_softmax": ("sslam_finetuned.pt", ("--pooling", "lin_softmax"), SSLAMForAudioClassification),
}


@pytest.fixture
def session(converted):
    """`session(name, *options)` is a golden checkpoint's graph in onnxruntime, by default written by `--to onnx`."""

    def start(name: str, *options: str) -> onnxruntime.InferenceSession:
        to = () if "--to" in options else ("--to", "onnx")
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        settings.log_severity_level = 4
        return onnxruntime.InferenceSession(converted(name, *options, *to) / "model.onnx", settings)

    return start


def run_graph(graph: onnxruntime.InferenceSession, **inputs: torch.Tensor) -> list[torch.Tensor]:
    return [torch.from_numpy(x) for x in graph.run(None, {name: x.numpy() for name, x in inputs.items()})]


def max_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return (actual - expected).abs().max().item()


@pytest.mark.parametrize("length", [16, 304, 512, 1024, 1536])
def test_encoder_computes_the_published_states(length, golden_dir, session, parity):
    vectors = load_file(golden_dir / "encoder.safetensors")
    states, pooled = run_graph(session("sslam_pretrained.pt"), input_values=vectors[f"input_{length}"][:, 0].float())
    parity(f"ONNX: last_hidden_state T={length}", max_error(states, vectors[f"last_hidden_state_{length}"]), TOLERANCE)
    assert torch.equal(pooled, states[:, 0])


@pytest.mark.parametrize("length", [512, 1024])
@pytest.mark.parametrize(("pooling", "vector"), [("cls", "logits"), ("mean", "logits_meanpool")])
def test_classifier_computes_the_published_logits(pooling, vector, length, golden_dir, session, parity):
    vectors = load_file(golden_dir / "classifier.safetensors")
    (logits,) = run_graph(session(*flat(pooling)), input_values=vectors[f"input_{length}"][:, 0].float())
    error = max_error(logits, vectors[f"{vector}_{length}"])
    parity(f"ONNX, {pooling}: logits T={length}", error, TOLERANCES.get(pooling, TOLERANCE))


def flat(model: str) -> tuple[str, ...]:
    name, options, _ = MODELS[model]
    return name, *options


@pytest.mark.parametrize("model", MODELS)
def test_any_batch_size_and_length(model, converted, session):
    graph = session(*flat(model))
    reference = MODELS[model][2].from_pretrained(converted(*flat(model)))
    for batch_size, frames in ((1, 16), (2, 16), (1, 32), (5, 112), (3, 1024), (1, 2064)):
        clips = torch.randn(batch_size, frames, 128)
        with torch.inference_mode():
            expected = reference(clips).to_tuple()
        found = run_graph(graph, input_values=clips)
        for ours, theirs in zip(found, expected, strict=True):
            assert max_error(ours, theirs) <= TOLERANCES.get(model, TOLERANCE)


def test_longest_clip_fills_the_position_table(make_config, run, tmp_path):
    model = SSLAMModel(make_config()).eval()
    model.save_pretrained(tmp_path / "source")
    assert run(tmp_path / "source", tmp_path / "out", "--to", "onnx").code == 0
    graph = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    clips = torch.randn(2, 128, 32)
    with torch.inference_mode():
        assert max_error(run_graph(graph, input_values=clips)[0], model(clips).last_hidden_state) <= TOLERANCE


@pytest.mark.parametrize("frames", [0, 8, 24, 1000, 12_304])
@pytest.mark.parametrize("to", ["onnx", "onnx-masked"])
def test_invalid_lengths_fail(to, frames, session):
    graph = session("sslam_finetuned.pt", "--to", to)
    inputs = {"input_values": torch.zeros(1, frames, 128), "attention_mask": torch.ones(1, frames, dtype=torch.int64)}
    with pytest.raises(Exception, match="Non-zero status code"):
        run_graph(graph, **{found.name: inputs[found.name] for found in graph.get_inputs()})


@pytest.mark.parametrize("frames", [16, 48, 1024])
def test_mask_of_another_length_fails(frames, session):
    graph = session("sslam_finetuned.pt", "--to", "onnx-masked")
    with pytest.raises(Exception, match="Non-zero status code"):
        run_graph(graph, input_values=torch.zeros(1, 64, 128), attention_mask=torch.ones(1, frames, dtype=torch.int64))


@pytest.mark.parametrize("model", MODELS)
def test_padded_clip_gets_the_same_result_as_alone(model, session):
    masked, plain = session(*flat(model), "--to", "onnx-masked"), session(*flat(model))
    lengths = [96, 16, 304]
    clips = [torch.randn(1, length, 128) for length in lengths]
    batch = torch.full((3, 320, 128), 0.5)
    mask = torch.zeros(3, 320, dtype=torch.int64)
    for row, (clip, length) in enumerate(zip(clips, lengths, strict=True)):
        batch[row, :length] = clip
        mask[row, :length] = 1
    found = run_graph(masked, input_values=batch, attention_mask=mask)[0]
    for row, (clip, length) in enumerate(zip(clips, lengths, strict=True)):
        alone = run_graph(plain, input_values=clip)[0][0]
        together = found[row] if found.ndim == 2 else found[row, : 1 + length // 2]
        assert max_error(together, alone) <= TOLERANCE
    unmasked = run_graph(masked, input_values=batch, attention_mask=torch.ones_like(mask))[0]
    assert max_error(unmasked, run_graph(plain, input_values=batch)[0]) <= TOLERANCE
    assert max_error(unmasked, found) > 100 * TOLERANCE


def test_folder_suffices_for_inference(converted, session):
    folder = converted("sslam_finetuned.pt", "--to", "onnx")
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.json",
        "configuration_sslam.py",
        "feature_extraction_sslam.py",
        "filter_bank_sslam.py",
        "model.onnx",
        "preprocessor_config.json",
        "transfers_sslam.py",
    ]
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_sslam.SSLAMConfig"
    }
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, SSLAMConfig)
    assert len(config.id2label) == 12
    extractor = AutoFeatureExtractor.from_pretrained(folder)
    # The extractor returns a mask with padding="longest", but not by default.
    waveforms = [np.sin(np.arange(length) / 9).astype(np.float32) for length in (16_000, 40_000)]
    inputs = extractor(waveforms, sampling_rate=16_000, return_tensors="np")
    assert session("sslam_finetuned.pt").run(["logits"], dict(inputs))[0].shape == (2, 12)
    inputs = extractor(waveforms, sampling_rate=16_000, padding="longest", return_tensors="np")
    mask = inputs["attention_mask"].astype(np.int64)
    graph = session("sslam_finetuned.pt", "--to", "onnx-masked")
    (logits,) = graph.run(["logits"], {"input_values": inputs["input_values"], "attention_mask": mask})
    assert logits.shape == (2, 12)


def test_shapes_are_named(session):
    graph = session("sslam_pretrained.pt", "--to", "onnx-masked")
    shapes = {tensor.name: tensor.shape for tensor in (*graph.get_inputs(), *graph.get_outputs())}
    assert shapes == {
        "input_values": ["batch_size", "16*time_patches", 128],
        "attention_mask": ["batch_size", "16*time_patches"],
        "last_hidden_state": ["batch_size", "8*time_patches + 1", 32],
        "pooler_output": ["batch_size", 32],
    }


def test_half_precision_is_exported_in_float32(converted, run, tmp_path):
    source = tmp_path / "source"
    SSLAMModel.from_pretrained(converted("sslam_pretrained.pt"), dtype=torch.float16).save_pretrained(source)
    assert load_file(source / "model.safetensors")["encoder.cls_token"].dtype == torch.float16
    assert run(source, tmp_path / "out", "--to", "onnx").code == 0
    clips = torch.randn(2, 1024, 128)
    states, _ = run_graph(onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx"), input_values=clips)
    with torch.inference_mode():
        expected = SSLAMModel.from_pretrained(source, dtype=torch.float32)(clips).last_hidden_state
    assert max_error(states, expected) <= TOLERANCE
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


# Errors


@pytest.mark.parametrize("package", onnx_export.REQUIRED)
def test_missing_package_is_named_with_its_extra(package, golden_dir, run, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == package else find_spec(name))
    outcome = run(golden_dir / "sslam_pretrained.pt", tmp_path / "out", "--to", "onnx")
    assert outcome.code == 1
    assert outcome.error == f'error: ONNX needs {package}, which is not installed: pip install ".[onnx]".\n'
    assert list(tmp_path.iterdir()) == []


def test_missing_source_is_refused(run, tmp_path):
    outcome = run(tmp_path / "nowhere", tmp_path / "out", "--to", "onnx")
    assert outcome.code == 1
    assert "nowhere does not exist" in outcome.error
    assert list(tmp_path.iterdir()) == []


def test_pretraining_model_has_no_graph(golden_dir, run, tmp_path):
    outcome = run(golden_dir / "sslam_pretrained.pt", tmp_path / "out", "--to", "onnx", "--head", "pretraining")
    assert outcome.code == 1
    assert "--to onnx cannot hold --head pretraining" in outcome.error


def test_existing_result_is_replaced_only_on_request(converted, run, tmp_path):
    source, out = converted("sslam_pretrained.pt"), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("{}")
    assert run(source, out, "--to", "onnx").code == 1
    assert [path.name for path in out.iterdir()] == ["config.json"]
    assert run(source, out, "--to", "onnx", "--overwrite").code == 0
    assert (out / "model.onnx").is_file()
    assert list(tmp_path.iterdir()) == [out]


def test_graph_with_other_numbers_is_not_kept(converted, run, tmp_path, monkeypatch):
    export = onnx_export.export_graph

    def export_wrong(model: SSLAMModel, *arguments) -> None:
        bias = model.encoder.layers[0].mlp.fc1.bias
        with torch.no_grad():
            bias[0] += 0.01
        export(model, *arguments)
        with torch.no_grad():
            bias[0] -= 0.01

    monkeypatch.setattr(onnx_export, "export_graph", export_wrong)
    outcome = run(converted("sslam_pretrained.pt"), tmp_path / "out", "--to", "onnx")
    assert outcome.code == 1
    assert "The graph computes other numbers than the model: they differ by up to" in outcome.error
    assert outcome.error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_graph_that_cannot_be_run_is_not_kept(converted, run, tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_export, "export_graph", lambda model, file, masked: file.write_bytes(b"no graph"))
    outcome = run(converted("sslam_pretrained.pt"), tmp_path / "out", "--to", "onnx")
    assert outcome.code == 1
    assert "onnxruntime cannot run the graph" in outcome.error
    assert outcome.error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []

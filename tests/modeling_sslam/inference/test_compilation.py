"""Compiled tagging and embedding equal the uncompiled ones, and compile once for each shape."""

from functools import partial

import numpy as np
import pytest
import torch

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel
from modeling_sslam.inference import Embedder, InferenceError, SSLAMTagger, embed
from modeling_sslam.inference.compilation import fill_batch
from modeling_sslam.inference.packed_blocks import PackedEncoder

SOUND = torch.randn(5 * 16_000, generator=torch.Generator().manual_seed(0)) / 10


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def _count_from_zero() -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()


@pytest.fixture
def _without_inductor(monkeypatch) -> None:
    """Trace as torch.compile does, but run the operators of torch: inductor takes seconds for each graph."""
    compile_ = torch.compile

    def trace(function, mode, **options):
        return compile_(function, backend="aot_eager", **options)

    monkeypatch.setattr(torch, "compile", trace)


@pytest.fixture
def config(make_config):
    return make_config(
        num_mel_bins=128, num_labels=3, problem_type="multi_label_classification", max_position_embeddings=12
    )


def extractor(**settings) -> SSLAMFeatureExtractor:
    return SSLAMFeatureExtractor(**({"max_length": 64} | settings))


def test_a_batch_is_filled_but_a_single_item_stays_alone():
    assert fill_batch([1, 2], 4) == [1, 2, 2, 2]
    assert fill_batch([1, 2, 3], 3) == [1, 2, 3]
    assert fill_batch([1], 4) == [1]
    assert fill_batch([1, 2, 3], 2) == [1, 2, 3]


@pytest.mark.usefixtures("_without_inductor")
@pytest.mark.parametrize("attention_mask", [False, True])
@pytest.mark.parametrize("problem_type", ["multi_label_classification", "single_label_classification"])
def test_timelines_are_equal(config, problem_type, attention_mask):
    config.problem_type = problem_type
    model, front_end = SSLAMForAudioClassification(config), extractor(return_attention_mask=attention_mask)
    plain, compiled = (SSLAMTagger(model, front_end, batch_size=4, compile=flag) for flag in (False, True))
    expected = plain.timeline(SOUND, 0.5, 0.5).scores
    assert num_graphs() == 0
    np.testing.assert_allclose(compiled.timeline(SOUND, 0.5, 0.5).scores, expected, rtol=0, atol=1e-6)
    compiled.timeline(SOUND[:48_000], 0.5, 0.5)
    assert num_graphs() == 1


@pytest.mark.usefixtures("_without_inductor")
def test_a_single_window_has_a_graph_of_its_own(config):
    tagger = SSLAMTagger(SSLAMForAudioClassification(config), extractor(), batch_size=4, compile=True)
    for _ in range(2):
        tagger.tag(SOUND)
        tagger.tag(SOUND[:8000])
    assert num_graphs() == 2


@pytest.mark.usefixtures("_without_inductor")
@pytest.mark.parametrize("batch_size", [3, "auto"])
@pytest.mark.parametrize(("pooling", "layer"), [("cls", "last"), ("mean", "mean"), ("frame", 1), ("patch", "all")])
def test_embeddings_are_equal(config, pooling, layer, batch_size):
    make = partial(Embedder, SSLAMModel(config), extractor(), pooling=pooling, layer=layer, batch_size=batch_size)
    expected = list(embed(SOUND, make()))
    found = list(embed(SOUND, make(compile=True)))
    assert [(clip.start, clip.end, clip.is_last) for clip in found] == [
        (clip.start, clip.end, clip.is_last) for clip in expected
    ]
    for clip, plain in zip(found, expected, strict=True):
        np.testing.assert_allclose(clip.embedding, plain.embedding, rtol=0, atol=2e-6)
    assert num_graphs() == 1


@pytest.mark.usefixtures("_without_inductor")
@pytest.mark.parametrize("attention_mask", [False, True])
def test_embeddings_of_waveforms_are_equal(config, attention_mask):
    front_end = extractor(return_attention_mask=attention_mask)
    plain, compiled = (Embedder(SSLAMModel(config), front_end, pooling="mean", compile=flag) for flag in (False, True))
    compiled.model.load_state_dict(plain.model.state_dict())
    for start in range(3):
        waveforms = SOUND[start:].unfold(0, 8000, 8000)[:4]
        kept = waveforms.clone()
        expected = plain.embed_waveforms(waveforms)
        windows = [clip.embedding for row in waveforms for clip in embed(row, plain)]
        np.testing.assert_allclose(expected.numpy(), np.stack(windows), rtol=0, atol=2e-4)
        torch.testing.assert_close(compiled.embed_waveforms(waveforms), expected, rtol=0, atol=2e-4)
        assert torch.equal(waveforms, kept)
    assert num_graphs() == 1


@pytest.mark.slow
def test_inductor_gives_equal_embeddings(config):
    """The compiler itself, with its C++, for the graph from waveforms to embeddings."""
    config.num_hidden_layers = 1
    plain, compiled = (Embedder(SSLAMModel(config), extractor(), compile=flag) for flag in (False, True))
    compiled.model.load_state_dict(plain.model.state_dict())
    waveforms = SOUND[:16_000].view(2, 8000)
    first = compiled.embed_waveforms(waveforms)
    second = compiled.embed_waveforms(waveforms.flip(0))
    expected = plain.embed_waveforms(waveforms)
    torch.testing.assert_close(first, expected, rtol=0, atol=2e-4)
    torch.testing.assert_close(second, expected.flip(0), rtol=0, atol=2e-4)


@pytest.mark.parametrize("compile_", [False, True])
@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        (torch.zeros(8000), r"Waveforms of shape \(8000,\)"),
        (torch.zeros(2, 100), "at least 400 samples"),
        (torch.zeros(2, 16_000), "Clips of 98 frames are longer than 64"),
        (torch.full((2, 8000), torch.nan), "Clip 0 has NaN"),
        (torch.full((2, 8000), 99.0), "Clip 0 peaks at 99"),
    ],
)
@pytest.mark.usefixtures("_without_inductor")
def test_unusable_waveforms_are_refused(config, compile_, waveforms, message):
    embedder = Embedder(SSLAMModel(config), extractor(), compile=compile_)
    with pytest.raises(ValueError, match=message):
        embedder.embed_waveforms(waveforms)


@pytest.mark.usefixtures("_without_inductor")
def test_broken_weights_are_reported(config):
    model = SSLAMForAudioClassification(config)
    torch.nn.init.constant_(model.classifier.dense.bias, torch.inf)
    for flag in (False, True):
        with pytest.raises(InferenceError, match="scores are NaN or infinite"):
            SSLAMTagger(model, extractor(), compile=flag).tag(SOUND)


@pytest.mark.parametrize("load", [SSLAMTagger.from_pretrained, Embedder.from_pretrained])
def test_int8_is_refused(model_folder, load):
    with pytest.raises(InferenceError, match="int8 cannot be compiled"):
        load(model_folder, "cpu", "int8", compile=True)


def test_packed_blocks_are_refused(config):
    classifier, model = SSLAMForAudioClassification(config), SSLAMModel(config)
    for body in (classifier.sslam, model):
        body.encoder = PackedEncoder(body.encoder, "float32")
    with pytest.raises(InferenceError, match=r"optimised for CPUs \(float32\) cannot be compiled"):
        SSLAMTagger(classifier, extractor(), compile=True)
    with pytest.raises(InferenceError, match="cannot be compiled"):
        Embedder(model, extractor(), compile=True)


@pytest.mark.usefixtures("_without_inductor")
def test_from_pretrained_compiles(model_folder):
    tagger = SSLAMTagger.from_pretrained(model_folder, "cpu", batch_size=1, compile=True)
    embedder = Embedder.from_pretrained(model_folder, "cpu", batch_size=1, compile=True)
    plain = SSLAMTagger.from_pretrained(model_folder, "cpu", batch_size=1)
    expected = plain.tag(SOUND, top_k=None)
    tags = {entry["label"]: entry["score"] for entry in tagger.tag(SOUND, top_k=None)}
    assert [tags[entry["label"]] for entry in expected] == pytest.approx([e["score"] for e in expected], abs=1e-5)
    list(embed(SOUND, embedder))
    assert num_graphs() == 2

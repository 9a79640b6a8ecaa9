"""Habits of transformers' own models on which its Trainer and data collators, peft and torch's exporters rely."""

import copy
import io

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.utils.tensorboard import SummaryWriter
from transformers import AutoModelForAudioClassification, DataCollatorWithPadding

from modeling_sslam import (
    SSLAMConfig,
    SSLAMFeatureExtractor,
    SSLAMForAudioClassification,
    SSLAMForPreTraining,
    SSLAMModel,
    onednn_sslam,
)
from modeling_sslam.inference.packed_blocks import PackedEncoder
from modeling_sslam.modeling_sslam import linear_softmax_pooling, selected_hidden_states
from modeling_sslam.onednn_sslam import use_onednn

MODELS = [SSLAMModel, SSLAMForAudioClassification, SSLAMForPreTraining]
# Frames of the tiny configuration's clips: 4 time patches of 2 mel patches each.
FRAMES, MEL_BINS = 64, 32


@pytest.fixture
def extractor() -> SSLAMFeatureExtractor:
    return SSLAMFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS)


@pytest.fixture
def waveforms() -> list[np.ndarray]:
    """Return clips of 18, 33 and 48 frames."""
    generator = np.random.default_rng(0)
    return [0.1 * generator.standard_normal(400 + 160 * (n - 1)).astype(np.float32) for n in (18, 33, 48)]


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Return two clips. The second is padded."""
    mask = torch.ones(2, FRAMES, dtype=torch.long)
    mask[1, 20:] = 0
    return {"input_values": torch.randn(2, FRAMES, MEL_BINS), "attention_mask": mask}


def one_by_one(extractor, waveforms, **options) -> list[dict]:
    """Return the features of each clip alone, as a mapped dataset holds them."""
    each = [extractor(x, sampling_rate=16_000, padding="longest", **options) for x in waveforms]
    return [{name: values[0] for name, values in features.items()} for features in each]


class TestPadding:
    @pytest.mark.parametrize("tensors", [None, "np", "pt"])
    @pytest.mark.parametrize("settings", [{}, {"do_normalize": False}, {"padding_value": -3.0, "mean": 1.0}])
    def test_pad_equals_the_extractors_padding(self, waveforms, tensors, settings):
        extractor = SSLAMFeatureExtractor(max_length=FRAMES, num_mel_bins=MEL_BINS, **settings)
        expected = extractor(waveforms, sampling_rate=16_000, padding="longest", return_tensors="pt")
        features = one_by_one(extractor, waveforms, return_tensors=tensors)
        together = {name: [clip[name] for clip in features] for name in features[0]}
        lists = [{name: value.tolist() for name, value in clip.items()} for clip in features]
        for given in (features, together, lists):
            before = [[*clip] for clip in given]
            padded = extractor.pad(given, return_tensors="pt")
            assert torch.equal(padded["attention_mask"], expected["attention_mask"])
            torch.testing.assert_close(padded["input_values"], expected["input_values"], rtol=1e-5, atol=1e-5)
            is_padding = expected["attention_mask"] == 0
            # Rows from 18 to 48 are padding. The extractor had filled the rows up to 32 itself.
            assert torch.equal(padded["input_values"][is_padding], expected["input_values"][is_padding])
            assert padded["input_values"].dtype == torch.float32
            assert [[*clip] for clip in given] == before
        by_default = extractor.pad(features)["input_values"]
        assert isinstance(by_default, torch.Tensor if tensors == "pt" else np.ndarray)

    @pytest.mark.parametrize(
        ("options", "length"),
        [
            ({}, 48),
            ({"padding": "longest", "pad_to_multiple_of": 10}, 80),
            ({"pad_to_multiple_of": 8}, 48),
            ({"padding": "max_length"}, FRAMES),
            ({"padding": "max_length", "max_length": 100}, 112),
            ({"padding": "max_length", "max_length": 32, "truncation": True}, 32),
            ({"truncation": True, "max_length": 40}, 48),
        ],
    )
    @pytest.mark.parametrize("tensors", ["np", "pt"])
    def test_lengths_are_whole_patches(self, extractor, waveforms, options, length, tensors):
        features = one_by_one(extractor, waveforms)
        padded = extractor.pad(features, return_tensors=tensors, **options)
        assert padded["input_values"].shape == (3, length, MEL_BINS)
        limit = options.get("max_length", length) if options.get("truncation") else length
        assert padded["attention_mask"].sum(1).tolist() == [min(n, limit) for n in (18, 33, 48)]
        value = np.float32(-extractor.mean / (2 * extractor.std))
        assert np.allclose(padded["input_values"][0, 18:], value, rtol=1e-6)

    def test_missing_mask(self, extractor, waveforms):
        features = one_by_one(extractor, waveforms, return_attention_mask=False)
        assert "attention_mask" not in features[0]
        padded = extractor.pad(features)
        assert padded["attention_mask"].sum(1).tolist() == [32, 48, 48]  # whole patches that the extractor had filled
        assert "attention_mask" not in extractor.pad(features, return_attention_mask=False)
        # As in `__call__`: the published models attend to the padding of clips of their own length.
        assert "attention_mask" not in extractor.pad(features, padding="max_length")
        assert "attention_mask" in extractor.pad(features, padding="max_length", return_attention_mask=True)
        with_mask = one_by_one(extractor, waveforms)
        assert "attention_mask" in extractor.pad(with_mask, padding="max_length")
        assert "attention_mask" not in extractor.pad(with_mask, return_attention_mask=False)

    def test_batches_of_one(self, extractor, waveforms):
        """`dataset.map` without batches keeps the axis."""
        features = [dict(extractor(x, sampling_rate=16_000, padding="longest")) for x in waveforms]
        expected = extractor.pad(one_by_one(extractor, waveforms), return_tensors="pt")
        padded = extractor.pad(features, return_tensors="pt")
        assert torch.equal(padded["input_values"], expected["input_values"])
        assert torch.equal(padded["attention_mask"], expected["attention_mask"])

    def test_without_padding(self, extractor, waveforms):
        padded = extractor.pad(one_by_one(extractor, waveforms[:1]), padding=False, return_tensors="pt")
        assert padded["input_values"].shape == (1, 32, MEL_BINS)

    @pytest.mark.parametrize(
        ("features", "options", "sentence"),
        [
            ([], {}, "no input_values to pad; it has no clips"),
            ([{"labels": 1}], {}, "no input_values to pad; it has labels"),
            (
                [{"input_values": np.zeros(1600)}],
                {},
                r"clip 0 have shape \(1600,\); `pad` takes \(T, 32\)",
            ),
            ([{"input_values": np.zeros((16, 128))}], {}, r"shape \(16, 128\)"),
            ({"input_values": np.zeros((16, MEL_BINS))}, {}, r"shape \(32,\)"),
            (
                [{"input_values": np.zeros((80, MEL_BINS))}],
                {"padding": "max_length"},
                "80 frames, more than",
            ),
        ],
    )
    def test_refuses_other_features(self, extractor, features, options, sentence):
        with pytest.raises(ValueError, match=sentence):
            extractor.pad(features, **options)

    @pytest.mark.parametrize("labels", ["single", "several"])
    def test_data_collator_and_trainer(self, make_config, extractor, waveforms, tmp_path, labels):
        targets = [0, 2, 1] if labels == "single" else np.eye(3).tolist()
        dataset = [
            {**clip, "labels": target} for clip, target in zip(one_by_one(extractor, waveforms), targets, strict=True)
        ]
        collated = DataCollatorWithPadding(extractor)(copy.deepcopy(dataset))
        assert collated["input_values"].shape == (3, 48, MEL_BINS)
        assert collated["labels"].tolist() == targets
        model = SSLAMForAudioClassification(make_config(num_labels=3))
        expected = model.eval()(**collated).loss.item()
        losses = trained_losses(model, dataset, tmp_path, extractor, per_device_train_batch_size=3)
        assert losses == [pytest.approx(expected, abs=1e-5)]


def trained_losses(model, dataset, folder, extractor, **settings) -> list[float]:
    """Train for one epoch without shuffling and return the losses that are logged."""
    # Imported here, because it imports datasets, which needs a newer Hub client than an older transformers has.
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        learning_rate=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model, arguments, train_dataset=dataset, processing_class=extractor)
    trainer._get_train_sampler = lambda *args: torch.utils.data.SequentialSampler(dataset)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class TestArguments:
    @pytest.mark.parametrize("cls", MODELS)
    def test_arguments_of_peft(self, make_config, batch, cls):
        """peft passes these arguments to any model that it wraps."""
        options = {"input_ids": None, "inputs_embeds": None, "task_ids": None, "head_mask": None}
        model = cls(make_config()).eval()
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
        torch.manual_seed(1)
        expected = model(batch["input_values"])[0]
        torch.manual_seed(1)
        actual = model(**batch, **options, output_attentions=None, output_hidden_states=None, return_dict=True)[0]
        assert torch.equal(actual, expected)

    @pytest.mark.parametrize("cls", MODELS[:2])
    def test_adapter_around_the_model_trains(self, make_config, batch, cls):
        """Low-rank adapters replace linear layers, as peft inserts them."""

        class Adapter(nn.Module):
            def __init__(self, base_layer: nn.Linear) -> None:
                super().__init__()
                self.base_layer = base_layer.requires_grad_(False)
                self.down = nn.Linear(base_layer.in_features, 2, bias=False)
                self.up = nn.Linear(2, base_layer.out_features, bias=False)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.base_layer(x) + self.up(self.down(x))

        model = cls(make_config(num_labels=3)).requires_grad_(False)
        for layer in getattr(model, "sslam", model).encoder.layers:
            layer.attention.qkv = Adapter(layer.attention.qkv)
            layer.mlp.fc1 = Adapter(layer.mlp.fc1)
        labels = {} if cls is SSLAMModel else {"labels": torch.tensor([0, 2])}
        outputs = model(input_ids=None, inputs_embeds=None, **batch, **labels)
        (outputs[0].square().mean() if cls is SSLAMModel else outputs.loss).backward()
        for name, parameter in model.named_parameters():
            is_adapter = ".up." in name or ".down." in name
            assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == is_adapter, name

    def test_number_of_items_divides_the_loss_of_single_labels(self, make_config, batch):
        model = SSLAMForAudioClassification(make_config(num_labels=3)).eval()
        labels = torch.tensor([0, 2])
        mean, total = (model(**batch, labels=labels, num_items_in_batch=n).loss for n in (None, torch.tensor(8)))
        torch.testing.assert_close(total, mean * 2 / 8)

    @pytest.mark.parametrize("targets", [[0, 2, 1, 1], [[1.0, 0, 0], [0, 1.0, 1.0], [0, 0, 0], [1.0, 1.0, 1.0]]])
    def test_trainer_averages_over_accumulated_batches(self, make_config, extractor, tmp_path, targets):
        """Trainer takes the loss of a forward with `**kwargs` for divided already."""
        clips = torch.randn(4, 32, MEL_BINS).numpy()
        dataset = [{"input_values": x, "labels": y} for x, y in zip(clips, targets, strict=True)]
        model = SSLAMForAudioClassification(make_config(num_labels=3)).eval()
        loss = model(torch.from_numpy(clips), labels=torch.tensor(targets)).loss
        loss.backward()
        weight = model.classifier.dense.weight
        expected_gradient = weight.grad.clone()
        model.zero_grad()
        contributions = []
        hook = weight.register_hook(lambda gradient: contributions.append(gradient.clone()))
        options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_grad_norm": 0.0}
        losses = trained_losses(model, dataset, tmp_path, extractor, **options)
        hook.remove()
        assert losses == [pytest.approx(loss.item(), rel=1e-3)]
        assert len(contributions) == 4
        # Each of the four batches contributes a quarter of its own gradient.
        torch.testing.assert_close(sum(contributions), expected_gradient)

    def test_arguments_reach_the_attention_function(self, make_config, batch):
        """`is_causal` changes sdpa's result, so it must not get lost on the way."""
        model = SSLAMModel(make_config()).eval()
        inputs = {"input_values": batch["input_values"]}
        causal = model(**inputs, is_causal=True).last_hidden_state
        assert (causal - model(**inputs).last_hidden_state).abs().max() > 1e-2
        # Under a causal mask the CLS token sees itself alone.
        other = model(torch.randn_like(batch["input_values"]), is_causal=True).last_hidden_state
        torch.testing.assert_close(causal[:, 0], other[:, 0])

    def test_gradient_checkpointing_passes_arguments_on(self, make_config, batch):
        model = SSLAMModel(make_config()).train()
        expected = model(batch["input_values"], is_causal=True).last_hidden_state
        model.gradient_checkpointing_enable()
        actual = model(batch["input_values"], is_causal=True).last_hidden_state
        torch.testing.assert_close(actual, expected)
        actual.sum().backward()


class TestHiddenStates:
    @pytest.mark.parametrize(
        ("asked", "indices"),
        [
            (True, {0, 1, 2, 3}),
            ([0, -1], {0, 3}),
            ((1, 2), {1, 2}),
            (2, {2}),
            (1, {1}),
            (-4, {0}),
            ([7, -9, 3], {3}),
        ],
    )
    @pytest.mark.parametrize("cls", MODELS)
    def test_selection(self, make_config, batch, cls, asked, indices):
        model = cls(make_config(mask_noise_std=0.0)).eval()
        results = []
        for selection in (True, asked):
            torch.manual_seed(1)
            results.append(model(batch["input_values"], output_hidden_states=selection).hidden_states)
        every, selected = results
        assert len(selected) == len(every) == 4
        for index, (state, expected) in enumerate(zip(selected, every, strict=True)):
            assert (state is not None) == (index in indices)
            assert state is None or torch.equal(state, expected)

    @pytest.mark.parametrize("nothing", [False, None, 0, []])
    def test_nothing_selected(self, make_config, batch, nothing):
        assert "hidden_states" not in SSLAMModel(make_config())(batch["input_values"], output_hidden_states=nothing)
        assert selected_hidden_states(False, 4) == set()

    def test_config_selects(self, make_config, batch):
        model = SSLAMForAudioClassification(make_config()).eval()
        model.config.output_hidden_states = [-1]
        states = model(**batch).hidden_states
        assert [state is None for state in states] == [True, True, True, False]

    @pytest.mark.parametrize("objective", ["ua", "pma", "sslam"])
    def test_pretraining_returns_the_students_states(self, make_config, batch, objective):
        model = SSLAMForPreTraining(make_config(pretraining_objective=objective, mask_noise_std=0.0)).train()
        clips = batch["input_values"]
        outputs = [
            model(clips, generator=torch.Generator().manual_seed(1), **options)
            for options in ({}, {"output_hidden_states": True, "output_attentions": True})
        ]
        assert outputs[0].loss == outputs[1].loss
        assert "hidden_states" not in outputs[0]
        inputs = (2 if objective == "sslam" else 1) * len(clips) * model.config.num_clones
        assert [x.shape for x in outputs[1].hidden_states] == [(inputs, 2, 32)] * 4  # one of 8 patches is visible
        assert [x.shape for x in outputs[1].attentions] == [(inputs, 4, 2, 2)] * 3
        outputs[1].hidden_states[-1].sum().backward()
        assert model.sslam.encoder.cls_token.grad is not None

    @pytest.mark.parametrize("cls", MODELS)
    def test_gradients_of_states_and_attentions_are_kept(self, make_config, batch, cls):
        model = cls(make_config(attn_implementation="eager")).train()
        outputs = model(batch["input_values"], output_hidden_states=True, output_attentions=True)
        kept = [*outputs.hidden_states, *outputs.attentions]
        for tensor in kept:
            tensor.retain_grad()
        outputs[0].flatten().sum().backward()
        assert all(tensor.grad is not None and tensor.grad.isfinite().all() for tensor in kept)


class TestTraces:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("with_gradients", [True, False])
    @pytest.mark.parametrize("pooling", ["cls", "mean", "lin_softmax"])
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_traces_keep_the_mask_and_any_size(self, make_config, batch, attention, with_gradients, pooling):
        config = make_config(attn_implementation=attention, num_labels=3, classifier_pooling=pooling)
        model = SSLAMForAudioClassification(config).eval()
        model.config.return_dict = False
        frames, mask = batch["input_values"], batch["attention_mask"]
        with torch.set_grad_enabled(with_gradients):
            traced = torch.jit.trace(model, (frames, torch.ones_like(mask)))
            for inputs in (
                (frames, mask),
                (frames[:1, :32], mask[1:, :32]),
                (frames.repeat(3, 2, 1), mask.repeat(3, 2)),
            ):
                torch.testing.assert_close(traced(*inputs)[0], model(*inputs)[0], rtol=1e-5, atol=1e-5)
        loaded = io.BytesIO()
        torch.jit.save(traced, loaded)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_trace_of_a_model_with_onednn(self, make_config, batch, monkeypatch):
        monkeypatch.setattr(onednn_sslam, "ONEDNN_IS_FASTER", True)
        monkeypatch.setattr(onednn_sslam, "CONVOLVED_LENGTHS", range(1, 1000))
        monkeypatch.delenv("SSLAM_ONEDNN", raising=False)
        model = use_onednn(SSLAMModel(make_config()).eval())
        model.config.return_dict = False
        frames = batch["input_values"]
        with torch.no_grad():
            traced = torch.jit.trace(model, (frames,))
            for inputs in (frames, frames[:1, :32], frames.repeat(3, 1, 1)):
                torch.testing.assert_close(traced(inputs)[0], model(inputs)[0], rtol=1e-5, atol=1e-5)

    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
    def test_tensorboard(self, make_config, batch, tmp_path):
        model = SSLAMForAudioClassification(make_config()).eval()
        model.config.return_dict = False
        with SummaryWriter(tmp_path) as writer:
            writer.add_graph(model, tuple(batch.values()))
        assert any(path.stat().st_size > 1000 for path in tmp_path.iterdir())

    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_onnx_by_tracing(self, make_config, batch, attention):
        model = SSLAMForAudioClassification(make_config(num_labels=3, attn_implementation=attention)).eval()
        model.config.return_dict = False
        file = io.BytesIO()
        frames, mask = batch["input_values"], batch["attention_mask"]
        names = ["input_values", "attention_mask"]
        axes = {name: {0: "batch", 1: "time"} for name in names}
        torch.onnx.export(
            model, (frames, torch.ones_like(mask)), file, input_names=names, dynamic_axes=axes, dynamo=False
        )
        session = onnxruntime.InferenceSession(file.getvalue())
        # The exporter makes constants of the lengths in transformers' sdpa.
        other_length = 32 if attention == "eager" else FRAMES
        for inputs in ((frames, mask), (frames[:1, :other_length], mask[1:, :other_length])):
            found = session.run(None, {name: value.numpy() for name, value in zip(names, inputs, strict=True)})[0]
            np.testing.assert_allclose(found, model(*inputs)[0].detach().numpy(), rtol=1e-4, atol=1e-4)

    def test_pretraining_refuses_to_be_traced(self, make_config, batch):
        with pytest.raises(RuntimeError, match=r"a trace would freeze. Trace its encoder, `model.sslam`"):
            torch.jit.trace(SSLAMForPreTraining(make_config()), (batch["input_values"],))


class TestMasks:
    @pytest.mark.parametrize("pooling", ["cls", "mean", "lin_softmax"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_clip_that_is_all_padding(self, make_config, batch, pooling, dtype, attention):
        config = make_config(classifier_pooling=pooling, num_labels=3, attn_implementation=attention)
        model = SSLAMForAudioClassification(config).to(dtype).eval()
        nn.init.normal_(model.classifier.layernorm.bias)
        frames, mask = batch["input_values"], batch["attention_mask"]
        expected = model(frames, attention_mask=mask, labels=torch.tensor([0, 1])).logits
        frames, mask = torch.cat((frames, frames[:1])), torch.cat((mask, torch.zeros_like(mask[:1])))
        outputs = model(frames, attention_mask=mask, labels=torch.tensor([0, 1, 2]), output_hidden_states=True)
        # The clip does not change the results of the others. Its own result does not depend on the padding's values.
        torch.testing.assert_close(outputs.logits[:2], expected, rtol=1e-5, atol=1e-5)
        other = model(torch.cat((frames[:2], 5 * frames[:1])), attention_mask=mask).logits
        torch.testing.assert_close(outputs.logits[2], other[2], rtol=0, atol=0)
        if pooling != "cls":
            head = model.classifier
            torch.testing.assert_close(outputs.logits[2], head.dense(head.layernorm.bias), rtol=1e-2, atol=1e-2)
        assert all(states.isfinite().all() for states in outputs.hidden_states)
        outputs.loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())

    def test_linear_softmax_of_no_patches(self):
        states = torch.randn(2, 5, 3).requires_grad_()
        mask = torch.tensor([[True, False, True, True, False], [False] * 5])
        pooled = linear_softmax_pooling(states, mask)
        assert torch.equal(pooled[0], linear_softmax_pooling(states[:1], mask[:1])[0])
        assert pooled[1].tolist() == [0.0] * 3
        pooled.sum().backward()
        assert states.grad.isfinite().all()
        assert states.grad[1].eq(0).all()

    @pytest.mark.parametrize("seconds", [0.64, 0.61])  # 61 and 59 frames, padded to 64 within the last patch
    def test_pretraining_takes_what_the_extractor_returns(self, make_config, extractor, seconds):
        waveforms = torch.randn(3, round(16_000 * seconds)).mul(0.1)
        features = extractor(waveforms, sampling_rate=16_000, padding="longest", return_tensors="pt")
        assert features["attention_mask"].shape == (3, FRAMES)
        model = SSLAMForPreTraining(make_config(mask_noise_std=0.0))
        losses = [
            model(**inputs, generator=torch.Generator().manual_seed(0)).loss
            for inputs in (features, {"input_values": features["input_values"]})
        ]
        assert losses[0] == losses[1]

    @pytest.mark.parametrize("objective", ["ua", "sslam"])
    def test_pretraining_refuses_padded_clips(self, make_config, extractor, objective):
        waveforms = [torch.randn(n).mul(0.1) for n in (10_240, 6_000, 10_240)]
        features = extractor(waveforms, sampling_rate=16_000, padding="longest", return_tensors="pt")
        model = SSLAMForPreTraining(make_config(pretraining_objective=objective))
        with pytest.raises(ValueError, match=r"1 of 3 clips are padded by whole patches.*Cut the clips to one length"):
            model(**features)
        with pytest.raises(ValueError, match=r"attention_mask has shape \(3, 4\).*must be \(3, 64\)"):
            model(features["input_values"], attention_mask=torch.ones(3, 4))


class TestLabels:
    @pytest.mark.parametrize(
        ("problem_type", "labels", "sentence"),
        [
            (
                "multi_label_classification",
                torch.tensor([1, 2]),
                r'needs \(2, 3\)..For one label a clip set problem_type="single_label',
            ),
            ("multi_label_classification", torch.ones(2, 4), r"shape \(2, 4\).* with 3 labels needs \(2, 3\)"),
            ("regression", torch.tensor([0.5, 1.0]), r"problem_type='regression' with 3 labels needs \(2, 3\)"),
            (
                "single_label_classification",
                torch.ones(2, 3),
                r'needs \(2,\)..For several labels a clip set problem_type="multi_label',
            ),
            (
                None,
                torch.ones(2, 3, dtype=torch.long),
                r'needs \(2,\)..For several labels a clip set problem_type="multi_label',
            ),
            (None, torch.tensor([0.0, 1.0]), r'needs \(2, 3\)..For one label a clip set problem_type="single_label'),
        ],
    )
    def test_labels_of_another_kind_are_refused(self, make_config, batch, problem_type, labels, sentence):
        model = SSLAMForAudioClassification(make_config(num_labels=3, problem_type=problem_type))
        with pytest.raises(ValueError, match=sentence):
            model(**batch, labels=labels)

    def test_new_head_on_a_multi_label_checkpoint(self, make_config, batch, tmp_path):
        config = make_config(num_labels=3, problem_type="multi_label_classification")
        SSLAMForAudioClassification(config).save_pretrained(tmp_path)
        options = {"num_labels": 10, "ignore_mismatched_sizes": True}
        model = SSLAMForAudioClassification.from_pretrained(tmp_path, **options)
        labels = torch.tensor([3, 9])
        with pytest.raises(ValueError, match=r'problem_type="single_label_classification" in `from_pretrained`'):
            model(**batch, labels=labels)
        options["problem_type"] = "single_label_classification"
        model = SSLAMForAudioClassification.from_pretrained(tmp_path, **options).eval()
        outputs = model(**batch, labels=labels)
        torch.testing.assert_close(outputs.loss, nn.functional.cross_entropy(outputs.logits, labels))

    def test_shapes_that_transformers_takes(self, make_config, batch):
        single = SSLAMForAudioClassification(make_config(num_labels=3))
        assert single(**batch, labels=torch.tensor([[0], [2]])).loss.isfinite()
        value = SSLAMForAudioClassification(make_config(num_labels=1))
        assert value(**batch, labels=torch.tensor([[0.5], [2.0]])).loss.isfinite()
        assert value(**batch, labels=torch.tensor([0.5, 2.0])).loss.isfinite()


class TestFields:
    @pytest.mark.parametrize("value", [True, "3", None, [3], float("inf"), float("nan"), {}, b"1"])
    @pytest.mark.parametrize(
        "field", [name for name, kind in SSLAMConfig.__annotations__.items() if kind in (int, float, int | None)]
    )
    def test_numbers(self, field, value):
        if value is None and SSLAMConfig.__annotations__[field] == int | None:
            return
        with pytest.raises(ValueError, match=f"SSLAMConfig: {field}="):
            SSLAMConfig(**{field: value})

    @pytest.mark.parametrize("value", ["no", "false", 1, 0, None, 1.0])
    def test_flags(self, value):
        with pytest.raises(ValueError, match=f"qkv_bias={value!r} must be True or False"):
            SSLAMConfig(qkv_bias=value)

    @pytest.mark.parametrize("value", [True, 1, None, ["gelu"]])
    @pytest.mark.parametrize("field", ["hidden_act", "classifier_pooling", "pretraining_objective"])
    def test_names(self, field, value):
        with pytest.raises(ValueError, match=f"SSLAMConfig: {field}="):
            SSLAMConfig(**{field: value})


class TestModules:
    @pytest.mark.parametrize("cls", MODELS)
    def test_input_embeddings(self, make_config, batch, cls):
        model = cls(make_config()).eval()
        embeddings = copy.deepcopy(model.get_input_embeddings())
        nn.init.zeros_(embeddings.projection.weight)
        model.set_input_embeddings(embeddings)
        assert model.get_input_embeddings() is embeddings
        assert getattr(model, "sslam", model).patch_embeddings is embeddings
        model(batch["input_values"])[0].flatten()[0].backward()
        assert embeddings.projection.weight.grad is not None

    @pytest.mark.parametrize("cls", MODELS)
    def test_dynamic_quantisation_reaches_every_linear_layer(self, make_config, tmp_path, cls):
        cls(make_config()).save_pretrained(tmp_path)
        model = cls.from_pretrained(tmp_path)
        names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
        assert not any(isinstance(module, nn.Linear) for module in quantized.modules())
        for name in names:
            assert quantized.get_submodule(name)._get_name() == "DynamicQuantizedLinear"

    @pytest.mark.parametrize("inplace", [True, False])
    def test_dynamic_quantisation_refuses_a_model_with_onednn(self, make_config, monkeypatch, inplace):
        monkeypatch.setattr(onednn_sslam, "ONEDNN_IS_FASTER", True)
        monkeypatch.delenv("SSLAM_ONEDNN", raising=False)
        model = use_onednn(SSLAMForAudioClassification(make_config()))
        with pytest.raises(TypeError, match=r"exactly nn.Linear.*without `use_onednn`"):
            torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=inplace)
        assert not hasattr(model.classifier.dense, "qconfig")

    @pytest.mark.parametrize("cls", MODELS)
    def test_half(self, make_config, batch, cls):
        outputs = cls(make_config()).half()(batch["input_values"].half(), output_hidden_states=True)
        assert outputs[0].isfinite().all()
        assert outputs.hidden_states[-1].dtype == torch.float16

    def test_whole_model_survives_torch_save(self, make_config, batch):
        model = SSLAMForAudioClassification(make_config()).eval()
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)

    def test_class_derived_from_the_registered_one(self, make_config, tmp_path, batch):
        """transformers' `test_torch_save_load` derives such a class."""
        registered = AutoModelForAudioClassification._model_mapping[SSLAMConfig]
        assert registered is SSLAMForAudioClassification

        class Derived(registered):
            pass

        model = Derived(make_config()).eval()
        model.save_pretrained(tmp_path)
        assert torch.equal(Derived.from_pretrained(tmp_path)(**batch).logits, model(**batch).logits)

    def test_registered_twice(self, make_config):
        AutoModelForAudioClassification.register(SSLAMConfig, SSLAMForAudioClassification)
        model = AutoModelForAudioClassification.from_config(make_config())
        assert type(model) is SSLAMForAudioClassification

    def test_packed_blocks_take_the_same_arguments(self, make_config, batch):
        model = SSLAMModel(make_config()).eval()
        every = model(**batch, output_hidden_states=True).hidden_states
        model.encoder = PackedEncoder(model.encoder, "float32")
        selected = model(**batch, output_hidden_states=[0, -1], input_ids=None).hidden_states
        assert [state is None for state in selected] == [False, True, True, False]
        for index in (0, -1):
            torch.testing.assert_close(selected[index], every[index], rtol=1e-5, atol=1e-5)

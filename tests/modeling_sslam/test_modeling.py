"""Encoder and classifier: parity with the published code, and the habits of transformers' models."""

import copy
import pickle
import warnings

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from modeling_sslam import SSLAMForAudioClassification, SSLAMModel
from modeling_sslam.modeling_sslam import drop_path, linear_softmax_pooling, sincos_position_table

CLASSES = [SSLAMModel, SSLAMForAudioClassification]
POOLINGS = ["cls", "mean", "lin_softmax"]
# A clip of the tiny configuration has 3 time patches and 2 mel patches, so 6 patches and the CLS token.
FRAMES, TOKENS = 48, 7
# The agreement with the golden vectors that their README asks for.
GOLDEN = 1e-5
# Rounding of a result that is computed in another order. States come from a LayerNorm over 32 channels, so they are at
# most sqrt(32) in size, where a unit in the last place of float32 is 2^-21. Three blocks may add up 20 of these.
ROUNDING = 20 * 2.0**-21


def make_inputs(batch_size: int = 2, frames: int = FRAMES, num_mel_bins: int = 32) -> torch.Tensor:
    return torch.randn(batch_size, frames, num_mel_bins, generator=torch.Generator().manual_seed(1))


def padded_batch() -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Return clips of 48, 16 and 20 frames (the last ends inside a patch), the batch of them and its mask."""
    clips = [make_inputs(1, frames) for frames in (48, 16, 32)]
    batch = torch.full((3, FRAMES, 32), 7.0)
    mask = torch.zeros(3, FRAMES, dtype=torch.long)
    for i, (clip, num_frames) in enumerate(zip(clips, (48, 16, 20), strict=True)):
        batch[i, : clip.shape[1]] = clip[0]
        mask[i, :num_frames] = 1
    return clips, batch, mask


def assert_same_outputs(actual, expected, atol: float = ROUNDING) -> None:
    for first, second in zip(actual.to_tuple(), expected.to_tuple(), strict=True):
        torch.testing.assert_close(first, second, atol=atol, rtol=0)


def assert_rounds_in(dtype: torch.dtype, actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare up to the rounding of three blocks, each of about ten results in a row by at most `eps` / 2."""
    distance = (actual.float() - expected).norm() / expected.norm()
    assert distance <= 3 * 10 * torch.finfo(dtype).eps / 2


class TestParity:
    def test_positions(self, load_published, parity):
        model, positions = load_published("hub_pretrained")
        ours = model.sslam.patch_embeddings.position_embeddings
        assert ours.shape == positions.shape[1:]
        parity("position table", (ours - positions[0]).abs().max(), 0.0)

    @pytest.mark.parametrize("frames", [16, 304, 512, 1024, 1536])
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_encoder(self, load_published, parity, golden_dir, frames, attention):
        model, _ = load_published("hub_pretrained", attn_implementation=attention)
        golden = load_file(golden_dir / "encoder.safetensors")
        with torch.no_grad():
            states = model.sslam(golden[f"input_{frames}"].float()).last_hidden_state
        error = (states - golden[f"last_hidden_state_{frames}"]).abs().max()
        parity(f"encoder, {frames} frames, {attention}", error, GOLDEN)

    def test_ffn_outputs(self, load_published, parity, golden_dir):
        encoder = load_published("hub_pretrained")[0].sslam
        golden = load_file(golden_dir / "encoder.safetensors")
        with torch.no_grad():
            patches = encoder.patch_embeddings(golden["input_512"].float())
            outputs = encoder.encoder(patches, output_ffn=True).ffn_outputs
        for i, output in enumerate(outputs):
            parity(f"FFN output of block {i}", (output - golden[f"ffn_output_512_{i}"]).abs().max(), GOLDEN)

    @pytest.mark.parametrize("frames", [512, 1024])
    @pytest.mark.parametrize(("pooling", "name"), [("cls", "logits"), ("mean", "logits_meanpool")])
    def test_classifier(self, load_published, parity, golden_dir, frames, pooling, name):
        model, _ = load_published("hub_finetuned", classifier_pooling=pooling)
        golden = load_file(golden_dir / "classifier.safetensors")
        with torch.no_grad():
            logits = model(golden[f"input_{frames}"].float()).logits
        error = (logits - golden[f"{name}_{frames}"]).abs().max()
        parity(f"classifier, {frames} frames, {pooling} pooling", error, GOLDEN)


class TestPositions:
    def test_closed_form(self, make_config):
        config = make_config()
        table = sincos_position_table(config).double().unflatten(0, (config.max_position_embeddings, 2))
        omega = 10_000.0 ** -(torch.arange(8, dtype=torch.float64) / 8)
        for time, mel in ((0, 0), (0, 1), (5, 0), (7, 1)):
            expected = torch.cat([f(p * omega) for p in (mel, time) for f in (torch.sin, torch.cos)])
            # Angles are at most 7. Both the frequency and the angle are rounded: 7 * 2^-23 = 8e-7.
            torch.testing.assert_close(table[time, mel], expected, atol=1e-6, rtol=0)

    def test_positions_are_no_weights(self, tiny_config):
        model = SSLAMModel(tiny_config)
        assert not any("position" in name for name in model.state_dict())
        assert not model.patch_embeddings.position_embeddings.requires_grad

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        "options", [{}, {"device_map": "cpu"}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}]
    )
    def test_positions_survive_loading_through_the_meta_device(self, tmp_path, tiny_config, dtype, options):
        SSLAMForAudioClassification(tiny_config).save_pretrained(tmp_path)
        for cls, prefix in ((SSLAMForAudioClassification, "sslam."), (SSLAMModel, "")):
            model = cls.from_pretrained(tmp_path, dtype=dtype, **options)
            positions = model.get_buffer(f"{prefix}patch_embeddings.position_embeddings")
            assert torch.equal(positions.to(dtype), sincos_position_table(tiny_config).to(dtype))
            assert model(make_inputs())[0].dtype == dtype


class TestShapes:
    def test_outputs(self, tiny_config):
        model = SSLAMModel(tiny_config).eval()
        outputs = model(make_inputs(), output_hidden_states=True, output_attentions=True)
        assert outputs.last_hidden_state.shape == (2, TOKENS, 32)
        assert torch.equal(outputs.pooler_output, outputs.last_hidden_state[:, 0])
        assert [states.shape for states in outputs.hidden_states] == [(2, TOKENS, 32)] * 4
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
        assert [weights.shape for weights in outputs.attentions] == [(2, 4, TOKENS, TOKENS)] * 3
        for weights in outputs.attentions:
            torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, TOKENS))

    def test_only_what_was_asked_for(self, tiny_config):
        for cls in CLASSES:
            outputs = cls(tiny_config).eval()(make_inputs())
            assert "hidden_states" not in outputs
            assert "attentions" not in outputs

    @pytest.mark.parametrize("cls", CLASSES)
    def test_config_asks(self, make_config, cls):
        asking = make_config(output_hidden_states=True, output_attentions=True)
        outputs = cls(asking).eval()(make_inputs())
        assert len(outputs.hidden_states) == 4
        assert len(outputs.attentions) == 3
        outputs = cls(asking).eval()(make_inputs(), output_hidden_states=False, output_attentions=False)
        assert "hidden_states" not in outputs
        assert "attentions" not in outputs

    @pytest.mark.parametrize("cls", CLASSES)
    def test_return_dict(self, make_config, cls):
        model = cls(make_config(num_labels=3)).eval()
        expected = model(make_inputs(), output_hidden_states=True)
        for actual in (
            model(make_inputs(), output_hidden_states=True, return_dict=False),
            copy.deepcopy(model)(make_inputs(), output_hidden_states=True, return_dict=False),
        ):
            assert isinstance(actual, tuple)
            assert len(actual) == len(expected.to_tuple())
            torch.testing.assert_close(actual, expected.to_tuple())
        model.config.return_dict = False
        assert isinstance(model(make_inputs()), tuple)

    def test_published_interface_with_a_channel(self, tiny_config):
        model = SSLAMModel(tiny_config).eval()
        assert_same_outputs(model(make_inputs()[:, None]), model(make_inputs()), atol=0)

    def test_patch_grid_and_frame_features(self, tiny_config):
        model = SSLAMModel(tiny_config).eval()
        states = model(make_inputs()).last_hidden_state
        grid = model.patch_grid(states)
        assert grid.shape == (2, 3, 2, 32)
        assert torch.equal(grid[:, 2, 1], states[:, 1 + 2 * 2 + 1])
        assert model.frame_features(states).shape == (2, 3, 32)
        torch.testing.assert_close(model.frame_features(states)[:, 1], (grid[:, 1, 0] + grid[:, 1, 1]) / 2)

    def test_patches_are_time_major(self, make_config):
        embeddings = SSLAMModel(make_config()).patch_embeddings
        for time, mel in ((0, 0), (1, 0), (2, 1)):
            inputs = torch.zeros(1, FRAMES, 32)
            inputs[:, 16 * time : 16 * time + 16, 16 * mel : 16 * mel + 16] = 1.0
            changed = (embeddings(inputs) - embeddings(torch.zeros(1, FRAMES, 32))).abs().sum(-1)[0]
            assert changed.nonzero().flatten().tolist() == [2 * time + mel]

    @pytest.mark.parametrize("frames", [16, 32, 128])
    def test_any_length_up_to_the_position_table(self, tiny_config, frames):
        assert SSLAMModel(tiny_config).eval()(make_inputs(1, frames)).last_hidden_state.shape == (
            1,
            1 + frames // 8,
            32,
        )

    @pytest.mark.parametrize(
        ("shape", "sentence"),
        [
            ((1, 40, 32), "T=40 frames; T must be a multiple of 16, at most 128"),
            ((1, 144, 32), "T=144 frames; T must be a multiple of 16, at most 128"),
            ((1, 0, 32), "T=0 frames"),
            ((1, 32, 48), r"shape \(1, 32, 48\); this model takes \(batch_size, T, 32\)"),
            ((1, 2, 32, 32), r"shape \(1, 2, 32, 32\); this model takes"),
            ((32, 32), r"shape \(32, 32\); this model takes"),
        ],
    )
    def test_refuses_other_shapes(self, tiny_config, shape, sentence):
        for cls in CLASSES:
            with pytest.raises(ValueError, match=sentence):
                cls(tiny_config)(torch.zeros(shape))

    @pytest.mark.parametrize("shape", [(2, FRAMES // 16), (1, FRAMES), (2, FRAMES, 1), (2, FRAMES - 1)])
    def test_refuses_masks_of_another_shape(self, tiny_config, shape):
        for cls in CLASSES:
            with pytest.raises(ValueError, match=r"it masks frames, so for these input_values it must be \(2, 48\)"):
                cls(tiny_config)(make_inputs(), attention_mask=torch.ones(shape))


class TestAttention:
    @pytest.mark.slow
    def test_implementations_agree(self, tiny_config):
        model = SSLAMModel(tiny_config).eval()
        _, batch, mask = padded_batch()
        for attention_mask in (None, mask):
            model.set_attn_implementation("eager")
            expected = model(batch, attention_mask=attention_mask, output_hidden_states=True)
            for name in ("sdpa", "flex_attention"):
                model.set_attn_implementation(name)
                assert model.config._attn_implementation == name
                with torch.no_grad():  # on a CPU, flex attention has no backward pass
                    actual = model(batch, attention_mask=attention_mask, output_hidden_states=True)
                assert_same_outputs(actual, expected)

    @pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
    def test_uses_the_implementation_asked_for(self, tiny_config, tmp_path, monkeypatch, name):
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        import modeling_sslam.modeling_sslam as module

        used = []

        def spy(key):
            def forward(module, query, *args, **kwargs):
                used.append(key)
                return query.transpose(1, 2), None

            return forward

        monkeypatch.setattr(module, "eager_attention_forward", spy("eager"))
        monkeypatch.setattr(module, "ALL_ATTENTION_FUNCTIONS", {key: spy(key) for key in ALL_ATTENTION_FUNCTIONS})
        SSLAMForAudioClassification(tiny_config).save_pretrained(tmp_path)
        model = SSLAMForAudioClassification.from_pretrained(tmp_path, attn_implementation=name).eval()
        with torch.no_grad():
            model(make_inputs())
        assert used == [name] * 3

    def test_attentions_come_from_the_eager_implementation(self, tiny_config):
        model = SSLAMModel(tiny_config).eval()
        assert model.config._attn_implementation == "sdpa"
        _, batch, mask = padded_batch()
        outputs = model(batch, attention_mask=mask, output_attentions=True)
        by_sdpa = model(batch, attention_mask=mask)[0]
        model.set_attn_implementation("eager")
        assert_same_outputs(outputs, model(batch, attention_mask=mask, output_attentions=True), atol=0)
        torch.testing.assert_close(outputs[0], by_sdpa, atol=ROUNDING, rtol=0)
        for weights in outputs.attentions:
            assert weights[1, :, :, 3:].abs().max() == 0  # the second clip has 2 patches beside the CLS token
            assert weights[0, :, :, 3:].min() > 0

    def test_transformers_refuses_flash_attention(self, tiny_config, tmp_path):
        SSLAMModel(tiny_config).save_pretrained(tmp_path)
        with pytest.raises((ImportError, ValueError), match=r"FlashAttention2|Flash Attention 2"):
            SSLAMModel.from_pretrained(tmp_path, attn_implementation="flash_attention_2", dtype=torch.bfloat16)

    def test_flash_attention_gets_the_mask_of_tokens(self, tiny_config, monkeypatch):
        """Flash kernels take no mask when nothing is padded, else one of shape `(batch_size, length)`."""
        import modeling_sslam.modeling_sslam as module

        received = []

        def flash(module, query, key, value, attention_mask, **kwargs):
            received.append(attention_mask)
            assert query.shape == key.shape == value.shape == (3, 4, TOKENS, 8)
            assert kwargs["scaling"] == 8**-0.5
            assert module.is_causal is False
            return query.transpose(1, 2), None

        monkeypatch.setitem(module.ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
        model = SSLAMModel(tiny_config).eval()
        model.config._attn_implementation = "flash_attention_2"
        _, batch, mask = padded_batch()
        model(batch, attention_mask=mask)
        assert received[0].dtype == torch.bool
        assert received[0].tolist() == [[True] * 7, [True] * 3 + [False] * 4, [True] * 5 + [False] * 2]
        received.clear()
        model(batch, attention_mask=torch.ones_like(mask))
        model(batch)
        assert received == [None] * 6

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_batch_equals_single(self, make_config, pooling, attention):
        config = make_config(classifier_pooling=pooling, attn_implementation=attention, num_labels=3)
        model = SSLAMForAudioClassification(config).eval()
        clips, batch, mask = padded_batch()
        together = model(batch, attention_mask=mask, output_hidden_states=True)
        for i, clip in enumerate(clips):
            alone = model(clip, output_hidden_states=True)
            torch.testing.assert_close(together.logits[i], alone.logits[0], atol=ROUNDING, rtol=0)
            tokens = alone.hidden_states[-1].shape[1]
            for batched, single in zip(together.hidden_states, alone.hidden_states, strict=True):
                torch.testing.assert_close(batched[i, :tokens], single[0], atol=ROUNDING, rtol=0)

    def test_without_mask_padding_counts(self, tiny_config):
        model = SSLAMModel(tiny_config).eval()
        clips, batch, _ = padded_batch()
        assert (model(batch).pooler_output[1] - model(clips[1]).pooler_output[0]).abs().max() > 1e-2

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32])
    def test_mask_dtypes(self, tiny_config, dtype):
        model = SSLAMModel(tiny_config).eval()
        _, batch, mask = padded_batch()
        expected = model(batch, attention_mask=mask)
        assert_same_outputs(model(batch, attention_mask=mask.to(dtype)), expected, atol=0)


class TestSavingAndLoading:
    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_round_trip(self, tmp_path, make_config, cls, dtype, transformers_log):
        model = cls(make_config(num_labels=3)).to(dtype).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.save_pretrained(tmp_path)
            loaded = cls.from_pretrained(tmp_path, dtype="auto")
        assert not transformers_log.records
        assert loaded.dtype == dtype
        assert not loaded.training
        inputs = make_inputs().to(dtype)
        assert_same_outputs(loaded(inputs), model(inputs), atol=0)

    def test_encoder_of_a_classifier(self, tmp_path, tiny_config):
        classifier = SSLAMForAudioClassification(tiny_config).eval()
        classifier.save_pretrained(tmp_path)
        encoder, info = SSLAMModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not info["missing_keys"]
        assert all(key.startswith("classifier.") for key in info["unexpected_keys"])
        assert_same_outputs(encoder(make_inputs()), classifier.sslam(make_inputs()), atol=0)

    def test_classifier_on_an_encoder(self, tmp_path, make_config):
        encoder = SSLAMModel(make_config()).eval()
        encoder.save_pretrained(tmp_path)
        classifier, info = SSLAMForAudioClassification.from_pretrained(
            tmp_path, num_labels=5, output_loading_info=True
        )
        assert set(info["missing_keys"]) == {
            f"classifier.{name}" for name in ("layernorm.weight", "layernorm.bias", "dense.weight", "dense.bias")
        }
        assert_same_outputs(classifier.sslam(make_inputs()), encoder(make_inputs()), atol=0)
        assert torch.equal(classifier.classifier.layernorm.weight, torch.ones(32))
        assert classifier.classifier.dense.weight.std() > 0
        assert classifier(make_inputs()).logits.shape == (2, 5)

    def test_ignores_the_rest_of_a_pretraining_checkpoint(self, tmp_path, tiny_config, transformers_log):
        encoder = SSLAMModel(tiny_config).eval()
        student = {f"sslam.{name}": value for name, value in encoder.state_dict().items()}
        rest = {"decoder.projection.weight": torch.ones(32, 32), "teacher.encoder.cls_token": torch.ones(1, 1, 32)}
        encoder.save_pretrained(tmp_path, state_dict=student | rest)
        transformers_log.clear()
        loaded = SSLAMModel.from_pretrained(tmp_path)
        assert not transformers_log.records
        assert_same_outputs(loaded(make_inputs()), encoder(make_inputs()), atol=0)

    def test_other_labels(self, tmp_path, make_config):
        SSLAMForAudioClassification(make_config(num_labels=3)).save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="mismatch"):
            SSLAMForAudioClassification.from_pretrained(tmp_path, num_labels=4)
        model = SSLAMForAudioClassification.from_pretrained(tmp_path, num_labels=4, ignore_mismatched_sizes=True)
        assert model(make_inputs()).logits.shape == (2, 4)
        assert model.config.id2label[3] == "LABEL_3"
        assert model.classifier.dense.weight.isfinite().all()

    @pytest.mark.parametrize("cls", CLASSES)
    def test_deterministic(self, tiny_config, cls):
        model = cls(tiny_config).eval()
        assert_same_outputs(model(make_inputs()), model(make_inputs()), atol=0)

    @pytest.mark.parametrize("cls", CLASSES)
    def test_copies(self, tiny_config, cls):
        model = cls(tiny_config).eval()
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same_outputs(twin(make_inputs()), model(make_inputs()), atol=0)

    def test_offloaded_to_disk(self, tmp_path, tiny_config):
        """`device_map="auto"` puts blocks and loose parameters on different devices where memory is short."""
        model = SSLAMForAudioClassification(tiny_config).eval()
        model.save_pretrained(tmp_path)
        device_map = {
            "sslam.patch_embeddings": "cpu",
            "sslam.encoder.cls_token": "cpu",
            "sslam.encoder.layernorm": "disk",
            "sslam.encoder.layers.0": "cpu",
            "sslam.encoder.layers.1": "disk",
            "sslam.encoder.layers.2": "disk",
            "classifier": "cpu",
        }
        loaded = SSLAMForAudioClassification.from_pretrained(
            tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
        )
        assert_same_outputs(loaded(make_inputs()), model(make_inputs()))


class TestInitialisation:
    def test_statistics(self, make_config):
        config = make_config(hidden_size=128, intermediate_size=256, initializer_range=0.05)
        for cls in CLASSES:
            for name, parameter in cls(config).named_parameters():
                if "layernorm.weight" in name:
                    assert parameter.eq(1).all(), name
                elif name.endswith("bias"):
                    assert parameter.eq(0).all(), name
                elif parameter.numel() > 1000:
                    assert parameter.mean().abs() < 5e-3, name
                    assert parameter.std().item() == pytest.approx(0.05, rel=0.1), name
                else:
                    assert 0 < parameter.std() < 0.1, name

    def test_no_qkv_bias(self, make_config):
        model = SSLAMModel(make_config(qkv_bias=False))
        assert not any(name.endswith("qkv.bias") for name, _ in model.named_parameters())
        model(make_inputs())


def enable_checkpointing(model, use_reentrant: bool) -> None:
    # Transformers 5 renamed the method.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


class TestTraining:
    @pytest.mark.parametrize("use_reentrant", [True, False])
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_gradient_checkpointing_equals_plain(self, make_config, attention, use_reentrant):
        config = make_config(attn_implementation=attention, num_labels=3, drop_path_rate=0.3, hidden_dropout_prob=0.1)
        model = SSLAMForAudioClassification(config).train()
        _, batch, mask = padded_batch()

        def gradients() -> dict[str, torch.Tensor]:
            model.zero_grad()
            torch.manual_seed(3)
            outputs = model(batch, attention_mask=mask, labels=torch.tensor([0, 1, 2]), output_hidden_states=True)
            (outputs.loss + outputs.hidden_states[1].square().mean()).backward()
            return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

        plain = gradients()
        enable_checkpointing(model, use_reentrant)
        assert all(layer.gradient_checkpointing for layer in model.sslam.encoder.layers)
        torch.testing.assert_close(gradients(), plain)

    def test_gradient_checkpointing_of_a_frozen_encoder(self, make_config):
        """Adapters train this way: other blocks get no gradient unless the first block's input needs one."""
        model = SSLAMForAudioClassification(make_config()).train()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        adapter = model.sslam.encoder.layers[1].mlp.fc1.requires_grad_(True)
        enable_checkpointing(model, use_reentrant=True)
        model.enable_input_require_grads()
        model(make_inputs(), labels=torch.tensor([0, 1])).loss.backward()
        assert adapter.weight.grad.abs().max() > 0

    @pytest.mark.parametrize("pooling", POOLINGS)
    def test_every_parameter_gets_a_gradient(self, make_config, pooling):
        model = SSLAMForAudioClassification(make_config(classifier_pooling=pooling, num_labels=3)).train()
        model(make_inputs(), labels=torch.tensor([0, 2])).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    def test_drop_path_drops_whole_branches_and_keeps_the_expectation(self):
        branch = torch.ones(4000, 3, 2)
        assert drop_path(branch, 0.25, training=False) is branch
        assert drop_path(branch, 0.0, training=True) is branch
        dropped = drop_path(branch, 0.25, training=True)
        per_clip = dropped.flatten(1)
        assert torch.equal(per_clip.amin(1), per_clip.amax(1))
        assert set(per_clip[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        # Five standard errors: a clip's factor is 0 or 4/3, with variance 1/3.
        assert dropped.mean().item() == pytest.approx(1.0, abs=5 * (1 / 3 / 4000) ** 0.5)
        assert drop_path(branch, 1.0, training=True).eq(0).all()
        assert drop_path(branch.bfloat16(), 0.5, training=True).dtype == torch.bfloat16

    def test_drop_path_rates_grow_linearly(self, make_config):
        model = SSLAMModel(make_config(num_hidden_layers=5, drop_path_rate=0.2))
        assert [layer.drop_path_rate for layer in model.encoder.layers] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
        assert SSLAMModel(make_config(num_hidden_layers=1, drop_path_rate=0.2)).encoder.layers[0].drop_path_rate == 0

    def test_drop_path_and_dropout_act_in_training_only(self, make_config):
        for field in ("drop_path_rate", "hidden_dropout_prob", "attention_probs_dropout_prob"):
            for attention in ("eager", "sdpa"):
                model = SSLAMModel(make_config(attn_implementation=attention, **{field: 0.5}))
                inputs = make_inputs(8)
                assert_same_outputs(model.eval()(inputs), model(inputs), atol=0)
                model.train()
                assert (model(inputs)[0] - model(inputs)[0]).abs().max() > 1e-2, field


class TestLosses:
    def logits_and_loss(self, config, labels):
        model = SSLAMForAudioClassification(config).eval()
        outputs = model(make_inputs(4), labels=labels)
        outputs.loss.backward()
        assert torch.equal(outputs.logits, model(make_inputs(4)).logits)
        return outputs.logits, outputs.loss

    def test_single_label(self, make_config):
        labels = torch.tensor([0, 2, 1, 1])
        for problem_type in (None, "single_label_classification"):
            logits, loss = self.logits_and_loss(make_config(num_labels=3, problem_type=problem_type), labels)
            torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, labels))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.long, torch.bool])
    def test_multi_label(self, make_config, dtype):
        labels = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 0, 0], [1, 1, 1]], dtype=dtype)
        config = make_config(num_labels=3, problem_type="multi_label_classification")
        logits, loss = self.logits_and_loss(config, labels)
        torch.testing.assert_close(loss, nn.functional.binary_cross_entropy_with_logits(logits, labels.float()))

    def test_multi_label_by_the_labels_dtype(self, make_config):
        labels = torch.tensor([[0, 0.3, 1], [0, 0, 0], [1, 0, 0], [0.7, 1, 1]])
        logits, loss = self.logits_and_loss(make_config(num_labels=3), labels)
        torch.testing.assert_close(loss, nn.functional.binary_cross_entropy_with_logits(logits, labels))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.long])
    def test_regression(self, make_config, dtype):
        labels = torch.tensor([1, 2, -3, 0], dtype=dtype)
        for problem_type in (None, "regression"):
            logits, loss = self.logits_and_loss(make_config(num_labels=1, problem_type=problem_type), labels)
            torch.testing.assert_close(loss, (logits[:, 0] - labels.float()).square().mean())
        labels = labels[:, None].repeat(1, 3)
        logits, loss = self.logits_and_loss(make_config(num_labels=3, problem_type="regression"), labels)
        torch.testing.assert_close(loss, (logits - labels.float()).square().mean())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(
        "problem_type", ["multi_label_classification", "regression", "single_label_classification"]
    )
    def test_half_precision_with_float32_labels(self, make_config, dtype, problem_type):
        labels = torch.tensor([0, 1]) if problem_type == "single_label_classification" else torch.ones(2, 3)
        model = SSLAMForAudioClassification(make_config(num_labels=3, problem_type=problem_type)).to(dtype)
        model(make_inputs(), labels=labels).loss.backward()
        assert model.classifier.dense.weight.grad.isfinite().all()

    def test_first_output_of_a_tuple(self, make_config):
        model = SSLAMForAudioClassification(make_config(num_labels=3)).eval()
        loss, logits = model(make_inputs(), labels=torch.tensor([0, 1]), return_dict=False)
        assert loss.ndim == 0
        assert logits.shape == (2, 3)


class TestPooling:
    def test_linear_softmax(self):
        logits = torch.randn(2, 5, 3)
        p = logits.sigmoid()
        torch.testing.assert_close(linear_softmax_pooling(logits).sigmoid(), (p**2).sum(1) / p.sum(1))
        mask = torch.tensor([[True, True, False, True, False], [True] * 5])
        kept = p[0, mask[0]]
        pooled = linear_softmax_pooling(logits, mask).sigmoid()
        torch.testing.assert_close(pooled[0], (kept**2).sum(0) / kept.sum(0))

    def test_linear_softmax_of_extreme_logits_is_finite(self):
        logits = (
            torch.tensor([-1e4, -200.0, -50.0, 0.0, 50.0, 200.0, 1e4])[None, None].repeat(1, 4, 1).requires_grad_()
        )
        pooled = linear_softmax_pooling(logits)
        pooled.sum().backward()
        assert pooled.isfinite().all()
        assert logits.grad.isfinite().all()
        torch.testing.assert_close(pooled[0, :4], logits[0, 0, :4])
        # The margin of 1e-6 from a probability of 1 bounds the logit: -log(e^1e-6 - 1).
        torch.testing.assert_close(pooled[0, 4:], torch.full((3,), 13.8155101), atol=1e-4, rtol=0)

    def test_mean_counts_patches_exactly_in_half_precision(self, make_config):
        config = make_config(classifier_pooling="mean", num_labels=3, max_position_embeddings=512, max_length=8192)
        model = SSLAMForAudioClassification(config).eval()
        inputs = make_inputs(1, 16 * 300)
        expected = model(inputs).logits
        mask = torch.ones(1, 16 * 512)
        mask[:, 16 * 300 :] = 0
        padded = nn.functional.pad(inputs, (0, 0, 0, 16 * 212))
        actual = model.bfloat16()(padded, attention_mask=mask).logits
        assert_rounds_in(torch.bfloat16, actual, expected)


class TestPrecision:
    @pytest.mark.parametrize("cls", CLASSES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_half_precision(self, make_config, cls, dtype, attention):
        model = cls(make_config(attn_implementation=attention)).eval()
        _, batch, mask = padded_batch()
        expected = model(batch, attention_mask=mask)[0]
        actual = model.to(dtype)(batch, attention_mask=mask)[0]  # float32 inputs are cast
        assert actual.dtype == dtype
        assert_rounds_in(dtype, actual, expected)

    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_autocast(self, make_config, attention):
        model = SSLAMForAudioClassification(make_config(attn_implementation=attention, num_labels=3)).train()
        _, batch, mask = padded_batch()
        expected = model(batch, attention_mask=mask).logits
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(batch, attention_mask=mask, labels=torch.tensor([0, 1, 2]))
        outputs.loss.backward()
        assert_rounds_in(torch.bfloat16, outputs.logits, expected)


@pytest.mark.slow
class TestCompile:
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_whole_graph(self, make_config, attention):
        torch.compiler.reset()
        config = make_config(
            attn_implementation=attention, num_labels=3, classifier_pooling="mean", num_hidden_layers=1
        )
        model = SSLAMForAudioClassification(config).eval()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        _, batch, mask = padded_batch()
        for options in (
            {},
            {"attention_mask": mask},
            {"attention_mask": mask, "output_hidden_states": True, "output_attentions": True},
            {"labels": torch.tensor([0, 1, 2])},
        ):
            assert_same_outputs(compiled(batch, **options), model(batch, **options))

    def test_whole_graph_of_training_with_inductor(self, make_config):
        torch.compiler.reset()
        model = SSLAMForAudioClassification(make_config(num_labels=3, num_hidden_layers=1)).train()
        _, batch, mask = padded_batch()
        inputs = {"input_values": batch, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}
        expected = model(**inputs)
        expected.loss.backward()
        gradient = model.sslam.patch_embeddings.projection.weight.grad.clone()
        model.zero_grad()
        actual = torch.compile(model, fullgraph=True)(**inputs)
        actual.loss.backward()
        assert_same_outputs(actual, expected)
        torch.testing.assert_close(model.sslam.patch_embeddings.projection.weight.grad, gradient, atol=1e-5, rtol=1e-4)

"""The objective against the published code's vectors and, at other sizes, against a plain transcription of the paper.

The tests also check properties of the teacher, the masks and the mixtures.
"""

import copy
import json
import logging
import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from conversion.convert import convert
from modeling_sslam import SSLAMConfig, SSLAMForAudioClassification, SSLAMForPreTraining, SSLAMModel
from modeling_sslam.layouts import FAIRSEQ_PRETRAINING, to_theirs
from modeling_sslam.modeling_sslam_pretraining import (
    draw_unmixed_starts,
    inverse_block_masks,
    mean_deviations,
    prediction_moments,
    split_by_mask,
    target_moments,
    unmixed_window_width,
)

TERMS = ("ua_local_loss", "ua_global_loss", "pma_local_loss", "pma_global_loss", "srl_loss")
TERMS_OF = {"ua": TERMS[:2], "pma": TERMS[2:4], "ua+pma": TERMS[:4], "sslam": TERMS}


@pytest.fixture
def make_model(make_config):
    def make(**overrides) -> SSLAMForPreTraining:
        model = SSLAMForPreTraining(make_config(**({"mask_noise_std": 0.0} | overrides))).train()
        # Let teacher and student differ, so that a mix-up of the two shows.
        for parameter in model.teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    return make


# Masks and mixtures


def plain_mask(time_patches: int, config: SSLAMConfig, rng: random.Random) -> list[bool]:
    """Draw a mask as the paper and its code describe it, patch by patch."""
    mel_patches, size = config.num_mel_patches, config.mask_block_size
    num_patches = time_patches * mel_patches
    visible = set()
    for _ in range(int(num_patches * (1 - config.mask_prob + config.mask_prob_adjust) / size**2)):
        center = rng.randrange(num_patches)
        for i in range(-(size // 2), size // 2 + 1):
            for j in range(-(size // 2), size // 2 + 1):
                t = min(max(center // mel_patches + i, 0), time_patches - 1)
                f = min(max(center % mel_patches + j, 0), mel_patches - 1)
                visible.add(t * mel_patches + f)
    num_visible = int(num_patches * (1 - config.mask_prob))
    closed = [p for p in range(num_patches) if p not in visible]
    opened = sorted(visible)
    while len(opened) > num_visible:
        opened.pop(rng.randrange(len(opened)))
    while len(opened) < num_visible:
        opened.append(closed.pop(rng.randrange(len(closed))))
    kept = set(opened)
    return [p not in kept for p in range(num_patches)]


@pytest.mark.parametrize(
    "config", [SSLAMConfig(num_clones=10), SSLAMConfig.large(num_clones=10)], ids=["base", "large"]
)
@pytest.mark.slow
def test_masks_have_the_published_distribution(config):
    time_patches, count = 64, 10_000
    masks = inverse_block_masks(count // 10, time_patches, config, torch.Generator().manual_seed(1)).flatten(0, 1)
    rng = random.Random(2)
    plain = torch.tensor([plain_mask(time_patches, config, rng) for _ in range(count)])

    num_visible = int(512 * (1 - config.mask_prob))
    assert (masks.sum(1) == 512 - num_visible).all()
    assert (plain.sum(1) == 512 - num_visible).all()

    # Visibility of every position: the standard error of the difference of two frequencies is below 0.0064.
    difference = (masks.float().mean(0) - plain.float().mean(0)).abs()
    assert difference.max() < 5 * math.sqrt(2 * 0.2 * 0.8 / count)

    # Blocks: how many visible patches have how many visible neighbours.
    def neighbour_histogram(masks: torch.Tensor) -> torch.Tensor:
        visible = (~masks).float().view(-1, 1, time_patches, config.num_mel_patches)
        neighbours = nn.functional.conv2d(visible, torch.ones(1, 1, 3, 3), padding=1) - visible
        return torch.bincount(neighbours[visible > 0].long(), minlength=9) / visible.sum()

    histogram, expected = neighbour_histogram(masks), neighbour_histogram(plain)
    torch.testing.assert_close(histogram, expected, atol=0.005, rtol=0)
    scattered = neighbour_histogram(masks[:, torch.randperm(512)])
    assert (scattered - expected).abs().max() > 0.05, "the statistic must tell blocks from scattered patches"


@pytest.mark.parametrize(
    ("time_patches", "mask_prob", "num_visible"),
    [
        (4, 0.8, 1),  # 1.6 of 8 patches
        (7, 0.8, 2),  # 2.8 of 14
        (5, 0.75, 2),  # 2.5 of 10
        (4, 0.95, 1),  # 0.4 of 8: never none
        (4, 0.05, 7),  # 7.6 of 8: never all
    ],
)
def test_number_of_visible_patches_is_rounded_down(make_config, time_patches, mask_prob, num_visible):
    masks = inverse_block_masks(3, time_patches, make_config(mask_prob=mask_prob))
    assert ((~masks).sum(-1) == num_visible).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_masks_become_ascending_indices(tiny_config, dtype):
    masks = inverse_block_masks(3, 8, tiny_config, torch.Generator().manual_seed(0))
    visible, masked = split_by_mask(masks.to(dtype), 3, masks.shape[2])
    for clip, clone in ((i, j) for i in range(3) for j in range(tiny_config.num_clones)):
        mask = masks[clip, clone].tolist()
        assert masked[clip, clone].tolist() == [i for i, is_masked in enumerate(mask) if is_masked]
        assert visible[clip, clone].tolist() == [i for i, is_masked in enumerate(mask) if not is_masked]


def test_masks_come_from_the_generator_and_differ_between_clips_and_clones(tiny_config):
    first, second = (inverse_block_masks(3, 8, tiny_config, torch.Generator().manual_seed(s)) for s in (5, 5))
    assert first.shape == (3, tiny_config.num_clones, 16)
    torch.testing.assert_close(first, second)
    base = inverse_block_masks(3, 64, SSLAMConfig(), torch.Generator().manual_seed(5)).flatten(0, 1)
    assert len({tuple(mask.tolist()) for mask in base}) == 24


def test_windows_have_the_published_distribution():
    config, generator, count = SSLAMConfig(), torch.Generator().manual_seed(0), 20_000
    starts = [draw_unmixed_starts(64, config, generator) for _ in range(count)]
    assert unmixed_window_width(64) * 16 == 240
    first = torch.tensor([a for a, _ in starts])
    assert sorted(set(first.tolist())) == list(range(0, 512, 16))
    frequencies = torch.bincount(first // 16).float() / count
    torch.testing.assert_close(frequencies, torch.full((32,), 1 / 32), atol=5 * math.sqrt(1 / 32 / count), rtol=0)
    for start in (0, 256, 496):
        seconds = sorted({b for a, b in starts if a == start})
        assert seconds == list(range(start + 240, 783, 16))


@pytest.mark.parametrize("time_patches", range(4, 97))
def test_windows_fit_clips_of_any_length(time_patches):
    width = unmixed_window_width(time_patches)
    for seed in range(20):
        first, second = draw_unmixed_starts(time_patches, SSLAMConfig(), torch.Generator().manual_seed(seed))
        assert 0 <= first <= second - 16 * width
        assert second <= 16 * (time_patches - width - 1)


# The objective


@pytest.fixture(scope="module")
def golden_folder(golden_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden") / "model"
    convert(golden_dir / "sslam_pretrained.pt", folder, head="pretraining")
    return folder


@pytest.fixture
def golden_model(golden_folder: Path):
    def load(objective: str) -> SSLAMForPreTraining:
        changes = {"pretraining_objective": objective, "mask_noise_std": 0.0, "ema_anneal_end_step": 8}
        return SSLAMForPreTraining.from_pretrained(golden_folder, **changes).train()

    return load


def golden_step(vectors: dict[str, torch.Tensor], suffix: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    source = vectors[f"source{suffix}"].float().squeeze(1)
    return source, vectors[f"mask{suffix}"].bool().view(len(source), -1, vectors[f"mask{suffix}"].shape[-1])


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.fixture
def expected(golden_dir) -> dict:
    return json.loads((golden_dir / "expected.json").read_text())


@pytest.mark.parametrize(("stage", "objective"), [("stage1", "ua"), ("stage2", "sslam")])
def test_losses_and_gradients_are_the_published_ones(stage, objective, golden_model, golden_dir, expected, parity):
    vectors = load_file(golden_dir / f"{stage}_step.safetensors")
    source, mask = golden_step(load_file(golden_dir / "stage2_step.safetensors"))  # stage 1 was run on the same
    facts, model = expected[stage], golden_model(objective)
    starts = (facts["idx_1"], facts["idx_2"]) if stage == "stage2" else None
    output = model(source, bool_masked_pos=mask, unmixed_starts=starts)
    output.loss.backward()

    assert output.num_masked_tokens == facts["sample_size"]
    sums = facts["losses_summed"]
    parts = {name: output[name] for name in TERMS_OF[objective]}
    if stage == "stage1":
        found = {"IMAGE_regression": parts["ua_local_loss"], "cls": parts["ua_global_loss"]}
    else:
        found = {
            "eat_patch_loss": parts["ua_local_loss"] + parts["pma_local_loss"],
            "eat_cls_loss": parts["ua_global_loss"] + parts["pma_global_loss"],
            "mix_patch_loss": parts["srl_loss"],
        }
    for name, value in found.items():
        total = value.item() * facts["sample_size"]
        parity(f"{stage} {name} (relative)", abs(total / sums[name] - 1), 1e-5)
    parity(f"{stage} loss (relative)", abs(output.loss.item() / facts["loss"] - 1), 1e-5)
    for name in ("pred_var", "target_var"):
        parity(f"{stage} {name}", abs(output[name].item() - facts[name]), 1e-5)

    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(key.startswith("grad.") for key in vectors) == len(gradients)
    worst = max(
        relative_error(gradient, vectors[f"grad.{to_theirs(name, FAIRSEQ_PRETRAINING)}"])
        for name, gradient in gradients.items()
    )
    parity(f"{stage} gradients (relative, by norm)", worst, 1e-4)


def plain_loss(
    model: SSLAMForPreTraining, clips: torch.Tensor, masks: torch.Tensor, starts: tuple[int, int] | None
) -> dict[str, torch.Tensor]:
    """Compute the objective clip by clip and clone by clone, with nothing shared and nothing vectorised."""
    config = model.config
    depth, width = config.num_hidden_layers, config.hidden_size
    batch_size, num_frames, _ = clips.shape
    time_patches, mel_patches = num_frames // config.patch_size, config.num_mel_patches

    def teacher_target(clip: torch.Tensor, num_layers: int, keep: list[int] | None = None) -> torch.Tensor:
        with torch.no_grad():
            patches = model.teacher.patch_embeddings(clip[None])
            patches = patches if keep is None else patches[:, keep]
            outputs = model.teacher.encoder(patches, output_ffn=True).ffn_outputs[-num_layers:]
            normalised = [nn.functional.instance_norm(o[:, 1:].transpose(1, 2)).transpose(1, 2) for o in outputs]
            return nn.functional.layer_norm(torch.stack(normalised).mean(0), (width,))[0]

    def student(clip: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        patches = model.sslam.patch_embeddings(clip[None])
        states = model.sslam.encoder(patches[:, ~mask]).last_hidden_state[0]
        grid = torch.zeros(time_patches * mel_patches, width)
        grid[~mask] = states[1:]
        grid = grid.view(time_patches, mel_patches, width).permute(2, 0, 1)[None]
        for layer in model.decoder.layers:
            update = nn.Conv2d.forward(layer, grid).permute(0, 2, 3, 1)
            update = nn.functional.gelu(nn.functional.layer_norm(update, (width,))).permute(0, 3, 1, 2)
            grid = grid + update
        return states[0], model.decoder.projection(grid[0].flatten(1).T)

    objective = config.pretraining_objective
    local_layers = config.num_target_layers or depth
    global_layers = config.num_global_target_layers or (depth if objective == "ua" else 1)
    mixed = []
    if starts is not None:
        window = unmixed_window_width(time_patches) * config.patch_size
        is_alone = [any(s <= frame < s + window for s in starts) for frame in range(num_frames)]
        alone = torch.tensor(is_alone)[:, None]
        mixtures = [torch.where(alone, clips[i], torch.maximum(clips[i], clips[i - 1])) for i in range(batch_size)]
        mixed = [p for p in range(time_patches * mel_patches) if not is_alone[p // mel_patches * config.patch_size]]

    sums = dict.fromkeys(TERMS_OF[objective], 0.0)
    masked_tokens = 0
    for kind in ("ua", "pma"):
        if f"{kind}_local_loss" not in sums:
            continue
        for i in range(batch_size):
            clip = clips[i] if kind == "ua" else mixtures[i]
            local = teacher_target(clip, local_layers)
            clip_target = teacher_target(clip, global_layers).mean(0)
            if "srl_loss" in sums:
                retention = teacher_target(clips[i], local_layers)
                foreign = teacher_target(clips[i - 1], local_layers, mixed)
                retention[mixed] = (retention[mixed] + foreign) / 2
            for mask in masks[i]:
                masked_tokens += int(mask.sum())
                cls, prediction = student(clip, mask)
                error = (prediction - local)[mask].square().sum() / math.sqrt(width)
                sums[f"{kind}_local_loss"] += error
                sums[f"{kind}_global_loss"] += (cls - clip_target).square().sum() / math.sqrt(width)
                if kind == "pma" and "srl_loss" in sums:
                    sums["srl_loss"] += 2 * (prediction - retention)[mask].square().sum() / math.sqrt(width)
    return {name: value if "global" in name else value / masked_tokens for name, value in sums.items()}


@pytest.mark.parametrize("objective", TERMS_OF)
@pytest.mark.parametrize(
    ("num_frames", "overrides"),
    [
        (64, {}),
        (112, {"hidden_size": 48, "decoder_groups": 8, "num_clones": 3, "decoder_kernel_size": 5}),
        (80, {"num_mel_bins": 48, "hidden_act": "relu", "num_global_target_layers": 2}),
        (48, {"patch_size": 8, "num_mel_bins": 24, "decoder_num_layers": 1}),
        (64, {"num_target_layers": 2}),
        (64, {"num_target_layers": 1, "num_global_target_layers": 3}),
    ],
)
def test_any_size_follows_the_plain_transcription(objective, num_frames, overrides, make_model):
    model = make_model(pretraining_objective=objective, **overrides)
    config, batch_size = model.config, 3
    time_patches = num_frames // config.patch_size
    clips = torch.randn(batch_size, num_frames, config.num_mel_bins)
    generator = torch.Generator().manual_seed(3)
    masks = inverse_block_masks(batch_size, time_patches, config, generator)
    starts = None if objective == "ua" else draw_unmixed_starts(time_patches, config, generator)

    output = model(clips, bool_masked_pos=masks, unmixed_starts=starts)
    reference = plain_loss(model, clips, masks, starts)
    for name in TERMS:
        if name in reference:
            torch.testing.assert_close(output[name], reference[name], rtol=1e-5, atol=0)
        else:
            assert getattr(output, name) is None
    torch.testing.assert_close(output.loss, sum(output[name] for name in reference))

    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    sum(reference.values()).backward()
    for name, parameter in model.named_parameters():
        if not name.startswith("teacher."):
            # Some elements are small differences of sums over all tokens, and inherit the rounding of the sums.
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_deviations_cover_all_masked_tokens(make_model):
    model = make_model(pretraining_objective="ua")
    clips = torch.randn(3, 64, 32)
    masks = inverse_block_masks(3, 4, model.config, torch.Generator().manual_seed(0))
    seen = {}
    model.decoder.register_forward_hook(lambda module, args, output: seen.update(predictions=output.flatten(0, 1)))
    output = model(clips, bool_masked_pos=masks)
    expected = (seen["predictions"].var(0) + 1e-6).sqrt().mean()
    torch.testing.assert_close(output.pred_var, expected, rtol=1e-5, atol=0)
    with torch.no_grad():
        targets, _ = model._targets(model.teacher.patch_embeddings(clips))
    tokens = torch.cat([targets[i][mask] for i in range(3) for mask in masks[i]])
    torch.testing.assert_close(output.target_var, (tokens.var(0) + 1e-6).sqrt().mean(), rtol=1e-5, atol=0)
    assert output.num_masked_tokens == masks.sum()
    assert output.masked_fraction == masks.float().mean()


@pytest.mark.parametrize("num_parts", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_deviations_of_a_collapsed_model_are_numbers(dtype, num_parts):
    # All tokens are alike and far from 0. From sums of squares around 0 the variance could be negative, its root NaN.
    value = torch.linspace(-300.0, 300.0, 8)
    predictions = value.to(dtype).expand(3, 2, 50, 8)
    masked = torch.arange(50).expand(3, 2, 50)
    moments = prediction_moments(predictions, num_parts), target_moments(value.expand(3, 64, 8), masked)
    assert [deviation.item() for deviation in mean_deviations(*moments)] == pytest.approx([1e-3, 1e-3], rel=0.2)


def test_masks_and_windows_are_drawn_from_the_generator(make_model):
    model = make_model()
    clips = torch.randn(3, 64, 32)
    first, same, other = (model(clips, generator=torch.Generator().manual_seed(s)).loss.item() for s in (1, 1, 2))
    assert first == same != other


def test_mask_noise_is_read_at_each_forward(make_model):
    model = make_model()
    clips = torch.randn(2, 64, 32)

    def loss() -> float:
        return model(clips, generator=torch.Generator().manual_seed(0)).loss.item()

    assert loss() == loss()
    model.config.mask_noise_std = 0.5
    assert loss() != loss()


def test_takes_the_published_channel_axis(make_model):
    model = make_model()
    clips = torch.randn(2, 64, 32)
    losses = [model(x, generator=torch.Generator().manual_seed(0)).loss for x in (clips, clips[:, None])]
    assert losses[0] == losses[1]


def test_gradient_checkpointing_changes_nothing(make_model):
    model = make_model()
    clips = torch.randn(2, 64, 32)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(clips, generator=torch.Generator().manual_seed(0)).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_bfloat16_autocast_stays_close_and_sums_in_float32(make_model):
    model = make_model()
    clips = torch.randn(2, 64, 32)
    plain = model(clips, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model(clips, generator=torch.Generator().manual_seed(0))
    for name in ("loss", *TERMS):
        assert mixed[name].dtype == torch.float32
        # About a dozen roundings in a row, by 2^-8 each.
        torch.testing.assert_close(mixed[name], plain[name], rtol=0.05, atol=0)
    mixed.loss.backward()


@pytest.mark.parametrize(
    ("batch_size", "num_frames", "arguments", "message"),
    [
        (1, 64, {}, "no foreign clip"),
        (2, 48, {}, "cannot be mixed"),
        (2, 60, {}, "multiple of 16"),
        (2, 64, {"bool_masked_pos": torch.ones(2, 2, 9, dtype=torch.bool)}, "bool_masked_pos has shape"),
        (2, 64, {"bool_masked_pos": torch.ones(2, 2, 8, dtype=torch.bool)}, "neither none nor all"),
        (2, 64, {"bool_masked_pos": torch.rand(2, 2, 8).argsort(-1) < torch.tensor([[3], [4]])}, "3 to 4 of 8"),
        (2, 64, {"unmixed_starts": (0, 24)}, "multiples of 16"),
        (2, 64, {"unmixed_starts": (32, 32)}, "one after the other"),
        (2, 64, {"unmixed_starts": (0, 64)}, "within the clip"),
    ],
)
def test_refuses_arguments_that_do_not_fit(make_model, batch_size, num_frames, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_model()(torch.randn(batch_size, num_frames, 32), **arguments)


# The teacher


def test_teacher_starts_as_the_student(tiny_config):
    model = SSLAMForPreTraining(tiny_config)
    for student, teacher in zip(model.sslam.parameters(), model.teacher.parameters(), strict=True):
        torch.testing.assert_close(student, teacher, rtol=0, atol=0)


def test_decay_is_linear_and_then_constant():
    config = SSLAMConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, ema_anneal_end_step=1000)
    decay = SSLAMForPreTraining(config).ema_decay
    assert decay(0) == 0.9998
    assert decay(500) == pytest.approx((0.9998 + 0.99999) / 2)
    assert decay(1000) == decay(5000) == 0.99999


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_teacher_is_a_float32_average_in_evaluation_mode_without_gradients(make_model, dtype):
    model = make_model(drop_path_rate=0.9).to(dtype).train()
    assert not any(module.training for module in model.teacher.modules())
    before = copy.deepcopy(model.teacher)
    assert {tensor.dtype for tensor in (*before.parameters(), *before.buffers())} == {torch.float32}
    assert model.sslam.dtype == dtype
    model.update_teacher(0.75)
    for new, old, student in zip(
        model.teacher.parameters(), before.parameters(), model.sslam.parameters(), strict=True
    ):
        assert not new.requires_grad
        torch.testing.assert_close(new, 0.75 * old + 0.25 * student.float())
    model(torch.randn(2, 64, 32)).loss.backward()
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(parameter.grad is not None for parameter in model.sslam.parameters())
    assert all(parameter.grad is not None for parameter in model.decoder.parameters())


def test_three_updates_end_at_the_published_weights(golden_model, golden_dir, expected, parity):
    vectors, model = load_file(golden_dir / "stage2_trajectory.safetensors"), golden_model("sslam")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.05)
    for i, step in enumerate(expected["trajectory"]["steps"][:3]):
        optimizer.param_groups[0]["lr"] = step["lr"]
        source, mask = golden_step(vectors, f"_{i}")
        loss = model(source, bool_masked_pos=mask, unmixed_starts=(step["idx_1"], step["idx_2"])).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained.values(), 4.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = model.ema_decay(i + 1)
        assert decay == pytest.approx(expected["trajectory"]["steps"][i + 1]["ema_decay"], abs=1e-12)
        model.update_teacher(decay)
        parity(f"trajectory update {i + 1} loss (relative)", abs(loss.item() / step["loss"] - 1), 1e-5)
        parity(f"trajectory update {i + 1} gradient norm (relative)", abs(norm.item() / step["grad_norm"] - 1), 1e-4)

    def worst(prefix: str, weights: dict[str, torch.Tensor]) -> float:
        theirs = {name: vectors[prefix + to_theirs(name, FAIRSEQ_PRETRAINING)] for name in weights}
        return max(relative_error(weight, theirs[name]) for name, weight in weights.items())

    student = {name: parameter.detach() for name, parameter in trained.items()}
    teacher = {f"sslam.{name}": parameter for name, parameter in model.teacher.named_parameters()}
    parity("trajectory student (relative, by norm)", worst("final.", student), 3e-4)
    # Each update gives the teacher 1 - decay of the student's error, and rounds it by at most 2^-24.
    share = sum(1 - model.ema_decay(update) for update in (1, 2, 3))
    parity("trajectory teacher (relative, by norm)", worst("final_ema.", teacher), share * 3e-4 + 3 * 2**-24)


# Folders


def test_folder_holds_everything_and_gives_the_student(make_model, tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = make_model()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "modeling_sslam_pretraining.py").is_file()
    loaded = SSLAMForPreTraining.from_pretrained(tmp_path)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in loaded.teacher.parameters())
    assert "teacher" not in caplog.text

    caplog.clear()
    encoder = SSLAMModel.from_pretrained(tmp_path)
    for name, tensor in model.sslam.state_dict().items():
        torch.testing.assert_close(encoder.state_dict()[name], tensor, rtol=0, atol=0)
    assert caplog.text == ""

    classifier = SSLAMForAudioClassification.from_pretrained(tmp_path)
    torch.testing.assert_close(classifier.sslam.encoder.cls_token, model.sslam.encoder.cls_token)
    assert "teacher" not in caplog.text
    assert "decoder" not in caplog.text

    loaded.teacher.save_pretrained(tmp_path / "teacher")
    teacher = SSLAMModel.from_pretrained(tmp_path / "teacher")
    torch.testing.assert_close(teacher.encoder.cls_token, model.teacher.encoder.cls_token)


def test_teacher_stays_float32_when_loaded_in_half_precision(make_model, tmp_path: Path):
    model = make_model()
    model.save_pretrained(tmp_path)
    loaded = SSLAMForPreTraining.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.sslam.dtype == loaded.decoder.projection.weight.dtype == torch.bfloat16
    for name, tensor in model.teacher.state_dict().items():
        torch.testing.assert_close(loaded.teacher.state_dict()[name], tensor, rtol=0, atol=0)


def test_encoder_checkpoint_gives_a_teacher_equal_to_the_student(tiny_config, tmp_path: Path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    encoder = SSLAMModel(tiny_config)
    encoder.save_pretrained(tmp_path)
    model = SSLAMForPreTraining.from_pretrained(tmp_path)
    assert "holds no teacher" in caplog.text
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(model.sslam.state_dict()[name], tensor, rtol=0, atol=0)
        torch.testing.assert_close(model.teacher.state_dict()[name], tensor, rtol=0, atol=0)

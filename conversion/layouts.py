"""The published layouts as data: tables of names that are read in either direction, and no code for any one layout.

Our names stand on the left, the published ones on the right; `*` is a block's index. A name is that of a module (its
weight and bias follow) or of a parameter. The first part of our names says what it belongs to: `sslam.` (the encoder,
which in a pre-training checkpoint is the student), `decoder.`, `teacher.` and `classifier.`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Names = tuple[tuple[str, str], ...]

# A constant: published checkpoints store the table, we compute it. It is checked when read and written for others.
POSITIONS = "patch_embeddings.position_embeddings"

BLOCK_NAMES: Names = (
    ("encoder.layers.*.attention_layernorm", "blocks.*.norm1"),
    ("encoder.layers.*.attention.qkv", "blocks.*.attn.qkv"),
    ("encoder.layers.*.attention.output", "blocks.*.attn.proj"),
    ("encoder.layers.*.mlp_layernorm", "blocks.*.norm2"),
    ("encoder.layers.*.mlp.fc1", "blocks.*.mlp.fc1"),
    ("encoder.layers.*.mlp.fc2", "blocks.*.mlp.fc2"),
)
FAIRSEQ_ENCODER_NAMES: Names = (
    ("encoder.cls_token", "modality_encoders.IMAGE.extra_tokens"),
    ("patch_embeddings.projection", "modality_encoders.IMAGE.local_encoder.proj"),
    (POSITIONS, "modality_encoders.IMAGE.fixed_positional_encoder.positions"),
    ("encoder.layernorm", "modality_encoders.IMAGE.context_encoder.norm"),
    *BLOCK_NAMES,
)
HUB_ENCODER_NAMES: Names = (
    ("encoder.cls_token", "extra_tokens"),
    ("patch_embeddings.projection", "local_encoder.proj"),
    (POSITIONS, "fixed_positional_encoder.positions"),
    ("encoder.layernorm", "pre_norm"),
    *BLOCK_NAMES,
)
DECODER_NAMES: Names = (
    ("layers.*", "modality_encoders.IMAGE.decoder.blocks.*.0"),
    ("projection", "modality_encoders.IMAGE.decoder.proj"),
)
CLASSIFIER_NAMES: Names = (("layernorm", "fc_norm"), ("dense", "head"))


def _own(names: Names) -> Names:
    return tuple((ours, ours) for ours, _ in names if ours != POSITIONS)


@dataclass(frozen=True)
class Layout:
    """Where a layout keeps each part of the model: (our prefix, its prefix, names). `family` is the code that reads
    it, as the command names it."""

    family: str
    title: str
    parts: tuple[tuple[str, str, Names], ...]


FAIRSEQ_PRETRAINING = Layout(
    "fairseq",
    "fairseq, pre-trained",
    (
        ("sslam.", "", FAIRSEQ_ENCODER_NAMES),
        ("decoder.", "", DECODER_NAMES),
        ("teacher.", "_ema.", FAIRSEQ_ENCODER_NAMES),
    ),
)
FAIRSEQ_CLASSIFICATION = Layout(
    "fairseq",
    "fairseq, fine-tuned",
    (("sslam.", "model.", FAIRSEQ_ENCODER_NAMES), ("classifier.", "", CLASSIFIER_NAMES)),
)
HUB_EAT = Layout(
    "hub-eat",
    "Hub (EATModel)",
    (("sslam.", "model.", HUB_ENCODER_NAMES), ("classifier.", "model.", CLASSIFIER_NAMES)),
)
TRANSFORMERS = Layout(
    "transformers",
    "transformers (SSLAM)",
    (
        ("sslam.", "sslam.", _own(FAIRSEQ_ENCODER_NAMES)),
        ("classifier.", "classifier.", _own(CLASSIFIER_NAMES)),
        ("decoder.", "decoder.", _own(DECODER_NAMES)),
        ("teacher.", "teacher.", _own(FAIRSEQ_ENCODER_NAMES)),
    ),
)
TRANSFORMERS_ENCODER = Layout(
    "transformers", "transformers (SSLAM), encoder", (("sslam.", "", _own(FAIRSEQ_ENCODER_NAMES)),)
)
LAYOUTS = (FAIRSEQ_PRETRAINING, FAIRSEQ_CLASSIFICATION, HUB_EAT, TRANSFORMERS, TRANSFORMERS_ENCODER)

# What wrapping a model (in another, in DistributedDataParallel, by torch.compile) puts before its names, and what
# users cut off: neither tells one layout from another.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+|modality_encoders\.IMAGE\.")
_KEY = re.compile(r"(?P<stem>.*?)(?P<parameter>\.weight|\.bias)?")


def _rename(key: str, names: Iterable[tuple[str, str]]) -> str | None:
    stem, parameter = _KEY.fullmatch(key).group("stem", "parameter")
    index = re.search(r"\.(\d+)(?=\.|$)", stem)
    pattern = stem if index is None else f"{stem[: index.start(1)]}*{stem[index.end(1) :]}"
    for source, target in names:
        if source == pattern:
            return (target if index is None else target.replace("*", index[1])) + (parameter or "")
    return None


def _core(name: str) -> str:
    return _WRAPPERS.sub("", name)


def to_ours(keys: Iterable[str], layout: Layout) -> dict[str, str | None]:
    """Our name of each key of a checkpoint, None for what the layout does not know."""
    names = [
        (_core(prefix + theirs), our_prefix + ours)
        for our_prefix, prefix, table in layout.parts
        for ours, theirs in table
    ]
    return {key: _rename(_core(key), names) for key in keys}


def to_theirs(key: str, layout: Layout) -> str | None:
    """The layout's name of one of our keys, None where it has no place for it."""
    names = [
        (our_prefix + ours, prefix + theirs) for our_prefix, prefix, table in layout.parts for ours, theirs in table
    ]
    return _rename(key, names)


def recognise(keys: Iterable[str]) -> tuple[Layout, dict[str, str | None]]:
    """The layout that knows most of the keys, and our name of each."""
    keys = list(keys)
    candidates = [(layout, to_ours(keys, layout)) for layout in LAYOUTS]
    return max(candidates, key=lambda candidate: sum(name is not None for name in candidate[1].values()))


# Settings: our field on the left, its path in the published settings on the right. fairseq writes down the
# whole run; these are paths in the pre-training run's, which a fine-tuned checkpoint carries along.
FAIRSEQ_SETTINGS: Names = (
    ("hidden_size", "model.embed_dim"),
    ("hidden_size", "model.modalities.image.embed_dim"),
    ("hidden_size", "model.modalities.image.decoder.decoder_dim"),
    ("num_hidden_layers", "model.depth"),
    ("num_attention_heads", "model.num_heads"),
    ("layer_norm_eps", "model.norm_eps"),
    ("patch_size", "model.modalities.image.patch_size"),
    ("max_length", "model.modalities.image.target_length"),
    ("max_position_embeddings", "model.modalities.image.max_length"),
    ("num_clones", "model.clone_batch"),
    ("mask_prob", "model.modalities.image.mask_prob"),
    ("mask_prob_adjust", "model.modalities.image.mask_prob_adjust"),
    ("mask_block_size", "model.modalities.image.mask_length"),
    ("mask_noise_std", "model.modalities.image.mask_noise_std"),
    ("decoder_num_layers", "model.modalities.image.decoder.decoder_layers"),
    ("decoder_kernel_size", "model.modalities.image.decoder.decoder_kernel"),
    ("decoder_groups", "model.modalities.image.decoder.decoder_groups"),
    ("num_target_layers", "model.average_top_k_layers"),
    ("global_loss_weight", "model.cls_loss"),
    ("ema_decay", "model.ema_decay"),
    ("ema_end_decay", "model.ema_end_decay"),
    ("ema_anneal_end_step", "model.ema_anneal_end_step"),
)
HUB_SETTINGS: Names = (
    ("hidden_size", "embed_dim"),
    ("num_hidden_layers", "depth"),
    ("num_attention_heads", "num_heads"),
    ("layer_norm_eps", "norm_eps"),
    ("patch_size", "patch_size"),
    ("num_mel_bins", "mel_bins"),
    ("max_position_embeddings", "max_length"),
    ("qkv_bias", "qkv_bias"),
)

# What the published code could do otherwise and no SSLAM or EAT model does. A checkpoint that differs computes
# something else, and is refused.
FAIRSEQ_ENCODER_CONSTANTS: dict[str, Any] = {
    "model.layer_norm_first": False,
    "model.norm_affine": True,
    "model.modalities.image.in_chans": 1,
    "model.modalities.image.prenet_depth": 0,
    "model.modalities.image.num_extra_tokens": 1,
    "model.modalities.image.use_alibi_encoder": False,
    "model.modalities.image.fixed_positions": True,
}
FAIRSEQ_PRETRAINING_CONSTANTS: dict[str, Any] = {
    "model.end_of_block_targets": False,
    "model.instance_norm_target_layer": True,
    "model.layer_norm_target_layer": False,
    "model.layer_norm_targets": True,
    "model.loss_beta": 0.0,
    "model.loss_scale": None,
    "model.recon_loss": 0.0,
    "model.d2v_loss": 1.0,
    "model.ema_encoder_only": False,
    "model.modalities.image.inverse_mask": True,
    "model.modalities.image.mask_dropout": 0.0,
    "model.modalities.image.ema_local_encoder": True,
    "model.modalities.image.decoder.input_dropout": 0.0,
    "model.modalities.image.decoder.decoder_residual": True,
    "model.modalities.image.decoder.add_positions_masked": False,
    "model.modalities.image.decoder.add_positions_all": False,
    "model.modalities.image.decoder.projection_layers": 1,
}
HUB_CONSTANTS: dict[str, Any] = {
    "in_chans": 1,
    "layer_norm_first": False,
    "norm_affine": True,
    "fixed_positions": True,
}

# Written for the code that reads the layout; it changes no number of a model at inference.
FAIRSEQ_PRETRAINING_EXTRAS: dict[str, Any] = {
    "task._name": "mae_image_pretraining",
    "task.data": "",
    "task.audio_mae": True,
    "task.downsr_16hz": True,
    "model._name": "data2vec_multi",
    "model.supported_modality": "IMAGE",
    "model.shared_decoder": None,
    "model.encoder_dropout": 0.0,
    "model.attention_dropout": 0.0,
    "model.activation_dropout": 0.0,
    "model.post_mlp_drop": 0.0,
    "model.dropout_input": 0.0,
    "model.layerdrop": 0.0,
    "model.start_drop_path_rate": 0.0,
    "model.end_drop_path_rate": 0.0,
    "model.modalities.image.type": "IMAGE",
    "criterion": None,
    "lr_scheduler": None,
    "optimizer": None,
}
HUB_EXTRAS: dict[str, Any] = {
    "architectures": ["EATModel"],
    "model_type": "eat",
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "activation_dropout": 0.0,
    "post_mlp_drop": 0.0,
    "start_drop_path_rate": 0.0,
    "end_drop_path_rate": 0.0,
}

# fairseq's names of the poolings. A pickled enumeration keeps its number alone.
FAIRSEQ_POOLINGS = {
    "MEAN_POOLING": "mean",
    "CLS_TOKEN": "cls",
    "LIN_SOFTMAX": "lin_softmax",
    1: "mean",
    2: "cls",
    3: "lin_softmax",
}
# The epsilon of the classifier's LayerNorm is in no settings, but in the code that reads the layout.
CLASSIFIER_NORM_EPS = {"fairseq": 1e-6, "hub-eat": 1e-5}

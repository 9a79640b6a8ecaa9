"""Published layouts as data: tables of names that are read in both directions. No layout has code of its own.

`from_pretrained` (through `published`) and the conversion read the same tables.

In every table our name stands on the left and the published name on the right; `*` is a block's index. A name
stands for a module (its weight and bias follow) or for a parameter. Our names begin with the part of the model:
`sslam.` (the encoder; in a pre-training checkpoint, the student), `decoder.`, `teacher.` or `classifier.`.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Names = tuple[tuple[str, str], ...]

# Published checkpoints store this constant table, and this project computes it. The conversion checks the table when
# it reads one, and writes it in the published layouts.
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
# The Earth Species Project's head is a linear layer without a norm.
AVEX_CLASSIFIER_NAMES: Names = (("dense", "classifier"),)


def _own(names: Names) -> Names:
    """Return the table of our own layout for the parts that another table names."""
    return tuple((ours, ours) for ours, _ in names if ours != POSITIONS)


@dataclass(frozen=True)
class Layout:
    """Names of all parameters in one layout.

    Attributes:
        family: The code that reads the layout, as `--to` names it.
        title: The layout's name in messages.
        parts: For each part of the model our prefix, the layout's prefix, and the table of names after them.
    """

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
AVEX = Layout(
    "avex",
    "avex (Earth Species Project)",
    (("sslam.", "backbone.model.", HUB_ENCODER_NAMES), ("classifier.", "", AVEX_CLASSIFIER_NAMES)),
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
LAYOUTS = (FAIRSEQ_PRETRAINING, FAIRSEQ_CLASSIFICATION, HUB_EAT, AVEX, TRANSFORMERS, TRANSFORMERS_ENCODER)

# Prefixes that do not identify a layout. An outer module, DistributedDataParallel and torch.compile add them, and
# users strip them.
_WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.|model\.)+|modality_encoders\.IMAGE\.")


def _rename(key: str, names: Iterable[tuple[str, str]]) -> str | None:
    """Return the target name of a parameter in a table of pairs (source, target), or None if the table lacks it."""
    parameter = next((ending for ending in (".weight", ".bias") if key.endswith(ending)), "")
    stem = key.removesuffix(parameter)
    index = re.search(r"\.(\d+)(?=\.|$)", stem)
    pattern = stem if index is None else f"{stem[: index.start(1)]}*{stem[index.end(1) :]}"
    for source, target in names:
        if source == pattern:
            return (target if index is None else target.replace("*", index[1])) + parameter
    return None


def _core(name: str) -> str:
    return _WRAPPERS.sub("", name)


def to_ours(keys: Iterable[str], layout: Layout) -> dict[str, str | None]:
    """Return our name of each of a checkpoint's keys, or None where the layout does not know the key."""
    names = [
        (_core(prefix + theirs), our_prefix + ours)
        for our_prefix, prefix, table in layout.parts
        for ours, theirs in table
    ]
    return {key: _rename(_core(key), names) for key in keys}


def to_theirs(key: str, layout: Layout) -> str:
    """Return the layout's name of one of our keys.

    Raises:
        KeyError: If the layout has no place for it.
    """
    names = [
        (our_prefix + ours, prefix + theirs) for our_prefix, prefix, table in layout.parts for ours, theirs in table
    ]
    name = _rename(key, names)
    if name is None:
        raise KeyError(f"{layout.title} has no place for {key}")
    return name


def recognise(keys: Iterable[str]) -> tuple[Layout, dict[str, str | None]]:
    """Find the layout of a state dict by its keys.

    Args:
        keys: All keys of the state dict. Prefixes of wrappers such as `module.` are ignored.

    Returns:
        The layout in `LAYOUTS` that knows most of the keys, and our name of each key, or None where the layout does
        not know it. The caller must refuse a state dict with too many unknown keys.
    """
    keys = list(keys)
    candidates = [(layout, to_ours(keys, layout)) for layout in LAYOUTS]
    return max(candidates, key=lambda candidate: sum(name is not None for name in candidate[1].values()))


# Our field on the left, its path in the published settings on the right. fairseq stores the settings of the whole run.
# The paths belong to a pre-training run, whose settings a fine-tuned checkpoint holds too.
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

# Settings of the published code that have one value in all SSLAM and EAT models. A checkpoint with another value
# computes other numbers and is refused.
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

# Settings that the published code requires. They change no number at inference.
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
PUBLISHED_MODEL_TYPE = "eat"
HUB_EXTRAS: dict[str, Any] = {
    "architectures": ["EATModel"],
    "model_type": PUBLISHED_MODEL_TYPE,
    "drop_rate": 0.0,
    "attn_drop_rate": 0.0,
    "activation_dropout": 0.0,
    "post_mlp_drop": 0.0,
    "start_drop_path_rate": 0.0,
    "end_drop_path_rate": 0.0,
}

# fairseq's names of the poolings, and the numbers of its enumeration: a pickle holds the number only.
FAIRSEQ_POOLINGS = {
    "MEAN_POOLING": "mean",
    "CLS_TOKEN": "cls",
    "LIN_SOFTMAX": "lin_softmax",
    1: "mean",
    2: "cls",
    3: "lin_softmax",
}
# Epsilon of the classifier's LayerNorm, None where it has no norm. The code that reads the layout fixes it; no
# settings state it.
CLASSIFIER_NORM_EPS: dict[str, float | None] = {"fairseq": 1e-6, "hub-eat": 1e-5, "avex": None}

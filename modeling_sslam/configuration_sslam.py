"""Configuration of SSLAM: encoder, classifier and pre-training objective."""

import math
import reprlib
from collections.abc import Callable, Iterator
from os import PathLike
from typing import Any, NamedTuple

from transformers import PretrainedConfig


class PublishedLayout(NamedTuple):
    """A layout that was published under another `model_type`, and that `from_pretrained` reads as well.

    Attributes:
        settings: Turns a config.json of the layout into one of [`SSLAMConfig`].
        front_end: Turns it into the arguments of [`SSLAMFeatureExtractor`].
        key_mapping: For each weight a regular expression of the layout's name, and the replacement that gives ours.
    """

    settings: Callable[[dict[str, Any]], dict[str, Any]]
    front_end: Callable[[dict[str, Any]], dict[str, Any]]
    key_mapping: dict[str, str]


# By `model_type`. The package fills this table (modeling_sslam.published). It stays empty where this file travels
# beside saved weights, which are in our own layout.
PUBLISHED_LAYOUTS: dict[str, PublishedLayout] = {}


def published_layout(settings: dict[str, Any]) -> PublishedLayout | None:
    """Return the published layout that a config.json belongs to, or None for any other."""
    model_type = settings.get("model_type")
    return PUBLISHED_LAYOUTS.get(model_type) if isinstance(model_type, str) else None


PRETRAINING_OBJECTIVES = ("ua", "pma", "ua+pma", "sslam")
POOLINGS = ("cls", "mean", "lin_softmax")


class _Rule(NamedTuple):
    """A condition on the value of one field, and the end of the error message where it does not hold."""

    holds: Callable[[Any], bool]
    message: str


def _one_of(*choices: str | None) -> list[_Rule]:
    return [_Rule(lambda value: value in choices, f"is not one of {', '.join(map(str, choices))}")]


# A configuration comes from a file, which may state anything. The limits are far above any model of this kind and keep
# a model from being built that no memory holds.
_MAX_LAYERS, _MAX_WIDTH, _MAX_MEL_BINS, _MAX_LABELS = 256, 1 << 17, 4096, 1 << 20
# Tokens of the position table: 45 minutes of sound in 128 mel bins.
_MAX_POSITIONS = 1 << 17


def _is_a(kind: type | tuple[type, ...], value: Any) -> bool:
    # Python counts True and False among the integers.
    return isinstance(value, kind) and not isinstance(value, bool)


def _size(largest: int) -> list[_Rule]:
    return [*_COUNT, _Rule(lambda value: value <= largest, f"is more than {largest}, the largest size of a model")]


_FLAG = [_Rule(lambda value: isinstance(value, bool), "must be True or False")]
_COUNT = [_Rule(lambda value: _is_a(int, value) and value > 0, "must be a positive integer")]
_COUNT_OR_NONE = [_Rule(lambda value: value is None or _COUNT[0].holds(value), "must be None or a positive integer")]
_NUMBER = [
    _Rule(lambda value: _is_a((int, float), value), "must be a number"),
    # A Python integer can have any size and is compared exactly, but a float cannot hold a large one.
    _Rule(lambda value: not isinstance(value, int) or abs(value) < 1 << 63, "is too large an integer"),
]
_SHARE = [*_NUMBER, _Rule(lambda value: 0.0 <= value <= 1.0, "must lie between 0 and 1")]
_POSITIVE = [*_NUMBER, _Rule(lambda value: 0.0 < value < math.inf, "must be positive and finite")]
_NOT_NEGATIVE = [*_NUMBER, _Rule(lambda value: 0.0 <= value < math.inf, "must not be negative or infinite")]

# Rules of single fields. `SSLAMConfig._contradictions` has those between fields.
_RULES = {
    "hidden_size": _size(_MAX_WIDTH),
    "num_hidden_layers": _size(_MAX_LAYERS),
    "num_attention_heads": _COUNT,
    "intermediate_size": _size(_MAX_WIDTH),
    "hidden_dropout_prob": _SHARE,
    "attention_probs_dropout_prob": _SHARE,
    "drop_path_rate": _SHARE,
    "layer_norm_eps": _POSITIVE,
    "initializer_range": _NOT_NEGATIVE,
    "qkv_bias": _FLAG,
    "patch_size": _COUNT,
    "num_mel_bins": _size(_MAX_MEL_BINS),
    "max_length": _COUNT,
    "max_position_embeddings": _size(_MAX_POSITIONS),
    "num_labels": _size(_MAX_LABELS),
    "problem_type": _one_of(None, "regression", "single_label_classification", "multi_label_classification"),
    "classifier_norm_eps": [
        _Rule(
            lambda value: value is None or (isinstance(value, (int, float)) and value > 0.0),
            "must be positive or None",
        )
    ],
    "classifier_pooling": _one_of(*POOLINGS),
    "pretraining_objective": _one_of(*PRETRAINING_OBJECTIVES),
    "num_clones": _COUNT,
    "mask_prob": [*_SHARE, _Rule(lambda value: 0.0 < value < 1.0, "must leave some patches visible and mask some")],
    "mask_prob_adjust": _NOT_NEGATIVE,
    "mask_block_size": [*_COUNT, _Rule(lambda value: value % 2 == 1, "must be odd, so that a block has a centre")],
    "mask_noise_std": _NOT_NEGATIVE,
    "decoder_num_layers": _size(_MAX_LAYERS),
    "decoder_kernel_size": [
        *_COUNT,
        _Rule(lambda value: value % 2 == 1, "must be odd, so that the grid keeps its size"),
    ],
    "decoder_groups": _COUNT,
    "num_target_layers": _COUNT_OR_NONE,
    "num_global_target_layers": _COUNT_OR_NONE,
    "global_loss_weight": _NOT_NEGATIVE,
    "retention_loss_weight": _NOT_NEGATIVE,
    "ema_decay": _SHARE,
    "ema_end_decay": _SHARE,
    "ema_anneal_end_step": _COUNT,
}


class SSLAMConfig(PretrainedConfig):
    """Configuration of [`SSLAMModel`] and its heads.

    The defaults are the base size of the SSLAM paper (Alex et al., ICLR 2025, arXiv 2506.12222).
    [`SSLAMConfig.large`] is EAT's large size.

    Args:
        hidden_size: Width D of the encoder. A multiple of `num_attention_heads`, and of 4 because the position
            table needs a sine and a cosine for each of two axes.
        num_hidden_layers: Number L of transformer blocks.
        num_attention_heads: Attention heads in each block.
        intermediate_size: Width of the MLP inside each block.
        hidden_act: Activation of the MLP, a key of transformers' `ACT2FN`; "gelu" is the exact GELU.
        hidden_dropout_prob: Dropout on the outputs of attention and MLP.
        attention_probs_dropout_prob: Dropout on the attention probabilities.
        drop_path_rate: Stochastic depth rate of the last block; the rate grows linearly from 0 at the first.
        layer_norm_eps: Epsilon of every LayerNorm of the encoder.
        initializer_range: Standard deviation of the normal distribution of new weights.
        qkv_bias: Whether the query, key and value projections have a bias.
        patch_size: Side of the square patches, in frames and in mel bins.
        num_mel_bins: Mel bins F of the input.
        max_length: Frames T of a clip as the feature extractor pads it (10 ms each). The model itself takes any
            multiple of `patch_size` up to the position table.
        max_position_embeddings: Length of the position table in time patches: 768 are about two minutes.
        classifier_norm_eps: Epsilon of the LayerNorm in the classification head: 1e-6 in fairseq checkpoints,
            1e-5 in the published Hub layout. `None` is a head without a norm, as the Earth Species Project's.
        classifier_pooling: Input of the head. "cls": the CLS token. "mean": the mean over patch tokens. "lin_softmax":
            the head scores every patch token with a probability p and returns the logit of sum(p^2) / sum(p).
        pretraining_objective: Selects the losses that [`SSLAMForPreTraining`] sums. "ua": unmixed audio (EAT's
            objective and SSLAM's first stage). "pma": partially mixed audio. "ua+pma": both. "sslam": both and the
            source retention loss (SSLAM's second stage).
        num_clones: Masked copies C of each clip that the student sees (stage 1: 16, stage 2: 8).
        mask_prob: Share of the patches that are masked.
        mask_prob_adjust: Added to the visible share when blocks are counted, because blocks overlap.
        mask_block_size: Side of the square blocks of visible patches, in patches.
        mask_noise_std: Standard deviation of the noise that replaces masked patches at the decoder's input.
        decoder_num_layers: Convolutional layers of the decoder.
        decoder_kernel_size: Kernel size of these layers, an odd number of patches.
        decoder_groups: Convolution groups of these layers; a divisor of `hidden_size`.
        num_target_layers: Number K of the teacher's last blocks that local targets average; `None` means all.
        num_global_target_layers: The same number for the global target. `None` means all blocks for the objective "ua"
            and only the last for the others, as published.
        global_loss_weight: Weight of the global (CLS) losses.
        retention_loss_weight: Weight of the source retention loss.
        ema_decay: EMA decay of the teacher at the first update.
        ema_end_decay: EMA decay from update `ema_anneal_end_step` on.
        ema_anneal_end_step: Updates over which the decay changes linearly from `ema_decay` to `ema_end_decay`.

    Raises:
        ValueError: If a field has a wrong value or contradicts another; the message names the field to change.

    Example:
    ```python
    >>> from modeling_sslam import SSLAMConfig, SSLAMModel

    >>> model = SSLAMModel(SSLAMConfig(num_hidden_layers=2))
    >>> model.config.hidden_size
    768
    ```
    """

    model_type = "sslam"

    # Transformers 5 turns these annotations into dataclass fields; transformers 4 leaves them to `__init__`.
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.0
    attention_probs_dropout_prob: float = 0.0
    drop_path_rate: float = 0.0
    layer_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    qkv_bias: bool = True
    patch_size: int = 16
    num_mel_bins: int = 128
    max_length: int = 1024
    max_position_embeddings: int = 768
    classifier_norm_eps: float | None = 1e-6
    classifier_pooling: str = "cls"
    pretraining_objective: str = "sslam"
    num_clones: int = 8
    mask_prob: float = 0.8
    mask_prob_adjust: float = 0.07
    mask_block_size: int = 5
    mask_noise_std: float = 0.01
    decoder_num_layers: int = 6
    decoder_kernel_size: int = 3
    decoder_groups: int = 16
    num_target_layers: int | None = None
    num_global_target_layers: int | None = None
    global_loss_weight: float = 1.0
    retention_loss_weight: float = 2.0
    ema_decay: float = 0.9998
    ema_end_decay: float = 0.99999
    ema_anneal_end_step: int = 100_000

    def __init__(self, **kwargs: Any) -> None:
        fields = {name: kwargs.pop(name, getattr(SSLAMConfig, name)) for name in _FIELDS}
        # The base class makes a name for each class, so check the number of classes first.
        num_labels = kwargs.get("num_labels")
        for rule in _RULES["num_labels"] if num_labels is not None else ():
            if not rule.holds(num_labels):
                raise ValueError(f"SSLAMConfig: num_labels={reprlib.repr(num_labels)} {rule.message}.")
        # The base class comes first, because transformers 4 sets generation defaults there: `max_length` to 20.
        super().__init__(**kwargs)
        for name, value in fields.items():
            setattr(self, name, value)
        self.validate_architecture()

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | PathLike[Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Read a config.json as transformers does; one in a published layout is turned into ours."""
        settings, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return _as_ours(settings), unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Create a configuration as transformers does; settings of a published layout are turned into ours.

        `AutoConfig` reads the file itself and calls this.
        """
        return super().from_dict(_as_ours(config_dict), **kwargs)

    @classmethod
    def large(cls, **overrides: Any) -> "SSLAMConfig":
        """Create EAT's large size (24 blocks of width 1024) with its decoder, masks and EMA schedule."""
        preset: dict[str, Any] = {
            "hidden_size": 1024,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "intermediate_size": 4096,
            "mask_prob": 0.75,
            "mask_prob_adjust": 0.1,
            "decoder_num_layers": 3,
            "decoder_kernel_size": 5,
            "ema_anneal_end_step": 150_000,
        }
        return cls(**(preset | overrides))

    @property
    def num_mel_patches(self) -> int:
        """Patches along the mel axis: 8 for 128 bins. The patch grid is (time, mel)."""
        return self.num_mel_bins // self.patch_size

    def validate_architecture(self) -> None:
        """Check every field, and the fields against each other.

        The constructor calls this. Models call it again, because fields given to `from_pretrained` are set on the
        finished configuration.

        Raises:
            ValueError: If a field has a wrong value or contradicts another; the message names the field to change.
        """
        # Imported here because it is slow: transformers.activations imports accelerate where that is installed.
        from transformers.activations import ACT2FN

        for field, rules in {"hidden_act": _one_of(*ACT2FN), **_RULES}.items():
            value = getattr(self, field)
            for rule in rules:
                if not rule.holds(value):
                    raise self._error(field, rule.message)
        for field, message in self._contradictions():
            raise self._error(field, message)

    def _error(self, field: str, message: str) -> ValueError:
        return ValueError(f"SSLAMConfig: {field}={reprlib.repr(getattr(self, field))} {message}.")

    def _contradictions(self) -> Iterator[tuple[str, str]]:
        """Yield each field that contradicts another, with the end of its error message."""
        heads, patch, layers = self.num_attention_heads, self.patch_size, self.num_hidden_layers
        if self.hidden_size % heads:
            yield "hidden_size", f"is not divisible by num_attention_heads={heads}; change one of the two"
        if self.hidden_size % 4:
            yield (
                "hidden_size",
                "is not divisible by 4, which the 2-D sine-cosine positions need; choose a multiple of 4",
            )
        if self.hidden_size % self.decoder_groups:
            yield "decoder_groups", f"does not divide hidden_size={self.hidden_size}; choose a divisor of it"
        for field in ("num_mel_bins", "max_length"):
            if getattr(self, field) % patch:
                yield field, f"is not a multiple of patch_size={patch}; change one of the two"
        if self.max_position_embeddings * self.num_mel_patches > _MAX_POSITIONS:
            yield (
                "max_position_embeddings",
                f"makes a position table of more than {_MAX_POSITIONS} tokens with {self.num_mel_patches} patches of "
                "mel bins; lower it",
            )
        if self.max_length > self.max_position_embeddings * patch:
            yield (
                "max_length",
                f"exceeds the position table of {self.max_position_embeddings} patches of {patch} frames; shorten it "
                "or raise max_position_embeddings",
            )
        for field in ("num_target_layers", "num_global_target_layers"):
            value = getattr(self, field)
            if value is not None and value > layers:
                yield field, f"must be None or lie between 1 and num_hidden_layers={layers}"

    def _get_non_default_generation_parameters(self) -> dict[str, Any]:
        # Transformers 4 takes `max_length` for the length of generated text and would warn on every save.
        return {}


def _as_ours(settings: dict[str, Any]) -> dict[str, Any]:
    layout = published_layout(settings)
    return settings if layout is None else layout.settings(settings)


_FIELDS = tuple(SSLAMConfig.__annotations__)

SSLAMConfig.register_for_auto_class()

__all__ = ["SSLAMConfig"]

"""The settings of SSLAM: encoder, classifier and pre-training objective in one configuration."""

from typing import Any

from transformers import PretrainedConfig

PRETRAINING_OBJECTIVES = ("ua", "pma", "ua+pma", "sslam")
POOLINGS = ("cls", "mean", "lin_softmax")

# What `SSLAMConfig.validate_architecture` requires of single fields.
_COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "patch_size",
    "num_mel_bins",
    "max_length",
    "max_position_embeddings",
    "num_labels",
    "num_clones",
    "mask_block_size",
    "decoder_num_layers",
    "decoder_kernel_size",
    "decoder_groups",
    "ema_anneal_end_step",
)
_SHARES = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "drop_path_rate",
    "mask_prob",
    "ema_decay",
    "ema_end_decay",
)
_POSITIVE = ("layer_norm_eps", "classifier_norm_eps")
_NOT_NEGATIVE = (
    "initializer_range",
    "mask_prob_adjust",
    "mask_noise_std",
    "global_loss_weight",
    "retention_loss_weight",
)
_CHOICES = {
    "classifier_pooling": POOLINGS,
    "pretraining_objective": PRETRAINING_OBJECTIVES,
    "problem_type": (None, "regression", "single_label_classification", "multi_label_classification"),
}


class SSLAMConfig(PretrainedConfig):
    """Configuration of [`SSLAMModel`] and its heads. The defaults are the base size of the SSLAM paper
    (Alex et al., ICLR 2025, arXiv 2506.12222); [`SSLAMConfig.large`] is EAT's large size.

    Args:
        hidden_size: Width D of the encoder. A multiple of `num_attention_heads` and of 4 (the position table
            needs a sine and a cosine for each of two axes).
        num_hidden_layers: Number L of transformer blocks.
        num_attention_heads: Attention heads in each block.
        intermediate_size: Width of the MLP inside each block.
        hidden_act: Activation of the MLP, a name that transformers' `ACT2FN` knows; "gelu" is the exact one.
        hidden_dropout_prob: Dropout on the outputs of attention and MLP.
        attention_probs_dropout_prob: Dropout on the attention probabilities.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        layer_norm_eps: Epsilon of every LayerNorm of the encoder.
        initializer_range: Standard deviation of the normal distribution that new weights are drawn from.
        qkv_bias: Whether the query, key and value projections have a bias.
        patch_size: Side of the square patches, in frames and in mel bins.
        num_mel_bins: Mel bins F of the input.
        max_length: Frames T of a clip as the feature extractor pads it (10 ms each). The model itself takes any
            multiple of `patch_size` up to the position table.
        max_position_embeddings: Length of the position table in time patches: 768 are about two minutes.
        classifier_norm_eps: Epsilon of the LayerNorm in the classification head: 1e-6 in fairseq checkpoints,
            1e-5 in the published Hub layout.
        classifier_pooling: What the head classifies. "cls": the CLS token. "mean": the mean over patch tokens.
            "lin_softmax": the logit of sum(p^2) / sum(p) over patch tokens, p their sigmoid.
        pretraining_objective: Which of the five losses [`SSLAMForPreTraining`] sums. "ua": unmixed audio, which is
            EAT's objective and SSLAM's first stage. "pma": partially mixed audio. "ua+pma": both. "sslam": both and
            the source retention loss, SSLAM's second stage.
        num_clones: Masked copies C of each clip that the student sees (stage 1: 16, stage 2: 8).
        mask_prob: Share of the patches that is masked.
        mask_prob_adjust: Added to the visible share when block centres are counted, since blocks overlap.
        mask_block_size: Side of the square blocks of visible patches, in patches.
        mask_noise_std: Standard deviation of the noise that stands for masked patches at the decoder's input.
        decoder_num_layers: Convolutional layers of the decoder.
        decoder_kernel_size: Their kernel size, an odd number of patches.
        decoder_groups: Their groups; a divisor of `hidden_size`.
        num_target_layers: The teacher's last K blocks that local targets average; `None` means all.
        num_global_target_layers: The same for the global target; `None` means all for the objective "ua" and the
            last alone for the others, as published.
        global_loss_weight: Weight of the global (CLS) losses.
        retention_loss_weight: Weight of the source retention loss.
        ema_decay: The teacher's decay at the first update.
        ema_end_decay: Its decay from update `ema_anneal_end_step` on.
        ema_anneal_end_step: Updates over which the decay goes linearly from the first to the second.

    Raises:
        ValueError: If the fields contradict each other; the message names the field to change.

    Example:

    ```python
    >>> from modeling_sslam import SSLAMConfig, SSLAMModel

    >>> model = SSLAMModel(SSLAMConfig(num_hidden_layers=2))
    >>> model.config.hidden_size
    768
    ```
    """

    model_type = "sslam"

    # Transformers 5 makes dataclass fields of these; transformers 4 leaves them to `__init__`.
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
    classifier_norm_eps: float = 1e-6
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
        # The base class first: transformers 4 sets generation defaults there, a `max_length` of 20 among them.
        super().__init__(**kwargs)
        for name, value in fields.items():
            setattr(self, name, value)
        self.validate_architecture()

    @classmethod
    def large(cls, **overrides: Any) -> "SSLAMConfig":
        """EAT's large size (24 blocks of width 1024) with its decoder, masks and EMA schedule."""
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
        """Patches along the mel axis (8 for 128 bins); the patch grid is time x this."""
        return self.num_mel_bins // self.patch_size

    def validate_architecture(self) -> None:
        """Raises the ValueError described above. Models check once more, since fields given to `from_pretrained` are
        set on the finished configuration."""
        # Here, as it is slow to import: its module brings accelerate along where that is installed.
        from transformers.activations import ACT2FN

        def require(condition: bool, field: str, remedy: str) -> None:
            if not condition:
                raise ValueError(f"SSLAMConfig: {field}={getattr(self, field)!r} {remedy}.")

        for field in _COUNTS:
            value = getattr(self, field)
            require(isinstance(value, int) and value > 0, field, "must be a positive integer")
        for field in (*_SHARES, *_POSITIVE, *_NOT_NEGATIVE):
            require(isinstance(getattr(self, field), (int, float)), field, "must be a number")
        for field in _SHARES:
            require(0.0 <= getattr(self, field) <= 1.0, field, "must lie between 0 and 1")
        for field in _POSITIVE:
            require(getattr(self, field) > 0.0, field, "must be positive")
        for field in _NOT_NEGATIVE:
            require(getattr(self, field) >= 0.0, field, "must not be negative")
        for field, choices in {"hidden_act": tuple(ACT2FN), **_CHOICES}.items():
            require(getattr(self, field) in choices, field, f"is not one of {', '.join(map(str, choices))}")
        require(0.0 < self.mask_prob < 1.0, "mask_prob", "must leave some patches visible and mask some")

        heads, patch, layers = self.num_attention_heads, self.patch_size, self.num_hidden_layers
        require(
            self.hidden_size % heads == 0,
            "hidden_size",
            f"is not divisible by num_attention_heads={heads}; change one of the two",
        )
        require(
            self.hidden_size % 4 == 0,
            "hidden_size",
            "is not divisible by 4, which the 2-D sine-cosine positions need; choose a multiple of 4",
        )
        require(
            self.hidden_size % self.decoder_groups == 0,
            "decoder_groups",
            f"does not divide hidden_size={self.hidden_size}; choose a divisor of it",
        )
        for field in ("num_mel_bins", "max_length"):
            require(
                getattr(self, field) % patch == 0,
                field,
                f"is not a multiple of patch_size={patch}; change one of the two",
            )
        require(
            self.max_length <= self.max_position_embeddings * patch,
            "max_length",
            f"exceeds the position table of {self.max_position_embeddings} patches of {patch} frames; shorten it or "
            "raise max_position_embeddings",
        )
        require(self.mask_block_size % 2 == 1, "mask_block_size", "must be odd, so that a block has a centre")
        require(
            self.decoder_kernel_size % 2 == 1, "decoder_kernel_size", "must be odd, so that the grid keeps its size"
        )
        for field in ("num_target_layers", "num_global_target_layers"):
            value = getattr(self, field)
            require(
                value is None or (isinstance(value, int) and 1 <= value <= layers),
                field,
                f"must be None or lie between 1 and num_hidden_layers={layers}",
            )

    def _get_non_default_generation_parameters(self) -> dict[str, Any]:
        # Transformers 4 would take `max_length` for the length of generated text and warn on every save.
        return {}


_FIELDS = tuple(SSLAMConfig.__annotations__)

SSLAMConfig.register_for_auto_class()

__all__ = ["SSLAMConfig"]

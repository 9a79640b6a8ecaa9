"""Settings of a linear evaluation."""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from modeling_sslam.configuration_sslam import POOLINGS as MODEL_POOLINGS
from training.arguments import same_field
from training.classification.classifier import FeatureOverrides
from training.data.augmentation import AugmentationConfig
from training.data.config import LabelledDataConfig
from training.finetune import FinetuneConfig, FinetuneOptimizerConfig
from training.linear.features import FEATURE_POOLINGS
from training.linear.heads import FINAL_LEARNING_RATE, HeadConfig
from training.linear.options import (
    AttentiveConfig,
    FewShotConfig,
    ForestConfig,
    NeighbourConfig,
    PrototypeConfig,
    RidgeConfig,
    Rival,
)
from training.run.config import CheckpointConfig, WatchConfig
from training.run.losses import Loss

PROTOCOLS = {
    "cached": "cached mode: features of the frozen encoder computed once, without augmentation, and linear "
    "heads fitted on them",
    "cached, kinds": "cached mode: features of the frozen encoder computed once, without augmentation, and "
    "heads of the kinds {kinds} fitted on them",
    "published": "published mode: features of the frozen encoder computed again in every epoch, with augmentation",
}
ALL_POOLINGS = (*FEATURE_POOLINGS, "cls+mean", "max+std", "mean+max+std")


@dataclass(kw_only=True)
class LinearEvalConfig:
    """All settings of a linear evaluation: those of `training.finetune` under the same keys, and further ones.

    The encoder is frozen, and `head` has the settings of the fit. These settings therefore have no effect:
    `freeze_encoder`, `max_updates`, `epochs`, `warmup_fraction`, and the learning rates, warm-up, layer decay, betas
    and weight decay of `optimizer`.
    """

    # Both modes.
    output_dir: Path = field(metadata={"help": "Folder of the results, on a disk that all processes share."})
    model: str = same_field(FinetuneConfig, "model")
    data: LabelledDataConfig
    features: FeatureOverrides
    head: HeadConfig
    mode: Literal["cached", "published"] = field(
        default="cached", metadata={"help": "How features are computed: see the top of this help."}
    )
    validation_source: str | None = same_field(FinetuneConfig, "validation_source")
    validation_split: str = same_field(FinetuneConfig, "validation_split")
    test_split: str | None = field(
        default="test",
        metadata={"help": "Split to test on. null: test on the validation split, which also chooses the epoch."},
    )
    folds: list[str] = field(
        default_factory=list,
        metadata={"help": "Splits for cross-validation: each is the test split once, and the others train."},
    )
    label_file: str | None = same_field(FinetuneConfig, "label_file")
    problem_type: Literal["auto", "single", "multi"] = field(
        default="auto",
        metadata={"help": "Whether clips have one label or any number. auto: single if every clip has exactly one."},
    )
    loss: Loss | None = field(
        default=None,
        metadata={
            "help": "Binary cross-entropy per target or per clip, or cross-entropy.",
            "default": "cross_entropy for one label per clip, bce_per_target for several",
        },
    )
    label_smoothing: float = same_field(FinetuneConfig, "label_smoothing")
    classifier_pooling: Literal["cls", "mean", "lin_softmax"] | None = same_field(FinetuneConfig, "classifier_pooling")
    seed: int = same_field(FinetuneConfig, "seed")
    batch_size: int = field(default=48, metadata={"help": "Clips per device and forward pass of the encoder."})
    mixed_precision: Literal["no", "fp16", "bf16"] | None = same_field(FinetuneConfig, "mixed_precision")
    memory: Literal["auto", "fast", "small"] = same_field(FinetuneConfig, "memory")
    compile: bool = same_field(FinetuneConfig, "compile")
    new_weights: bool = field(
        default=False, metadata={"help": "Evaluate the architecture with new (random) weights, for comparison."}
    )
    layers: list[str] = field(
        default_factory=lambda: ["last"],
        metadata={
            "help": "Layers to fit heads on: 0 (the embeddings), 1 (after block 1), ..., last, all (every layer by "
            "itself), concat (pooled features of all layers side by side; not for the kinds attentive and "
            "prototypes). The kind layers reads all layers in any case.",
            "default": "last",
        },
    )
    poolings: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Poolings to fit heads on: {', '.join(FEATURE_POOLINGS)}, concatenations such as cls+mean, or "
            "all.",
            "default": "the model's own",
        },
    )

    # Cached mode.
    ridge: RidgeConfig
    attentive: AttentiveConfig
    prototypes: PrototypeConfig
    knn: NeighbourConfig
    few_shot: FewShotConfig
    forest: ForestConfig
    compare: list[Rival] = field(
        default_factory=list,
        metadata={
            "help": "Rivals to add to the encoder's tables. new_weights: the same architecture with new (random) "
            "weights and the same heads. mfcc_forest: statistics of cepstral coefficients and a random forest.",
            "default": "none",
        },
    )
    token_cache_gib: float = field(
        default=32.0,
        metadata={
            "help": "Limit of the cached patch tokens of a split in GiB. Only the kinds attentive and prototypes read "
            "them, and only the chosen layers are cached."
        },
    )
    cache_dir: Path = field(
        default=Path("runs/features"), metadata={"help": "Folder for cached features, shared by all evaluations."}
    )
    cache_dtype: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "Type of cached features; float16 halves their size."}
    )

    # Published mode.
    optimizer: FinetuneOptimizerConfig
    augmentation: AugmentationConfig
    checkpoint: CheckpointConfig
    watch: WatchConfig
    resume: Literal["no", "auto"] = same_field(FinetuneConfig, "resume")
    allow_changed_config: bool = same_field(FinetuneConfig, "allow_changed_config")
    gradient_accumulation_steps: int = same_field(FinetuneConfig, "gradient_accumulation_steps")
    gradient_checkpointing: bool = same_field(FinetuneConfig, "gradient_checkpointing")
    drop_path_rate: float = same_field(FinetuneConfig, "drop_path_rate")
    evaluate_every: int | None = same_field(FinetuneConfig, "evaluate_every")
    patience: int | None = same_field(FinetuneConfig, "patience")

    # No effect: accepted because fine-tuning configurations have them.
    freeze_encoder: bool = same_field(FinetuneConfig, "freeze_encoder")
    max_updates: int | None = same_field(FinetuneConfig, "max_updates")
    epochs: float | None = same_field(FinetuneConfig, "epochs")
    warmup_fraction: float | None = same_field(FinetuneConfig, "warmup_fraction")

    def __post_init__(self) -> None:
        self.finetuning()  # checks the settings that both programs have
        if self.mode == "cached" and self.data.sample_weights is not None:
            raise ValueError("data.sample_weights has no effect on cached features; use mode=published")
        if self.mode == "published" and (
            self.head.kinds != ["linear"]
            or self.compare
            or self.few_shot.shots
            or self.head.learning_rates
            or self.head.weight_decays
        ):
            raise ValueError(
                "mode=published fits one linear head; head.kinds, head.learning_rates, head.weight_decays, compare "
                "and few_shot are for mode=cached"
            )
        if self.new_weights and "new_weights" in self.compare:
            raise ValueError(
                "With new_weights true, the encoder has new weights already; leave new_weights out of compare"
            )
        if not self.token_cache_gib > 0:
            raise ValueError(f"token_cache_gib={self.token_cache_gib} must be positive")
        if self.mode == "published" and (self.layers != ["last"] or len(self.poolings or ["cls"]) != 1):
            raise ValueError(
                "mode=published fits one head, on the last layer; sweeps over layers and poolings are for mode=cached"
            )
        if self.mode == "published" and self.poolings and self.poolings[0] not in MODEL_POOLINGS:
            raise ValueError(f"poolings={self.poolings[0]}: mode=published has {', '.join(MODEL_POOLINGS)}")

    def finetuning(self) -> FinetuneConfig:
        """Return the settings with which `training.finetune` fits a head on the frozen encoder.

        Raises:
            ValueError: If a setting is out of range.
        """
        shared = {item.name: getattr(self, item.name) for item in fields(FinetuneConfig)}
        fitting = {
            "freeze_encoder": True,
            "max_updates": None,
            "warmup_fraction": None,
            "epochs": float(self.head.epochs),
            "optimizer": replace(
                self.optimizer,
                learning_rate=self.head.learning_rate,
                final_learning_rate=FINAL_LEARNING_RATE,
                warmup_updates=0,
                layer_decay=1.0,
                betas=self.head.betas,
                weight_decay=self.head.weight_decay,
            ),
        }
        return FinetuneConfig(**shared | fitting)

"""TODO."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from modeling_sslam.configuration_sslam import POOLINGS as MODEL_POOLINGS
from training.finetune import FinetuneConfig
from training.linear.features import FEATURE_POOLINGS
from training.linear.heads import FINAL_LEARNING_RATE, HeadConfig

PROTOCOLS = {
    "cached": "fast mode (cached): features of the frozen encoder computed once, without augmentation, and linear "
    "heads fitted on them",
    "published": "published mode: features of the frozen encoder computed anew in every epoch, under augmentation",
}


ALL_POOLINGS = (*FEATURE_POOLINGS, "cls+mean")


@dataclass(kw_only=True)
class LinearEvalConfig(FinetuneConfig):
    """All settings of a linear evaluation."""

    head: HeadConfig
    mode: Literal["cached", "published"] = field(default="cached", metadata={"help": "See the top."})
    batch_size: int = field(default=48, metadata={"help": "Clips per device and forward pass of the encoder."})
    test_split: str | None = field(
        default="test",
        metadata={"help": "Split that the results are of; null: the validation split, which also chose the epoch."},
    )
    layers: list[str] = field(
        default_factory=lambda: ["last"],
        metadata={
            "help": "Layers to fit heads on: 0 (the embeddings), 1 (after block 1), ..., last, or all.",
            "default": "last",
        },
    )
    poolings: list[str] | None = field(
        default=None,
        metadata={
            "help": f"Poolings to fit heads on: {', '.join(FEATURE_POOLINGS)}, concatenations such as cls+mean, or all.",
            "default": "the model's own",
        },
    )
    random_weights: bool = field(
        default=False, metadata={"help": "Evaluate new weights in the architecture of the model, to compare with."}
    )
    cache_dir: Path = field(
        default=Path("runs/features"), metadata={"help": "Folder for cached features, shared by all evaluations."}
    )
    cache_dtype: Literal["float32", "float16"] = field(
        default="float32", metadata={"help": "Of cached features; float16 halves their size."}
    )

    def __post_init__(self) -> None:
        # What a fine-tuning configuration says about training the encoder does not hold for a head.
        self.freeze_encoder = True
        self.max_updates, self.warmup_fraction, self.epochs = None, None, float(self.head.epochs)
        self.optimizer = replace(
            self.optimizer,
            learning_rate=self.head.learning_rate,
            final_learning_rate=FINAL_LEARNING_RATE,
            warmup_updates=0,
            layer_decay=1.0,
            betas=self.head.betas,
            weight_decay=self.head.weight_decay,
        )
        super().__post_init__()
        if self.mode == "cached" and self.data.sample_weights is not None:
            raise ValueError("data.sample_weights has no effect on cached features; use mode=published")
        if self.mode == "published" and (self.layers != ["last"] or len(self.poolings or ["cls"]) != 1):
            raise ValueError(
                "mode=published fits one head, on the last layer; sweeps over layers and poolings are for mode=cached"
            )
        if self.mode == "published" and self.poolings and self.poolings[0] not in MODEL_POOLINGS:
            raise ValueError(f"poolings={self.poolings[0]}: mode=published has {', '.join(MODEL_POOLINGS)}")

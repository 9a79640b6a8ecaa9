"""Settings of the kinds of heads other than linear, of few-shot evaluation and of the random forest."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass
class AttentiveConfig:
    """Attentive pooling: learned queries over the patch tokens of a layer, a softmax, and a linear layer."""

    queries: int = field(default=4, metadata={"help": "Queries of a head. Their pooled tokens are concatenated."})
    learning_rate: float = field(default=3e-2, metadata={"help": "Learning rate of the first update."})
    epochs: int = field(default=20, metadata={"help": "Passes over the training clips."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled weight decay."})

    def __post_init__(self) -> None:
        check_fit(self, "attentive", "queries")


@dataclass
class PrototypeConfig:
    """Prototypical probing: the greatest cosine similarity of each prototype to a patch token, and a linear layer."""

    per_class: int = field(
        default=5,
        metadata={
            "help": "Number of prototypes for each class that has a training clip. All classes share all prototypes."
        },
    )
    binary: bool = field(
        default=True, metadata={"help": "Restrict the components of a prototype to -1 and 1, one bit each."}
    )
    learning_rate: float = field(default=3e-2, metadata={"help": "Learning rate of the first update."})
    epochs: int = field(default=20, metadata={"help": "Passes over the training clips."})
    weight_decay: float = field(default=0.05, metadata={"help": "Decoupled weight decay."})

    def __post_init__(self) -> None:
        check_fit(self, "prototypes", "per_class")


@dataclass
class RidgeConfig:
    """Ridge regression of the targets on pooled features that are standardised over the training clips."""

    strengths: list[float] = field(
        default_factory=lambda: [0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0],
        metadata={
            "help": "Factors of the squared weights beside the mean squared error over clips. Validation chooses one."
        },
    )

    def __post_init__(self) -> None:
        if not self.strengths or not min(self.strengths) > 0:
            raise ValueError(f"ridge.strengths={self.strengths} must be one number or more, each positive")


@dataclass
class NeighbourConfig:
    """Nearest neighbours: the mean label of the k nearest training clips, weighted by their cosine similarity."""

    neighbours: list[int] = field(
        default_factory=lambda: [1, 3, 5, 10, 20],
        metadata={"help": "Values of k. Validation chooses one."},
    )

    def __post_init__(self) -> None:
        if not self.neighbours or min(self.neighbours) < 1:
            raise ValueError(f"knn.neighbours={self.neighbours} must be one number or more, each at least 1")


@dataclass
class FewShotConfig:
    """Few-shot evaluation: classification by the nearest class mean of a few training clips, drawn many times."""

    shots: int = field(default=0, metadata={"help": "Training clips drawn for each class. 0: no few-shot evaluation."})
    draws: int = field(default=50, metadata={"help": "Number of draws. `seed` determines them."})

    def __post_init__(self) -> None:
        if self.shots < 0 or self.draws < 1:
            raise ValueError(f"few_shot: shots={self.shots} must be at least 0 and draws={self.draws} at least 1")


@dataclass
class ForestConfig:
    """The baseline `mfcc_forest`: statistics of cepstral coefficients and a random forest."""

    coefficients: int = field(default=13, metadata={"help": "Number of cepstral coefficients."})
    trees: int = field(default=500, metadata={"help": "Number of trees."})

    def __post_init__(self) -> None:
        if min(self.coefficients, self.trees) < 1:
            raise ValueError(f"forest: coefficients={self.coefficients} and trees={self.trees} must be at least 1")


Rival = Literal["new_weights", "mfcc_forest"]


def check_fit(config: AttentiveConfig | PrototypeConfig, section: str, size: str) -> None:
    """Check the settings that both kinds of heads on patch tokens have.

    Args:
        config: The settings.
        section: Name of their section.
        size: Name of the setting that determines the head's size.

    Raises:
        ValueError: If a setting is out of range.
    """
    for name in (size, "epochs"):
        if getattr(config, name) < 1:
            raise ValueError(f"{section}.{name}={getattr(config, name)} must be at least 1")
    if not config.learning_rate > 0:
        raise ValueError(f"{section}.learning_rate={config.learning_rate} must be positive")
    if config.weight_decay < 0:
        raise ValueError(f"{section}.weight_decay={config.weight_decay} must not be negative")

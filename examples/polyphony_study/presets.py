"""Sizes of the study, as settings of every program that it runs.

The recipes are the configuration files. A preset names them, and overrides settings to fit its time.
"""

from dataclasses import dataclass
from pathlib import Path

from examples.steps.step import Options

CONFIGS = Path("training/configs")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of a study.

    Attributes:
        seeds: The seeds. Each repeats the whole study.
        scenes: Options of `training.soundscapes`.
        synthesis: Further options of `training.soundscapes` without recordings.
        mixing: Further options of `training.soundscapes` with recordings.
        programs: Options of all training programs.
        stage1: Options of `training.pretrain` in stage 1.
        stage2: Options of `training.pretrain` in stage 2.
        finetuning: Options of `training.finetune`.
        probes: Options of `training.linear_eval` for all kinds of probes.
        linear: Further options of the linear probe.
        prototypes: Further options of the prototype probe.
        processes: Number of seeds that run at the same time, each in a process of its own.
        minutes: Minutes after which the study stops; `None` for no limit.
    """

    seeds: tuple[int, ...]
    scenes: Options
    synthesis: Options
    mixing: Options
    programs: Options
    stage1: Options
    stage2: Options
    finetuning: Options
    probes: Options
    linear: Options
    prototypes: Options
    processes: int = 1
    minutes: float | None = None


# A crop of the tiny recipes has 2.56 s. The ranges of event lengths below end at the length of a scene.
_TINY_SCENES: Options = {"clips": 4000, "seconds": 2.58}

CPU = Preset(
    seeds=(0, 1, 2),
    scenes=_TINY_SCENES,
    synthesis={"max-sources": 5, "held-out": 0.15},
    mixing={"max-sources": 4, "event-seconds": [0.5, 2.5], "splits": ["train=0.7", "validation=0.15", "test=0.15"]},
    programs={"data.num_workers": 1, "watch.tracker": "none"},
    stage1={"config": CONFIGS / "pretrain_tiny.yaml"},
    stage2={"config": CONFIGS / "pretrain_tiny_stage2.yaml"},
    finetuning={"config": CONFIGS / "finetune_tiny.yaml"},
    probes={"problem_type": "multi"},
    linear={"layers": "all", "poolings": ["mean", "max+std"]},
    prototypes={"layers": "last"},
)

# docs/polyphony_study.md has the arithmetic behind these sizes. Nothing is compiled: compiling five graphs in three
# processes would take longer than it saves in so few updates.
H200 = Preset(
    seeds=(0, 1, 2),
    scenes={"clips": 4000, "seconds": 5.14},
    synthesis={"max-sources": 5, "held-out": 0.15},
    mixing={"max-sources": 4, "splits": ["train=0.7", "validation=0.15", "test=0.15"]},
    programs={
        "data.num_workers": 4,
        "data.front_end": "device",
        "mixed_precision": "bf16",
        "watch.tracker": "none",
    },
    stage1={
        "config": CONFIGS / "pretrain_tiny.yaml",
        "model.hidden_size": 384,
        "model.num_hidden_layers": 12,
        "model.num_attention_heads": 6,
        "model.intermediate_size": 1536,
        "model.max_length": 512,
        "model.max_position_embeddings": 64,
        "model.num_clones": 4,
        "model.decoder_num_layers": 4,
        # The global loss is a sum over the clips of a device; this is its weight for 12 clips, as published.
        "model.global_loss_weight": 0.25,
        "batch_size": 48,
        "max_updates": 800,
        "optimizer.learning_rate": 5e-4,
        "optimizer.warmup_updates": 80,
        "checkpoint.every": 200,
    },
    stage2={
        "config": CONFIGS / "pretrain_tiny_stage2.yaml",
        "model.num_clones": 4,
        "batch_size": 48,
        "max_updates": 200,
        "optimizer.learning_rate": 2e-4,
        "optimizer.warmup_updates": 20,
        "checkpoint.every": 200,
    },
    finetuning={
        "config": CONFIGS / "finetune_tiny.yaml",
        "batch_size": 48,
        "max_updates": 200,
        "optimizer.learning_rate": 5e-4,
        "optimizer.warmup_updates": 20,
        "evaluate_every": 100,
        "checkpoint.every": 200,
    },
    probes={"problem_type": "multi", "batch_size": 256, "head.batch_size": 256},
    linear={"layers": "all", "poolings": ["mean", "max+std"], "head.learning_rate": 3e-3, "head.epochs": 30},
    prototypes={"layers": "last"},
    processes=3,
    minutes=8.0,
)

PRESETS = {"cpu": CPU, "h200": H200}

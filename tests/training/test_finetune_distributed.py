"""Fine-tuning in several processes (accelerate's launcher, gloo)."""

import csv
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification
from training.data.config import LabelledDataConfig
from training.data.labels import LabelSet
from training.data.loader import make_loader
from training.data.sources import open_source
from training.run.checkpointing import list_checkpoints
from training.run.losses import loss_sum, loss_weight
from training.run.metrics_log import read_metrics
from training.soundscapes.__main__ import make_row

pytestmark = pytest.mark.slow

CLASSES = ["a", "b", "c"]


@pytest.fixture
def model(make_config, tmp_path) -> Path:
    """A classifier for the data's classes, so that fine-tuning keeps its head."""
    torch.manual_seed(0)
    config = make_config(id2label=dict(enumerate(CLASSES)), problem_type="multi_label_classification")
    SSLAMForAudioClassification(config).save_pretrained(tmp_path / "model")
    SSLAMFeatureExtractor(num_mel_bins=32, max_length=64).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def table(tmp_path) -> Path:
    """17 training clips with up to three labels, and 7 validation clips: two processes cannot share them evenly."""
    rows = []
    for i in range(24):
        row = make_row(("train", i), seed=0, duration=0.8, rate=16_000, max_sources=2)
        (tmp_path / f"clip{i:02d}.flac").write_bytes(row["audio"]["bytes"])
        rows.append((f"clip{i:02d}.flac", ";".join(CLASSES[: i % 4]), "train" if i < 17 else "validation"))
    with open(tmp_path / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "labels", "split"), *rows])
    return tmp_path / "clips.csv"


def test_two_processes_give_the_gradient_of_one_batch_and_count_every_clip_once(launch, model, table, tmp_path):
    arguments = [
        *("-m", "training.finetune", "--model", model, "--data", table, "--batch_size=2", "--max_updates=4"),
        *("--data.num_workers=0", "--watch.every=1", "--watch.tracker=none", "--checkpoint.every=2", "--resume=auto"),
        *("--problem_type=multi", "--drop_path_rate=0", "--evaluate_every=2", "--gradient_accumulation_steps=2"),
        *("--augmentation.roll_and_gain=false", "--augmentation.mixup_alpha=0", "--augmentation.mask_ratio=0"),
    ]
    labels = LabelSet(CLASSES)
    (tmp_path / "labels.csv").write_text("\n".join(CLASSES))
    launch(*arguments, "--output_dir", tmp_path / "run")

    # The first update, computed with all its clips in one batch.
    classifier = SSLAMForAudioClassification.from_pretrained(model).train()
    extractor = SSLAMFeatureExtractor.from_pretrained(model)
    batches = []
    for rank in range(2):
        config = LabelledDataConfig(str(table), num_workers=0)
        loader = make_loader(open_source(config), extractor, batch_size=2, seed=0, rank=rank, world_size=2)
        iterator = iter(loader)
        batches += [next(iterator) for _ in range(2)]
    targets = labels.encode([names for batch in batches for names in batch["labels"]])
    assert len({batch_targets.sum().item() for batch_targets in targets.split(2)}) > 1
    logits = classifier(torch.cat([batch["input_values"] for batch in batches])).logits
    loss = loss_sum(logits, targets, "bce_per_target") / loss_weight(targets, "bce_per_target")
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1e9)
    first, *_ = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)

    (path,) = (tmp_path / "run" / "model" / "evaluation").glob("*/results.json")
    results = json.loads(path.read_text())
    assert results["num_clips"] == 7
    assert results["num_processes"] == 2

    # A run resumed half way ends with the same weights.
    last = list_checkpoints(tmp_path / "run")[-1]
    wanted = load_file(last / "model.safetensors")
    (last / "manifest.json").unlink()
    launch(*arguments, "--output_dir", tmp_path / "run")
    for name, value in load_file(last / "model.safetensors").items():
        assert torch.equal(value, wanted[name]), name

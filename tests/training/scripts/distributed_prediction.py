"""Predict splits of unequal sizes, then run an evaluation. `test_evaluate.py` starts this in two processes.

accelerate launch --multi_gpu --num_processes 2 distributed_prediction.py MODEL DATA OUT
"""

import sys
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from training.data.config import EvaluationDataConfig
from training.data.labels import LabelSet
from training.data.loader import make_loader
from training.data.sources import open_source
from training.evaluate import EvaluateConfig, evaluate, load_classifier
from training.evaluation.prediction import predict


def main(model_dir: str, source: str, out: Path) -> None:
    accelerator = Accelerator()
    model, extractor = load_classifier(model_dir)
    for split in ("test", "lone"):
        data = EvaluationDataConfig(source, split=split, num_workers=0)
        rank, world_size = accelerator.process_index, accelerator.num_processes
        loader = make_loader(
            open_source(data), extractor, batch_size=4, seed=0, rank=rank, world_size=world_size, repeat=False
        )
        ids, logits, targets, groups = predict(model, loader, LabelSet.of_model(model.config), accelerator)
        np.savez(out / f"{split}-{rank}", ids=ids, logits=logits, targets=targets, groups=groups, own=loader.num_clips)
    data = EvaluationDataConfig(source, num_workers=0)
    evaluate(EvaluateConfig(model_dir, data, output_dir=out / "results", batch_size=4))


if __name__ == "__main__":
    main(*sys.argv[1:3], Path(sys.argv[3]))

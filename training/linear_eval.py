"""Evaluate a frozen encoder on a labelled data set, by linear heads and heads of other kinds.

    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT                        # takes seconds
    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT --layers all --poolings all
    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT --layers all --poolings all
        --folds fold1 fold2 fold3 --head.kinds linear layers attentive prototypes knn --compare new_weights mfcc_forest
    accelerate launch -m training.linear_eval --config training/configs/finetune_as20k.yaml --mode published
        --model DIR --data SOURCE --output_dir OUT

The linear head is the published classifier: LayerNorm and a linear layer on a clip's pooled states, with the losses
of fine-tuning. In both modes, the validation clips choose the epoch whose head is tested.

- `--mode cached` (default): every clip passes through the encoder once, without augmentation. The pooled states of all
  layers stay in `cache_dir`, where later calls with the same encoder and data find them. Several devices can share
  this part. Heads of one kind and width are then fitted on these features together.
- `--mode published`: the frozen encoder computes every clip again in every epoch, augmented as in fine-tuning.

`head.kinds` names the kinds of heads in cached mode:

- `linear`: the published classifier;
- `ridge`: ridge regression in closed form. It is exact and fast, and the first choice for small data sets;
- `layers`: `linear` on a weighted sum of all layers;
- `attentive`: learned queries over patch tokens;
- `prototypes`: the greatest similarity of learned (binary) prototypes to a patch token;
- `knn`: nearest neighbours.

`layers concat` gives `linear`, `ridge` and `knn` the pooled features of all layers side by side. `attentive` and
`prototypes` read patch tokens, which are cached as float16 and only for the chosen layers.
`few_shot.shots` adds classification by nearest class means of a few clips, drawn many times.

If there are several heads, the validation clips or the clips held out choose one. With `folds`, cross-validation over
the other folds chooses layer, pooling, kind and settings for each test fold; the reported metric is the mean over test
folds. `compare` adds new weights of the same architecture, and MFCCs with a random forest, to the same tables.

The program accepts configurations of `training.finetune`. It uses only their classes, splits, clip length and
architecture; published mode also uses augmentation, loss and batch size. The section `head` sets learning rate, epochs
and all other settings of the fit.

The program writes these files to OUT:

- results.json, which names the mode, as all printed output does;
- model/, the encoder with the best head for `pipeline("audio-classification")`, if a classifier can have this head;
- in cached mode, tables and pictures of the best head (by validation), by class and group;
- for a sweep of linear heads, sweep.csv and sweep.png;
- for several heads or encoders, heads.md and heads.csv with the cost of each head, and heads.png with the metric by
  layer and kind;
- in published mode, the files of fine-tuning.
"""

from collections.abc import Sequence

from modeling_sslam.common.signals import StopRequest
from training.linear.cached import evaluate_cached
from training.linear.config import LinearEvalConfig
from training.linear.published import evaluate_as_published
from training.run.run import run_program


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    run_program(LinearEvalConfig, linear_eval, argv, __doc__)


def linear_eval(config: LinearEvalConfig) -> None:
    """Run one linear evaluation, from the model's folder to the files."""
    if config.mode == "cached":
        evaluate_cached(config)  # signals end it as usual: it has nothing to save
        return
    with StopRequest() as stop:
        evaluate_as_published(config, stop)


if __name__ == "__main__":
    main()

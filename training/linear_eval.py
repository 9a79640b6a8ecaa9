"""Evaluation of a frozen encoder on a labelled data set, by linear heads and heads of other kinds.

    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT                        # takes seconds
    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT --layers all --poolings all
    python -m training.linear_eval --model DIR --data SOURCE --output_dir OUT --layers all --poolings all
        --folds fold1 fold2 fold3 --head.kinds linear layers attentive prototypes knn --compare new_weights mfcc_forest
    accelerate launch -m training.linear_eval --config training/configs/finetune_as20k.yaml --mode published
        --model DIR --data SOURCE --output_dir OUT

The linear head is the published classifier: LayerNorm and a linear layer on a clip's pooled states, with the losses
of fine-tuning. In both modes, the head after its best epoch on the validation clips is tested.

- `--mode cached`, the fast mode: every clip passes through the encoder once, without augmentation. The pooled states
  of all layers stay in `cache_dir`, where later calls with the same encoder and data find them. Heads are fitted on
  these features, all heads of a sweep over layers and poolings at once. Several devices can share the first part.
- `--mode published`: the frozen encoder computes every clip anew in every epoch, augmented as in fine-tuning.

Kinds of heads in the fast mode, named by `head.kinds`: `linear`; `ridge`, linear in closed form, which is exact, fast
and the first choice for small data sets; `layers`, linear on a weighted sum of all layers;
`attentive`, learned queries over patch tokens; `prototypes`, the greatest similarity of learned (binary) prototypes to
a patch token; `knn`, nearest neighbours. `few_shot.shots` adds nearest class means of a few clips, drawn many times.
`attentive` and `prototypes` read patch tokens, which are cached as float16 for the chosen layers alone. Several heads
need a choice: by the validation clips, by clips held out, or with `folds` by inner folds. The other folds then choose
layer, pooling, kind and settings for each test fold by cross-validation, and the mean over test folds is of these
choices. `compare` adds new weights of the same architecture, and MFCCs with a random forest, to the same tables.

Accepts `training.finetune` configurations. Only classes, splits, clip length and architecture are used; published mode
also uses augmentation, loss and batch size. The section `head` sets learning rate, epochs and all else of how a head
is fitted.

OUT receives results.json, which names the mode (so does all printed output), and model/, the encoder with its head
for `pipeline("audio-classification")`. The fast mode also writes tables and pictures of the best head (by validation)
by class and group, for a sweep of linear heads sweep.csv and sweep.png, and for several heads or encoders heads.md and
heads.csv, with the cost of each head, and heads.png, the metric by layer and kind. The published mode also writes the
files of fine-tuning.
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

"""The steps of the study: each is one command, finished when its result exists."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from examples.small_encoders.settings import Study
from examples.steps.step import Options, Step, words
from training.arguments import parse

NEW_WEIGHTS = "new weights"
PRETRAINED = "pre-trained"
ENCODERS = (PRETRAINED, NEW_WEIGHTS)
FOREST = "MFCC + forest"


def seed_folder(out: Path, recipe: str, seed: int) -> Path:
    """Return the folder of a seed's runs."""
    return out / recipe / f"seed-{seed}"


def model_folder(out: Path, recipe: str, seed: int, encoder: str) -> Path:
    """Return the folder of an encoder."""
    return seed_folder(out, recipe, seed) / {PRETRAINED: "pretraining/model", NEW_WEIGHTS: "new_weights"}[encoder]


def probe_results(out: Path, recipe: str, seed: int, test: str) -> Path:
    """Return the results of the heads on the frozen encoder, on new weights and on MFCCs."""
    return seed_folder(out, recipe, seed) / "probes" / test / "results.json"


def curve_results(out: Path, recipe: str, seed: int, test: str, update: int) -> Path:
    """Return the results of the heads on the checkpoint after an update."""
    return seed_folder(out, recipe, seed) / "curves" / test / f"update-{update}" / "results.json"


def finetuning_results(out: Path, recipe: str, seed: int, encoder: str) -> Path:
    """Return the results of fine-tuning over folds."""
    return seed_folder(out, recipe, seed) / f"finetuned-{encoder.replace(' ', '-')}" / "folds.json"


def updates_with_checkpoint(arguments: Sequence[str]) -> list[int]:
    """Return the updates after which a pre-training with these arguments has a checkpoint."""
    # This import takes seconds, which --help should not.
    from training.pretrain import PretrainConfig

    config = parse(PretrainConfig, arguments)
    return sorted({*range(config.checkpoint.every, config.max_updates, config.checkpoint.every), config.max_updates})


def steps_of_seed(out: Path, study: Study, recipe: str, seed: int, options: Sequence[str]) -> list[Step]:
    """Return the steps of a recipe and a seed in their order.

    Args:
        out: Folder of the study.
        study: Its settings.
        recipe: Name of the recipe.
        seed: The seed.
        options: Further words of the command line of pre-training and fine-tuning.
    """
    settings = study.recipes[recipe]
    pretrained = model_folder(out, recipe, seed, PRETRAINED)
    of_run = {"seed": seed, "output_dir": pretrained.parent, "resume": "auto"}
    making = (*words(settings.pretraining), *options, *words(of_run))
    updates = updates_with_checkpoint(making) if seed in study.curve_seeds else []
    if updates:
        # An interrupted run has further checkpoints, which must not displace these.
        making = (*making, *words({"checkpoint.keep": updates[-1]}))
    return [
        Step("training.pretrain", making, pretrained),
        *(probe(out, study, recipe, seed, test) for test in study.tests),
        *(probe_of_update(out, study, recipe, seed, test, update) for test in study.tests for update in updates),
        *(finetuning(out, study, recipe, seed, study.finetuned_on, options) if study.finetuned_on else ()),
    ]


def probe(out: Path, study: Study, recipe: str, seed: int, test: str) -> Step:
    """Return the step that tests the frozen encoder beside its rivals."""
    model, result = model_folder(out, recipe, seed, PRETRAINED), probe_results(out, recipe, seed, test)
    own = {"seed": seed, "compare": ["new_weights", "mfcc_forest"]}
    return linear_eval(study, test, model, result, own)


def probe_of_update(out: Path, study: Study, recipe: str, seed: int, test: str, update: int) -> Step:
    """Return the step that tests the checkpoint after an update."""
    model = seed_folder(out, recipe, seed) / "pretraining" / "checkpoints" / f"step-{update:08d}"
    return linear_eval(study, test, model, curve_results(out, recipe, seed, test, update), {"seed": seed})


def linear_eval(study: Study, test: str, model: Path, result: Path, own: Options) -> Step:
    """Return a step of `training.linear_eval`."""
    cache = result.parent / "features"
    places = {"model": model, "output_dir": result.parent, "cache_dir": cache}
    return Step(
        "training.linear_eval", tuple(words({**study.tests[test], **study.probes, **own, **places})), result, cache
    )


def finetuning(out: Path, study: Study, recipe: str, seed: int, test: str, options: Sequence[str]) -> Iterator[Step]:
    """Yield the steps that make new weights and fine-tune both encoders over the folds of a test."""
    pretrained, new = (model_folder(out, recipe, seed, encoder) for encoder in ENCODERS)
    yield Step("examples.steps.new_weights", (str(new), *words({"like": pretrained, "seed": seed})), new)
    settings = {**study.tests[test], **study.recipes[recipe].finetuning}
    for encoder, model in zip(ENCODERS, (pretrained, new), strict=True):
        result = finetuning_results(out, recipe, seed, encoder)
        of_run = {"model": model, "seed": seed, "output_dir": result.parent, "resume": "auto"}
        yield Step("training.finetune", (*words(settings), *options, *words(of_run)), result)


def all_steps(out: Path, study: Study, options: Sequence[str]) -> dict[tuple[int, str], list[Step]]:
    """Return the steps by seed and recipe."""
    return {
        (seed, recipe): steps_of_seed(out, study, recipe, seed, options)
        for seed in study.seeds
        for recipe in study.recipes
    }

"""The steps of a study. Each is one command, which has finished when its result exists."""

from collections.abc import Iterator
from pathlib import Path

from examples.polyphony_study.presets import Preset
from examples.steps.step import Options, Step, words

STAGE1 = "stage 1 alone"
NEW_WEIGHTS = "new weights"
OBJECTIVES = ("ua", "pma", "ua+pma", "sslam")
BASELINE = "ua"
ENCODERS = (NEW_WEIGHTS, STAGE1, *OBJECTIVES)
FOREST = "MFCC + forest"
PROTOCOLS = {"linear": "linear probe", "prototypes": "prototype probe", "finetuned": "fine-tuning"}
# Split on which every encoder is tested.
TEST = "test"


def data_folder(out: Path) -> Path:
    """Return the folder of the study's scenes.

    `datasets` caches facts about a local data set by the name of its folder only, so this name is an unusual one.
    """
    return out / "polyphony_scenes"


def seed_folder(out: Path, seed: int) -> Path:
    """Return the folder of a seed's runs."""
    return out / f"seed-{seed}"


def run_folder(out: Path, seed: int, encoder: str) -> Path:
    """Return the folder of an encoder's pre-training."""
    return seed_folder(out, seed) / {STAGE1: "stage1", NEW_WEIGHTS: "new_weights"}.get(encoder, encoder)


def results_file(out: Path, seed: int, encoder: str, protocol: str) -> Path:
    """Return the file with the test results of an encoder."""
    folder = run_folder(out, seed, encoder)
    folder = folder.with_name(f"{folder.name}-{protocol}")
    if protocol == "finetuned":
        folder = folder / "model" / "evaluation" / f"{data_folder(out).name}-{TEST}"
    return folder / "results.json"


def forest_results_file(out: Path, seed: int) -> Path:
    """Return the file with the test results of MFCCs and a random forest."""
    return results_file(out, seed, STAGE1, "linear").parent / "mfcc_forest" / "results.json"


def steps_of_seed(out: Path, preset: Preset, seed: int) -> list[Step]:
    """Return the steps of a seed in their order. Each encoder is made and then tested."""
    return [
        step
        for encoder in (STAGE1, NEW_WEIGHTS, *OBJECTIVES)
        for step in (making(out, preset, seed, encoder), *tests(out, preset, seed, encoder))
    ]


def making(out: Path, preset: Preset, seed: int, encoder: str) -> Step:
    """Return the step that makes an encoder."""
    folder, first = run_folder(out, seed, encoder), run_folder(out, seed, STAGE1) / "model"
    model = folder / "model"
    if encoder == NEW_WEIGHTS:
        arguments = (str(model), *words({"like": first, "seed": seed}))
        return Step("examples.steps.new_weights", arguments, model)
    if encoder == STAGE1:
        own = dict(preset.stage1)
    else:
        own = {**preset.stage2, "init_from": first, "model.pretraining_objective": encoder}
    return Step(
        "training.pretrain", arguments_of(own, preset, out, seed, {"resume": "auto", "output_dir": folder}), model
    )


def tests(out: Path, preset: Preset, seed: int, encoder: str) -> Iterator[Step]:
    """Yield the steps that test an encoder. The first linear probe of a seed also tests the forest."""
    folder = run_folder(out, seed, encoder)
    cache = folder.with_name(f"{folder.name}-features")
    model = {"model": folder / "model"}
    for kind, own in (("linear", preset.linear), ("prototypes", preset.prototypes)):
        result = results_file(out, seed, encoder, kind)
        places: dict[str, object] = {"output_dir": result.parent, "cache_dir": cache}
        if kind == "linear" and encoder == STAGE1:
            places["compare"] = "mfcc_forest"
        options = {**preset.probes, **own, "head.kinds": kind, **model}
        yield Step("training.linear_eval", arguments_of(options, preset, out, seed, places), result, cache)
    result = results_file(out, seed, encoder, "finetuned")
    places = {"resume": "auto", "output_dir": folder.with_name(f"{folder.name}-finetuned")}
    options = {**preset.finetuning, **model, "test_split": TEST}
    yield Step("training.finetune", arguments_of(options, preset, out, seed, places), result)


def arguments_of(own: Options, preset: Preset, out: Path, seed: int, places: Options) -> tuple[str, ...]:
    """Return the arguments of a training program."""
    return tuple(words({**own, **preset.programs, "data.source": data_folder(out), "seed": seed, **places}))

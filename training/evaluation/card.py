"""Results in the metadata of a model card, where the Hub looks for them."""

from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_sslam.common.files import write_text

TASK = "audio-classification"


def read_card(folder: Path) -> ModelCard:
    """The card of a model's folder, or a new one that says no more than what the model is.

    Raises:
        ValueError: If README.md has metadata that are none.
    """
    path = folder / "README.md"
    if path.is_file():
        try:
            return ModelCard.load(path)
        except (yaml.YAMLError, ValueError, OSError) as error:
            raise ValueError(f"The metadata of {path} cannot be read: {' '.join(str(error).split())}") from error
    data = ModelCardData(library_name="transformers", pipeline_tag=TASK, tags=["audio", "sslam"])
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {folder.resolve().name}\n\nAn SSLAM audio classifier.\n")


def write_results_to_card(folder: Path, results: list[EvalResult], replaced: set[str]) -> None:
    """Enters results into README.md in place of earlier ones of the same data set and split. All else stays.

    Args:
        replaced: Types of metrics that go even if `results` does not have them (a metric may no longer be defined).
    """
    card = read_card(folder)
    places = {result.unique_identifier for result in results}
    kept = [
        result
        for result in card.data.eval_results or []
        if result.unique_identifier not in places or result.metric_type not in replaced
    ]
    card.data.model_name = card.data.model_name or folder.resolve().name
    card.data.eval_results = kept + results
    write_text(folder / "README.md", str(card))

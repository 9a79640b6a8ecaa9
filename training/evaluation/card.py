"""Evaluation results in the metadata of a model card (`model-index`), which the Hub displays."""

from pathlib import Path

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from modeling_sslam.common.files import write_text

TASK = "audio-classification"


def read_card(folder: Path) -> ModelCard:
    """Read `README.md` of a model folder, or create a minimal card if there is none.

    Raises:
        ValueError: If the metadata of README.md cannot be parsed.
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
    """Write results into README.md, replacing earlier results on the same data set and split. The rest is kept.

    Args:
        folder: Model folder.
        results: Results on one split.
        replaced: Metric types whose earlier results are removed even if `results` lacks them: a metric that was
            defined before may be undefined now.

    Raises:
        ValueError: If the metadata of README.md cannot be parsed.
        OSError: If README.md cannot be written.
    """
    card = read_card(folder)
    data = card.data
    assert isinstance(data, ModelCardData)
    places = {result.unique_identifier for result in results}
    kept = [
        result
        for result in data.eval_results or []
        if result.unique_identifier not in places or result.metric_type not in replaced
    ]
    data.model_name = data.model_name or folder.resolve().name
    data.eval_results = kept + results
    write_text(folder / "README.md", str(card))

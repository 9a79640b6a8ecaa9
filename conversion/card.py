"""Model card of a converted checkpoint: the facts that were read from the checkpoint or measured on the model."""

import hashlib
from pathlib import Path

from modeling_sslam import SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMModel, SSLAMPreTrainedModel
from modeling_sslam.common.model_card import PAPER, code_span, render_card
from modeling_sslam.common.text import escape_controls

from .configuration import Settings, lookup
from .reader import Checkpoint

# Settings of fairseq's run that our configuration has no field for.
RUN_FACTS = (
    ("Updates", "optimization.max_update"),
    ("Learning rate", "optimization.lr"),
    ("Gradient norm clipped to", "optimization.clip_norm"),
)
CITATION = """\
```bibtex
@inproceedings{alex2025sslam,
  title = {{SSLAM}: Enhancing Self-Supervised Models with Audio Mixtures for Polyphonic Soundscapes},
  author = {Alex, Tony and Atito, Sara and Mustafa, Armin and Awais, Muhammad and Jackson, Philip J B},
  booktitle = {International Conference on Learning Representations},
  year = {2025},
}
```"""


def model_card(
    model: SSLAMPreTrainedModel,
    extractor: SSLAMFeatureExtractor,
    checkpoint: Checkpoint,
    provenance: dict[str, str],
    notes: list[str],
) -> str:
    """Render the README.md of a converted model.

    Args:
        model: The converted model.
        extractor: Its feature extractor.
        checkpoint: The source. The card states its files' SHA-256, its run's settings and its license.
        provenance: The first rows of the table: the source and the parts kept of it.
        notes: The assumptions that the conversion made.
    """
    facts = provenance | {f"SHA-256 of {file.name}": f"`{_sha256(file)}`" for file in checkpoint.files}
    facts |= _model_facts(model, extractor) | _run_facts(Settings(checkpoint.settings))
    license_terms = (
        f"{code_span(checkpoint.license)}, as its source states."
        if checkpoint.license
        else "The checkpoint states none; its authors' terms apply. Ask them before you publish it."
    )
    return render_card(
        "SSLAM audio encoder",
        f"A self-supervised audio model of the {PAPER} and EAT architecture, converted to\n"
        "transformers. The facts below were read from the checkpoint or measured on it.",
        facts,
        model_class=type(model).__name__,
        sampling_rate=extractor.sampling_rate,
        sections={
            "Assumptions": "\n".join(f"- {escape_controls(note)}" for note in notes) or "- Nothing had to be assumed.",
            "License": license_terms,
            "Citation": CITATION,
        },
        tags=["eat"],
        license_name=checkpoint.license,
    )


def _model_facts(model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor) -> dict[str, str]:
    config = model.config
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    facts = {
        "Model": f"{type(model).__name__}, {num_parameters:,} parameters, {str(model.dtype).removeprefix('torch.')}",
        "Encoder": f"{config.num_hidden_layers} blocks of {config.hidden_size} channels, {config.num_attention_heads} "
        "heads",
        "Input": f"{extractor.sampling_rate} Hz mono, {extractor.num_mel_bins} log-mel bins, "
        f"{extractor.max_length} frames of 10 ms",
        "Normalisation": f"(x - mean) / (2 * std) with mean {extractor.mean}, std {extractor.std}",
        "Longest input": f"{config.max_position_embeddings * config.patch_size} frames",
    }
    if isinstance(model, SSLAMForAudioClassification):
        facts |= {
            "Classes": str(config.num_labels),
            "Labels of a clip": (config.problem_type or "not stated").replace("_", " "),
            "Classifier": f"pooling {config.classifier_pooling}, "
            + ("no norm" if config.classifier_norm_eps is None else f"norm epsilon {config.classifier_norm_eps}"),
        }
    elif not isinstance(model, SSLAMModel):
        facts["Pre-training"] = (
            f"{config.num_clones} clones, mask {config.mask_prob}, decoder of {config.decoder_num_layers} layers, EMA "
            f"{config.ema_decay} to {config.ema_end_decay} over {config.ema_anneal_end_step} updates"
        )
    return facts


def _run_facts(settings: Settings) -> dict[str, str]:
    """Return the facts of the pre-training run and, for a fine-tuned checkpoint, of the fine-tuning run."""
    if not settings.is_fairseq:
        return {}
    runs = {"pre-training": settings.pretraining}
    if settings.is_fine_tuned:
        runs["fine-tuning"] = settings.all
    return {
        f"{name} ({run})": str(value)
        for run, run_settings in runs.items()
        for name, path in RUN_FACTS
        if (value := lookup(run_settings, path)) is not None
    }


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

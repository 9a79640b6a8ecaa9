"""Model card: the README.md of a model folder, with the metadata that the Hub reads."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from huggingface_hub import ModelCardData

from .text import escape_controls

TAGS = ("audio", "sslam")
PAPER = "[SSLAM](https://arxiv.org/abs/2506.12222)"


class Usage(NamedTuple):
    """How a model class is loaded and called.

    Attributes:
        task: The Hub's name of the task.
        auto_class: The transformers class that loads the model.
        example: Lines of Python that call `model` on `inputs`.
    """

    task: str
    auto_class: str
    example: str


USAGES = {
    "SSLAMModel": Usage(
        "feature-extraction",
        "AutoModel",
        "outputs = model(**inputs)\n"
        "outputs.last_hidden_state  # (batch_size, 1 + patches, hidden_size), the CLS token first\n"
        "outputs.pooler_output  # (batch_size, hidden_size): the clip's embedding",
    ),
    "SSLAMForAudioClassification": Usage(
        "audio-classification",
        "AutoModelForAudioClassification",
        "logits = model(**inputs).logits  # (batch_size, num_labels)",
    ),
    "SSLAMForPreTraining": Usage(
        "feature-extraction",
        "AutoModelForPreTraining",
        "loss = model(**inputs).loss  # of the masked clips; takes a batch of two or more",
    ),
}


def render_card(
    title: str,
    summary: str,
    facts: Mapping[str, object],
    *,
    model_class: str,
    sampling_rate: int,
    sections: Mapping[str, str],
    tags: Sequence[str] = (),
    license_name: str | None = None,
) -> str:
    r"""Render a model card as Markdown.

    Args:
        title: The heading.
        summary: Markdown below the heading.
        facts: Rows of a table. Line breaks, column marks and HTML become entities (`&#10;`). Other control characters
            become Python's escapes (`\x1b`).
        model_class: The class in the usage example, a key of `USAGES`.
        sampling_rate: The model's sampling rate in Hz.
        sections: Markdown by heading, after the usage example.
        tags: Tags for the Hub besides `TAGS`.
        license_name: The license's identifier on the Hub, if it is known.
    """
    usage = USAGES[model_class]
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag=usage.task, license=license_name, tags=[*TAGS, *tags]
    )
    rows = "\n".join(f"| {_cell(name)} | {_cell(value)} |" for name, value in facts.items())
    example = f"""```python
from transformers import AutoFeatureExtractor, {usage.auto_class}

extractor = AutoFeatureExtractor.from_pretrained(PATH_OR_NAME, trust_remote_code=True)
model = {usage.auto_class}.from_pretrained(PATH_OR_NAME, trust_remote_code=True)
inputs = extractor(waveform, sampling_rate={sampling_rate}, return_tensors="pt")  # mono, floats in [-1, 1]
{usage.example}
```"""
    body = [f"# {title}", summary, f"| | |\n|---|---|\n{rows}", f"## Use\n\n{example}"]
    body += [f"## {heading}\n\n{text}" for heading, text in sections.items()]
    return f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(body) + "\n"


def code_span(text: str) -> str:
    """Return text from a file as code in a line of Markdown. Control characters become Python's escapes."""
    text = escape_controls(text)
    # A span of code ends at as many backticks as it begins with.
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence} {text} {fence}" if "`" in text else f"`{text}`"


def _cell(value: object) -> str:
    """Escape text for a cell of a Markdown table. `html.unescape` returns the text."""
    lines = html.escape(str(value), quote=False).replace("|", "&#124;").split("\n")
    return "&#10;".join(map(escape_controls, lines))

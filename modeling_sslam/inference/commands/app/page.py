"""The page: its parts, and what happens when a visitor does something.

What a visitor can cause, such as a file that is no sound, is answered by a sentence where the result would be.
"""

import html
import logging
from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from ....common.errors import InferenceError
from ...timeline.events import EventSettings
from ...timeline.formats import FORMATS, SUFFIXES
from ...timeline.timeline import Timeline
from .listening import TOP_LABELS, Analysis, Listener

logger = logging.getLogger(__name__)
FILES = Path(__file__).parent
DEFAULT_WINDOW = 2.0
SHORTEST_WINDOW = 0.5
# Uploads are somebody's sounds: they go soon after nobody can be looking at them any more.
CACHE_SECONDS = 3600
MAX_WAITING = 20
# One suffix of each format.
DOWNLOADS = {suffix: name for suffix, name in SUFFIXES.items() if suffix != ".jams"}
# Pixels that a column needs; where two have not that much they stand one below the other.
NARROW = 300
# The picture has a player of its own, in step with the cursor.
STYLE = "#sound audio { display: none }"


# One model, one visitor at a time, the others in a queue. The page is for people: programs have the Python interface.
ONE_AT_A_TIME = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}


def answered(*others: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Has errors of a page's function answered on the page, in the place of its first output.

    Args:
        others: What its other outputs are then.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*inputs: Any) -> Any:
            try:
                return function(*inputs)
            except InferenceError as error:
                message = message_html(str(error))
            except Exception as error:
                # The visitor can do nothing about it; whoever runs the page reads the log.
                logger.exception("unexpected error")
                message = message_html(f"The model failed on this sound ({type(error).__name__}: {error}).")
            return (message, *others) if others else message

        return call

    return decorate


def make_page(listener: Listener, model_name: str, examples: Sequence[str] = ()) -> gr.Blocks:
    """The page as Gradio's Blocks, to be given to [`serve`].

    Args:
        listener: The model, which does one thing at a time.
        model_name: For the heading.
        examples: Paths of sounds to offer.
    """
    with gr.Blocks(
        title=f"SSLAM: {model_name}",
        analytics_enabled=False,
        delete_cache=(CACHE_SECONDS, CACHE_SECONDS),
        fill_width=True,
    ) as page:
        gr.Markdown(
            f"# What sounds when\nUpload or record a sound of up to {listener.max_minutes:g} min. "
            f"`{model_name}` knows {listener.tagger.model.config.num_labels} classes."
        )
        with gr.Tab("Listen"):
            _listen_tab(listener, examples)
        with gr.Tab("Compare"):
            _compare_tab(listener, examples)
    return page


def _listen_tab(listener: Listener, examples: Sequence[str]) -> None:
    # In a narrow window the second column stands below the first: a sound and its picture belong together.
    with gr.Row():
        with gr.Column(scale=2, min_width=NARROW):
            sound = _sound_input("Sound", "sound")
            result = gr.HTML(
                css_template=(FILES / "player.css").read_text(encoding="utf-8"),
                js_on_load=(FILES / "player.js").read_text(encoding="utf-8"),
                elem_id="timeline",
                min_height=100,
            )
        with gr.Column(scale=1, min_width=NARROW):
            labels = gr.Label(label="Labels", num_top_classes=TOP_LABELS, show_heading=False, elem_id="labels")
            if examples:
                gr.Examples(list(examples), sound, label="Examples", cache_examples=False)
            with gr.Accordion("Settings", open=False):
                window = gr.Slider(
                    min(SHORTEST_WINDOW, listener.clip_seconds / 2),
                    listener.clip_seconds,
                    min(DEFAULT_WINDOW, listener.clip_seconds),
                    step=0.01,
                    label="Window in seconds",
                    info="Short ones tell the time better, and the class worse.",
                )
                threshold = gr.Slider(
                    0.01, 1, EventSettings().threshold, step=0.01, label="Threshold", info="Score an event reaches."
                )

    @answered({})
    def listen(
        path: str | None,
        window: float,
        threshold: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio knows that it is wanted)
    ) -> tuple[str, dict[str, float]]:
        if path is None:
            return "", {}
        analysis = listener.analyse(path, window, threshold, progress)
        return timeline_html(path, analysis), {entry["label"]: entry["score"] for entry in analysis.labels}

    gr.on(
        # Not `release`, which the keyboard does not cause. Of many changes in a row the first and the last count.
        [sound.change, window.change, threshold.change],
        listen,
        [sound, window, threshold],
        [result, labels],
        show_progress_on=result,
        trigger_mode="always_last",
        **ONE_AT_A_TIME,
    )


def _compare_tab(listener: Listener, examples: Sequence[str]) -> None:
    with gr.Row():
        sounds = [_sound_input("One sound", "one"), _sound_input("Another", "another")]
    if len(examples) > 1:
        gr.Examples(list(map(list, pairwise(examples))), sounds, label="Examples", cache_examples=False)
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    result = gr.HTML(
        css_template=(FILES / "player.css").read_text(encoding="utf-8"), elem_id="similarity", min_height=80
    )

    @answered()
    def compare(one: str | None, another: str | None) -> str:
        if one is None or another is None:
            raise InferenceError("It takes two sounds to compare.")
        return similarity_html(listener.similarity(one, another))

    button.click(compare, sounds, result, **ONE_AT_A_TIME)


def _sound_input(label: str, elem_id: str) -> gr.Audio:
    return gr.Audio(
        label=label,
        sources=["upload", "microphone"],
        type="filepath",
        elem_id=elem_id,
        editable=False,
        buttons=[],
        waveform_options=gr.WaveformOptions(show_recording_waveform=False),
    )


def message_html(message: str) -> str:
    return f"<p class='message' role='alert'>{html.escape(message)}</p>"


def timeline_html(path: str, analysis: Analysis) -> str:
    """Picture with a cursor, player and events to read and to download; `player.js` makes the cursor move."""
    timeline, picture = analysis.timeline, analysis.picture
    description = f"Spectrogram, scores and events ({len(timeline.events)}) over time"
    span = f"top: {picture.top:.2%}; height: {picture.bottom - picture.top:.2%}"
    return f"""
<div class="frame"><div class="picture" data-left="{picture.left}" data-right="{picture.right}"
  data-duration="{timeline.duration}">
  <img src="{_data_url("image/png", picture.png)}" alt="{description}">
  <div class="cursor" style="left: {picture.left:.2%}; {span}"></div>
</div></div>
<audio controls preload="auto" src="gradio_api/file={quote(path)}"></audio>
<p class="note unplayable" hidden>This browser cannot play the file's format.</p>
{_events_html(path, timeline)}
"""


def _events_html(path: str, timeline: Timeline) -> str:
    table, number = html.escape(FORMATS["table"](timeline).strip()), len(timeline.events)
    if not number:
        return f"<p class='note events'>There are no events: {table}; the threshold is in the settings.</p>"
    texts = {suffix: _data_url("text/plain", FORMATS[name](timeline).encode()) for suffix, name in DOWNLOADS.items()}
    stem = html.escape(Path(path).stem)
    downloads = " ".join(
        f'<a download="{stem}{suffix}" href="{text}">{DOWNLOADS[suffix]}</a>' for suffix, text in texts.items()
    )
    return f"""
<details class="events"><summary>{number} event{"s" if number > 1 else ""}</summary><pre>{table}</pre></details>
<p class="note">Events for other programs: {downloads}</p>
"""


def similarity_html(similarity: float) -> str:
    """The number, and how to read it."""
    return (
        f"<p class='number'>{similarity:.3f}</p><meter min='-1' max='1' value='{similarity}'></meter>"
        "<p class='note'>Cosine between the embeddings: 1 for the same sound. How high it is for unlike sounds "
        "depends on the model; compare with other pairs.</p>"
    )


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{b64encode(content).decode()}"


def serve(
    page: gr.Blocks, max_megabytes: int, host: str | None = None, port: int | None = None, share: bool = False
) -> None:
    """Serves a page until Ctrl-C.

    Args:
        max_megabytes: Largest upload.
        host, port: Where to listen. By default what Gradio's environment variables say, or else this machine alone at
            the first free port from 7860 on.
        share: Whether to make a public address by way of Gradio's servers.

    Raises:
        OSError: If the address cannot be had.
    """
    page.queue(max_size=MAX_WAITING)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=f"{max_megabytes}mb",
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        # The fonts of the visitor's system: nothing is fetched from elsewhere.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
        quiet=True,
    )
    print(f"The page is at {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()

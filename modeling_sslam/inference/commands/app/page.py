"""The page of `sslam app`: components and event handlers.

An error that a visitor can cause, such as a file that is not a sound, appears as a sentence in place of the result.
"""

import html
import logging
import os
import time
from base64 import b64encode
from collections.abc import Callable, Sequence
from functools import wraps
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

import gradio as gr

from ....common.errors import InferenceError
from ....common.text import escape_controls, escape_markdown
from ...timeline.events import EventSettings
from ...timeline.formats import FORMATS, SUFFIXES
from ...timeline.timeline import Timeline
from . import LOOPBACK
from .listening import TOP_LABELS, Analysis, Listener
from .protection import middleware

logger = logging.getLogger(__name__)
FILES = Path(__file__).parent
DEFAULT_WINDOW = 2.0
SHORTEST_WINDOW = 0.5
# Uploads are private, so they are deleted this long after they came.
CACHE_SECONDS = 3600
MAX_WAITING = 20
# One suffix for each format; .jams and .json name the same format.
DOWNLOADS = {suffix: name for suffix, name in SUFFIXES.items() if suffix != ".jams"}
# Least width of a column in pixels. In a narrower window, the columns stand one below the other.
MIN_COLUMN_PIXELS = 300
# Hides Gradio's player: the picture has its own, which moves the cursor.
STYLE = "#sound audio { display: none }"
# Visitors use the model one after the other. "private" hides the handlers from Gradio's API: programs have the Python
# interface.
ONE_AT_A_TIME: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}


def errors_as_messages(*others: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for event handlers that shows their errors on the page, in place of their first output.

    Args:
        others: Values of the handler's other outputs after an error.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*inputs: Any) -> Any:
            try:
                return function(*inputs)
            except InferenceError as error:
                message = message_html(str(error))
            except Exception as error:
                # The visitor cannot solve this, but the operator of the page can read the log.
                logger.exception("unexpected error")
                message = message_html(f"The model failed on this sound ({type(error).__name__}: {error}).")
            return (message, *others) if others else message

        return call

    return decorate


def make_page(listener: Listener, model_name: str, examples: Sequence[str] = ()) -> gr.Blocks:
    """Return the page, for [`serve`].

    Args:
        listener: The model. The page calls it for one visitor at a time.
        model_name: Name in the heading.
        examples: Paths of sounds that the page offers.
    """
    name = escape_markdown(model_name)
    name = f"`{model_name}`" if name == model_name else name
    with gr.Blocks(
        title=f"SSLAM: {escape_controls(model_name)}",
        analytics_enabled=False,
        delete_cache=(CACHE_SECONDS, CACHE_SECONDS),
        fill_width=True,
    ) as page:
        gr.Markdown(
            f"# What sounds when\nUpload or record a sound of up to {listener.max_minutes:g} min. "
            f"{name} knows {listener.tagger.model.config.num_labels} classes."
        )
        with gr.Tab("Listen"):
            _listen_tab(listener, examples)
        with gr.Tab("Compare"):
            _compare_tab(listener, examples)
    return page


def _listen_tab(listener: Listener, examples: Sequence[str]) -> None:
    # Sound and picture share a column, so that they stay together in a narrow window.
    with gr.Row():
        with gr.Column(scale=2, min_width=MIN_COLUMN_PIXELS):
            sound = _sound_input("Sound", "sound")
            result = gr.HTML(
                css_template=(FILES / "player.css").read_text(encoding="utf-8"),
                js_on_load=(FILES / "player.js").read_text(encoding="utf-8"),
                elem_id="timeline",
                min_height=100,
            )
        with gr.Column(scale=1, min_width=MIN_COLUMN_PIXELS):
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
                    info="Short windows locate sounds better in time but recognise classes worse.",
                )
                threshold = gr.Slider(
                    0.01,
                    1,
                    EventSettings().threshold,
                    step=0.01,
                    label="Threshold",
                    info="Score that an event must reach.",
                )

    @errors_as_messages({})
    def listen(
        path: str | None,
        window: float,
        threshold: float,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio passes the progress to this default)
    ) -> tuple[str, dict[str, float]]:
        if path is None:
            return "", {}
        analysis = listener.analyse(path, window, threshold, progress)
        scores = {escape_controls(entry["label"]): entry["score"] for entry in analysis.labels}
        return timeline_html(path, analysis), scores

    gr.on(
        # A slider that is moved by keyboard has `change` events but no `release`. Of many changes in a row,
        # "always_last" keeps the first and the last.
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
        sounds = [_sound_input("First sound", "one"), _sound_input("Second sound", "another")]
    if len(examples) > 1:
        gr.Examples(list(map(list, pairwise(examples))), sounds, label="Examples", cache_examples=False)
    button = gr.Button("Compare", variant="primary", elem_id="compare")
    result = gr.HTML(
        css_template=(FILES / "player.css").read_text(encoding="utf-8"), elem_id="similarity", min_height=80
    )

    @errors_as_messages()
    def compare(one: str | None, another: str | None) -> str:
        if one is None or another is None:
            raise InferenceError("Choose two sounds to compare.")
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
    """Return an error message."""
    return f"<p class='message' role='alert'>{html.escape(escape_controls(message))}</p>"


def timeline_html(path: str, analysis: Analysis) -> str:
    """Return picture, player and events of a sound. `player.js` moves the cursor over the picture."""
    timeline, picture = analysis.timeline, analysis.picture
    description = f"Spectrogram, scores and {len(timeline.events)} events over time"
    span = f"top: {picture.top:.2%}; height: {picture.bottom - picture.top:.2%}"
    return f"""
<div class="frame"><div class="picture" data-left="{picture.left}" data-right="{picture.right}"
  data-duration="{timeline.duration}">
  <img src="{_data_url("image/png", picture.png)}" alt="{description}">
  <div class="cursor" style="left: {picture.left:.2%}; {span}"></div>
</div></div>
<audio controls preload="auto" src="gradio_api/file={quote(os.fsencode(path))}"></audio>
<p class="note unplayable" hidden>This browser cannot play this file format.</p>
{_events_html(path, timeline)}
"""


def _events_html(path: str, timeline: Timeline) -> str:
    table, number = html.escape(FORMATS["table"](timeline).strip()), len(timeline.events)
    if not number:
        return f"<p class='note events'>No events: {table}. The threshold is among the settings.</p>"
    texts = {suffix: _data_url("text/plain", FORMATS[name](timeline).encode()) for suffix, name in DOWNLOADS.items()}
    stem = html.escape(escape_controls(Path(path).stem))
    downloads = " ".join(
        f'<a download="{stem}{suffix}" href="{text}">{DOWNLOADS[suffix]}</a>' for suffix, text in texts.items()
    )
    return f"""
<details class="events"><summary>{number} event{"s" if number > 1 else ""}</summary><pre>{table}</pre></details>
<p class="note">Download the events: {downloads}</p>
"""


def similarity_html(similarity: float) -> str:
    """Return the similarity of two sounds and how to read it."""
    return (
        f"<p class='number'>{similarity:.3f}</p><meter min='-1' max='1' value='{similarity}'></meter>"
        "<p class='note'>Cosine similarity of the embeddings. Identical sounds have 1. The values of different sounds "
        "depend on the model, so compare several pairs.</p>"
    )


def _data_url(media_type: str, content: bytes) -> str:
    return f"data:{media_type};base64,{b64encode(content).decode()}"


def serve(
    page: gr.Blocks, max_megabytes: int, host: str | None = None, port: int | None = None, share: bool = False
) -> None:
    """Serve a page until Ctrl-C. Requests that other web sites make in a visitor's browser are refused.

    Args:
        page: The page, from [`make_page`].
        max_megabytes: Size of the largest upload to accept.
        host: Address to listen on. By default Gradio's environment variables decide, or else this machine alone can
            see the page.
        port: Port to listen on. By default Gradio's environment variables decide, or else the first free one from
            7860.
        share: Whether to create a public address, which leads through Gradio's servers.

    Raises:
        OSError: If the address is not available.
    """
    # Without an open API, no request passes by the queue.
    page.queue(max_size=MAX_WAITING, api_open=False)
    address = host or os.environ.get("GRADIO_SERVER_NAME", LOOPBACK)
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        max_file_size=f"{max_megabytes}mb",
        prevent_thread_lock=True,
        ssr_mode=False,
        footer_links=[],
        # Use fonts of the visitor's system. Gradio's own fonts would be fetched from another server.
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=STYLE,
        quiet=True,
        app_kwargs={"middleware": middleware(address, share)},
    )
    print(f"The page is at {url} (stop it with Ctrl-C)", flush=True)
    try:
        while page.is_running:
            time.sleep(0.1)
    except KeyboardInterrupt:
        pass
    finally:
        # Unlike `page.block_thread`, this also ends the connections to open tabs, which the server would wait for.
        page.close(verbose=False)

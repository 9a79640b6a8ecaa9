"""The page in a browser, on a server that the command starts."""

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile
from playwright.sync_api import Page, expect, sync_playwright

pytestmark = pytest.mark.browser

REPOSITORY = Path(__file__).parents[4]
MAX_MINUTES, MAX_MEGABYTES = 1, 5
# On a busy machine, starting the server takes most of this time.
PATIENCE_MS = 60_000


@pytest.fixture(scope="module")
def chromium() -> str:
    path = shutil.which("chromium")
    assert path, "These tests need the browser Chromium on the PATH: apt-get install chromium (Debian's package)."
    return path


@pytest.fixture(scope="module")
def server(model_folder, audio_dir, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """Start the server and return the page's address and the log file."""
    log = tmp_path_factory.mktemp("server") / "log"
    limits = ["--max-minutes", str(MAX_MINUTES), "--max-megabytes", str(MAX_MEGABYTES)]
    command = [sys.executable, "-m", "modeling_sslam", "app", "--model", str(model_folder), "--device", "cpu", *limits]
    # A shell starts background processes with SIGINT ignored, and their children inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with open(log, "w") as file:
        process = subprocess.Popen(
            [*command, "--examples", str(audio_dir)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=file, text=True
        )
    signal.signal(signal.SIGINT, before)
    try:
        said = process.stdout.readline()
        address = re.search(r"http://\S+", said)
        assert address, f"{said}{log.read_text()}"
        yield address.group(), log
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert "Traceback" not in log.read_text()


@pytest.fixture(scope="module")
def tab(chromium, server) -> Iterator[Page]:
    """Open one browser tab for all tests. It must send requests to the server only."""
    address, _ = server
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--autoplay-policy=no-user-gesture-required", "--use-fake-device-for-media-stream"],
        )
        tab = browser.new_context(permissions=["microphone"]).new_page()
        tab.set_default_timeout(PATIENCE_MS)
        expect.set_options(timeout=PATIENCE_MS)
        foreign, faults = [], []
        tab.on("request", lambda request: foreign.append(request.url))
        tab.on("pageerror", lambda error: faults.append(str(error)))
        tab.goto(address)
        yield tab
        browser.close()
    assert [url for url in foreign if not url.startswith((address, "data:", "blob:"))] == []
    assert faults == []


@pytest.fixture
def page(tab) -> Page:
    """Load the page anew, so that no test depends on the sounds and settings of another."""
    tab.set_viewport_size({"width": 1280, "height": 720})
    tab.reload()
    expect(tab.locator("#sound input[type=file]")).to_be_attached()
    return tab


def upload(page: Page, where: str, path: Path) -> None:
    page.locator(f"{where} input[type=file]").set_input_files(path)


def test_upload_shows_picture_and_playback_moves_the_cursor(page, tagger, audio_dir):
    path = audio_dir / "guit_e_slide.flac"
    upload(page, "#sound", path)
    picture, cursor = page.locator("#timeline .picture img"), page.locator("#timeline .cursor")
    expect(picture).to_be_visible()
    width, height = picture.evaluate("image => [image.naturalWidth, image.naturalHeight]")
    assert width > 800
    assert height > 400
    shown = page.locator("#labels").inner_text()
    for label in tagger.tag(path, top_k=10):
        assert re.search(rf"^{label['label']}\n+{100 * label['score']:.0f}%$", shown, re.MULTILINE), shown
    events = tagger.timeline(path).events
    page.get_by_text(f"{len(events)} events").click()
    expect(page.locator("#timeline pre")).to_contain_text(events[0].label)

    audio = page.locator("#timeline audio")
    left, right, duration = picture.evaluate(
        "image => ['left', 'right', 'duration'].map(key => Number(image.parentElement.dataset[key]))"
    )

    def where() -> tuple[float, float]:
        """Return the position in the sound in seconds, from the player and from the cursor."""
        position, box = audio.evaluate("audio => audio.currentTime"), picture.bounding_box()
        line = cursor.bounding_box()
        share = (line["x"] + line["width"] / 2 - box["x"]) / box["width"]
        return position, (share - left) / (right - left) * duration

    assert where()[1] == pytest.approx(0, abs=0.05)
    audio.evaluate("audio => audio.play()")
    page.wait_for_function("document.querySelector('#timeline audio').currentTime > 1")
    audio.evaluate("audio => audio.pause()")
    page.wait_for_function("!document.querySelector('#timeline audio').seeking")
    page.wait_for_timeout(100)
    played, pointed = where()
    assert played > 1
    assert pointed == pytest.approx(played, abs=0.05)
    # A click on the picture moves playback.
    box = picture.bounding_box()
    picture.click(position={"x": box["width"] * (left + 0.75 * (right - left)), "y": 40})
    page.wait_for_function("!document.querySelector('#timeline audio').seeking")
    page.wait_for_timeout(100)
    assert where() == pytest.approx((0.75 * duration,) * 2, abs=0.05)


def test_events_can_be_downloaded(page, tagger, audio_dir, tmp_path):
    page.get_by_role("button", name="misc_crow.flac").click()
    with page.expect_download() as download:
        page.get_by_role("link", name="csv").click()
    assert download.value.suggested_filename == "misc_crow.csv"
    lines = Path(download.value.path()).read_text().splitlines()
    assert lines[0] == "onset,offset,label,score"
    assert len(lines) == 1 + len(tagger.timeline(audio_dir / "misc_crow.flac").events)


def test_recording_by_microphone(page):
    page.locator("#sound").get_by_label("Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(1500)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(page.locator("#timeline .picture img")).to_be_visible()
    expect(page.locator("#labels")).to_contain_text("LABEL_11")


def test_threshold_changes_the_events(page, audio_dir):
    # The settings are opened first, because Gradio creates the sliders then. A result that arrives at that moment
    # would reset a slider that the test has just moved.
    page.get_by_role("button", name="Settings").click()
    upload(page, "#sound", audio_dir / "misc_crow.flac")
    expect(page.locator("#timeline .picture img")).to_be_visible()
    threshold = page.get_by_role("slider", name=re.compile("Threshold"))
    threshold.focus()
    threshold.press("End")
    expect(page.locator("#timeline .events")).to_contain_text("no class reaches 1 in 0.48 s")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("broken.wav", b"no sound", "broken.wav cannot be read as a sound file"),
        ("empty.wav", b"", "empty.wav is empty"),
        ("long.wav", np.zeros((60 * MAX_MINUTES + 1) * 8000, np.int16), "long.wav is too long"),
    ],
)
def test_unusable_files_show_a_message(page, tmp_path, name, content, message):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        soundfile.write(tmp_path / name, content, 8000)
    upload(page, "#sound", tmp_path / name)
    expect(page.get_by_role("alert").filter(has_text=message)).to_be_visible()
    expect(page.locator("#labels")).not_to_contain_text("LABEL")
    assert str(tmp_path) not in page.locator("#timeline").inner_text()


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [("notes.txt", 8, "Invalid file type: notes.txt"), ("big.wav", MAX_MEGABYTES * 2**20 + 1, "exceed the maximum")],
)
def test_invalid_uploads_are_rejected(page, tmp_path, name, size, message):
    (tmp_path / name).write_bytes(bytes(size))
    upload(page, "#sound", tmp_path / name)
    expect(page.get_by_test_id("toast-body").filter(has_text=message)).to_be_visible()


def test_comparison(page, audio_dir):
    page.get_by_role("tab", name="Compare").click()
    compare, number = page.get_by_role("button", name="Compare"), page.locator("#similarity .number")
    compare.click()
    expect(page.locator("#similarity")).to_contain_text("Choose two sounds to compare.")
    upload(page, "#one", audio_dir / "misc_crow.flac")
    upload(page, "#another", audio_dir / "misc_crow.flac")
    expect(page.locator("#one audio, #another audio")).to_have_count(2)
    compare.click()
    expect(number).to_have_text("1.000")
    page.locator("#another").get_by_label("Clear").click()
    upload(page, "#another", audio_dir / "guit_e_slide.flac")
    expect(page.locator("#one audio, #another audio")).to_have_count(2)
    compare.click()
    expect(number).not_to_have_text("1.000")


def test_narrow_window(page, audio_dir):
    page.set_viewport_size({"width": 390, "height": 844})
    upload(page, "#sound", audio_dir / "guit_e_slide.flac")
    expect(page.locator("#timeline .picture img")).to_be_visible()
    # The layout changes in several steps, so the test waits for the last.
    page.wait_for_function("document.documentElement.scrollWidth <= 390")
    # The picture keeps a readable width and scrolls.
    frame = "document.querySelector('#timeline .frame')"
    page.wait_for_function(f"{frame}?.scrollWidth - {frame}?.clientWidth > 100")
    page.locator("#timeline audio").evaluate("audio => { audio.currentTime = 3; return audio.play(); }")
    page.wait_for_function(f"{frame}?.scrollLeft > 100")

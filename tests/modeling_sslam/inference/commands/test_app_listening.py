"""Analysis and comparison of sounds for the page."""

import io
import re

import matplotlib.image
import numpy as np
import pytest

from modeling_sslam.inference import ClipError, Embedder, EventSettings, InferenceError, embed
from modeling_sslam.inference.commands.app.listening import COMPLAINTS, Listener


@pytest.fixture
def listener(tagger) -> Listener:
    return Listener(tagger, max_minutes=0.1)


def test_analysis_equals_the_tagger(listener, tagger, audio_dir):
    path, shares = str(audio_dir / "guit_e_slide.flac"), []
    labels, timeline, _ = listener.analyse(path, 1.0, 0.7, lambda share, doing: shares.append(share))
    expected = tagger.timeline(path, 1.0, 0.25, EventSettings(0.7))
    assert labels == tagger.tag(path, top_k=10)
    assert timeline.events == expected.events
    assert timeline.duration == expected.duration
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 1)
    assert len(shares) == len(expected.starts) + 1


def test_positions_of_the_picture_s_axes(listener, audio_dir):
    _, _, picture = listener.analyse(str(audio_dir / "misc_crow.flac"), 0.4, 0.5)
    pixels = matplotlib.image.imread(io.BytesIO(picture.png))[..., :3].mean(-1)
    height, width = pixels.shape
    upper, lower = round(picture.top * height), round(picture.bottom * height)
    # The frames of the axes are black, and nothing else is drawn at their edges.
    for x in (picture.left * width, picture.right * width):
        column = pixels[upper:lower, round(x) - 1 : round(x) + 2].min(1)
        assert (column < 0.5).mean() > 0.9
    for y in (upper, lower):
        row = pixels[y - 1 : y + 2, round(picture.left * width) : round(picture.right * width)].min(0)
        assert (row < 0.5).all()


def test_similarity_of_equal_and_different_sounds(listener, audio_dir):
    crow, choir = str(audio_dir / "misc_crow.flac"), str(audio_dir / "ambi_choir.flac")
    assert listener.similarity(crow, crow) == pytest.approx(1, abs=1e-12)
    assert listener.similarity(crow, choir) < 1 - 1e-4


def test_similarity_uses_the_mean_over_windows(tagger, write_sound, recording, audio_dir):
    long = str(write_sound("long.wav", samples=np.concatenate((recording, recording.flip(0)))))
    crow = str(audio_dir / "misc_crow.flac")
    windows = [clip.embedding for clip in embed([long], Embedder(tagger.model.sslam, tagger.feature_extractor))]
    assert len(windows) == 2
    one = np.mean(windows, axis=0)
    two = next(embed([crow], Embedder(tagger.model.sslam, tagger.feature_extractor))).embedding
    cosine = one @ two / np.linalg.norm(one) / np.linalg.norm(two)
    assert Listener(tagger, max_minutes=1).similarity(long, crow) == pytest.approx(cosine, abs=1e-6)


def test_long_sounds_are_rejected(listener, write_sound):
    listener.similarity(*[str(write_sound("short.wav", seconds=5.9))] * 2)
    path = str(write_sound("long.wav", seconds=6.1))
    message = r"^long\.wav is too long: this page accepts up to 0\.1 min"
    with pytest.raises(InferenceError, match=message):
        listener.analyse(path, 2.0, 0.5)
    with pytest.raises(InferenceError, match=message):
        listener.similarity(path, path)


def test_the_length_that_a_header_states_does_not_count(listener, write_sound):
    path = write_sound("long.flac", seconds=6.1)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # the number of samples, in the low 36 bits of bytes 18 to 25: one second
    content[22:26] = (16_000).to_bytes(4, "big")
    path.write_bytes(content)
    with pytest.raises(InferenceError, match="is too long"):
        listener.analyse(str(path), 2.0, 0.5)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"sound\.wav is empty \(the file has no bytes\)\."),
        (b"no sound at all", r"sound\.wav cannot be read as a sound file \("),
        (np.zeros(10, np.float32), r"sound\.wav is too short \("),
        (np.full(16_000, np.nan, np.float32), r"sound\.wav is damaged \(NaN"),
        (np.full(16_000, 30_000, np.float32), r"sound\.wav is damaged or has a wrong header \(peak"),
    ],
)
def test_unusable_files_are_explained_without_their_folder(listener, write_sound, tmp_path, content, message):
    path = tmp_path / "sound.wav"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write_sound("sound.wav", samples=content)
    for use in (lambda: listener.analyse(str(path), 2.0, 0.5), lambda: listener.similarity(str(path), str(path))):
        with pytest.raises(InferenceError, match=message) as error:
            use()
        assert str(tmp_path) not in str(error.value)


def test_every_reason_has_a_message():
    assert set(re.findall(r'"(\w+)"', ClipError.__doc__)) == set(COMPLAINTS)

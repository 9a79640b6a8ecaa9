"""`sslam tag` and `sslam timeline`: their output, files, errors and exit status."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from modeling_sslam.__main__ import COMMANDS, main
from modeling_sslam.common.text import escape_undecodable
from modeling_sslam.inference import EventSettings, SSLAMTagger
from modeling_sslam.inference.embedding import EMBEDDING_POOLINGS

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[4]


@pytest.fixture
def run(model_folder, capsys):
    """Return a function that runs a command with the tiny model: exit status, stdout and stderr."""

    def run(command: str, *arguments) -> tuple[int, str, str]:
        options = ["--model", str(model_folder), "--device", "cpu"]
        status = main([command, *map(str, arguments), *options])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def sounds(write_sound):
    """Write a folder with sounds, also in subfolders, and with other files."""
    for name in ("b.wav", "deep/er/a.flac", "deep/c.OGG"):
        write_sound(f"sounds/{name}", seconds=0.4, rate=16_000)
    folder = write_sound("sounds/.hidden.wav").parent
    write_sound("sounds/.cache/x.wav")
    (folder / "notes.txt").write_text("not a sound")
    return folder


def test_tag_searches_folders(run, sounds):
    status, out, err = run("tag", sounds, "--format", "csv", "--top-k", 2)
    assert (status, err) == (0, "")
    rows = list(csv.DictReader(io.StringIO(out)))
    paths = [str(sounds / name) for name in ("b.wav", "deep/c.OGG", "deep/er/a.flac")]
    assert [row["path"] for row in rows] == [path for path in paths for _ in range(2)]
    assert all(0 <= float(row["score"]) <= 1 and row["label"].startswith("LABEL_") for row in rows)


def test_formats_of_tag_have_equal_content(run, tagger, audio_dir):
    path = audio_dir / "misc_crow.flac"
    expected = tagger.tag(path, top_k=3, threshold=0.5)
    (parsed,) = json.loads(run("tag", path, "--top-k", 3, "--threshold", 0.5, "--format", "json")[1])
    lines = [
        json.loads(line)
        for line in run("tag", path, "--top-k", 3, "--threshold", 0.5, "--format", "jsonl")[1].splitlines()
    ]
    rows = list(csv.reader(io.StringIO(run("tag", path, "--top-k", 3, "--threshold", 0.5, "--format", "csv")[1])))
    table = run("tag", path, "--top-k", 3, "--threshold", 0.5)[1].splitlines()
    assert parsed["path"] == lines[0]["path"] == rows[1][0] == str(path)
    assert [parsed] == lines
    assert [entry["label"] for entry in parsed["labels"]] == [entry["label"] for entry in expected]
    for entry, reference in zip(parsed["labels"], expected, strict=True):
        assert entry["score"] == pytest.approx(reference["score"], abs=1e-5)
    assert [(row[1], float(row[2])) for row in rows[1:]] == [
        (entry["label"], pytest.approx(entry["score"], abs=1e-6)) for entry in parsed["labels"]
    ]
    assert table[0] == f"{path}  (0.48 s)"
    assert [line.split()[1] for line in table[1:]] == [entry["label"] for entry in expected]


@pytest.mark.parametrize("file_format", ["table", "csv", "jsonl", "json"])
def test_file_names_that_are_not_unicode(run, write_sound, tmp_path, file_format):
    path = write_sound("sound.wav", seconds=0.1).rename(tmp_path / os.fsdecode(b'odd \xff,\n"name".wav'))
    status, out, err = run("tag", path.parent, "--format", file_format, "--top-k", 1)
    assert (status, err) == (0, "")
    if file_format == "csv":
        assert list(csv.reader(io.StringIO(out)))[1][0] == escape_undecodable(str(path))
    elif file_format.startswith("json"):
        assert json.loads(out if file_format == "jsonl" else out[1:-2])["path"] == escape_undecodable(str(path))


@pytest.mark.parametrize("separator", ["\n", "\0"])
def test_list_of_paths_on_standard_input(run, sounds, monkeypatch, separator):
    names = [str(sounds / "b.wav"), str(sounds / "deep" / "c.OGG")]
    monkeypatch.setattr(sys, "stdin", io.StringIO(separator.join(names) + separator))
    out = run("tag", "-", "--format", "jsonl")[1]
    assert [json.loads(line)["path"] for line in out.splitlines()] == names


def test_patterns_are_expanded(run, sounds):
    out = run("tag", sounds / "**" / "*.[wf]*", "--format", "jsonl")[1]
    assert [Path(json.loads(line)["path"]).name for line in out.splitlines()] == ["b.wav", "a.flac"]


def test_unusable_files_are_reported_and_left_out(run, sounds, write_sound):
    broken = write_sound("sounds/aa.wav", samples=np.full(9_000, np.nan, np.float32))
    (sounds / "deep" / "empty.wav").touch()
    status, out, err = run("tag", sounds, sounds / "nowhere.wav", "--format", "json")
    assert status == 1
    assert len(json.loads(out)) == 3
    complaints = err.splitlines()
    assert complaints[0].startswith(f"{broken}: not_finite: NaN or infinite samples")
    assert complaints[1] == f"{sounds / 'deep' / 'empty.wav'}: empty: the file has no bytes"
    assert complaints[2].startswith(f"{sounds / 'nowhere.wav'}: missing: ")
    assert complaints[3] == "3 of 6 files could not be used"


def test_json_is_valid_without_any_result(run, tmp_path):
    status, out, _ = run("tag", tmp_path / "nowhere.wav", "--format", "json")
    assert (status, json.loads(out)) == (1, [])


@pytest.mark.parametrize("source", ["", "*.wav", "-"])
def test_no_sound_files_is_an_error(run, tmp_path, monkeypatch, source):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    source = source if source == "-" else str(tmp_path / source) if source else str(tmp_path)
    status, out, err = run("tag", source)
    assert (status, out) == (1, "")
    assert "no sound files there; folders are searched for .3g2, .3gp, .aac" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tag"], "FILE|DIR|-"),
        (["tag", "x", "--top-k", "0"], "'0' is not a positive whole number"),
        (["tag", "x", "--threshold", "2"], "'2' is not a number between 0 and 1"),
        (["tag", "x", "--batch-size", "many"], "'many' is not a positive whole number"),
        (["timeline", "x", "--hop", "-1"], "'-1' is not a positive number of seconds"),
        (["timeline", "x", "--max-gap", "nan"], "'nan' is not a number of seconds"),
        (["timeline", "x", "y"], "unrecognized arguments: y"),
        ([], "COMMAND"),
    ],
)
def test_invalid_arguments(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main([*arguments, *(["--model", "m"] if arguments else [])])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_timeline_writes_every_file_format(run, tagger, audio_dir, tmp_path):
    path = audio_dir / "guit_e_slide.flac"
    names = ["events.csv", "labels.txt", "events.rttm", "events.json"]
    outputs = [tmp_path / name for name in names]
    options = ["--window", 1, "--hop", 0.25, "--threshold", 0.9, "--median", 1]
    status, out, err = run(
        "timeline",
        path,
        *options,
        "--out",
        *outputs,
        "--scores",
        tmp_path / "scores.csv",
        "--plot",
        tmp_path / "p.png",
    )
    assert (status, out, err) == (0, "", "")
    expected = tagger.timeline(path, 1.0, 0.25, EventSettings(threshold=0.9, median=1))
    assert len(expected.events) == 2

    rows = list(csv.DictReader(outputs[0].open()))
    audacity = [line.split("\t") for line in outputs[1].read_text().splitlines()]
    rttm = [line.split(" ") for line in outputs[2].read_text().splitlines()]
    jams = json.loads(outputs[3].read_text())
    (annotation,) = jams["annotations"]
    assert annotation["namespace"] == "tag_open"
    assert jams["file_metadata"]["duration"] == pytest.approx(expected.duration, abs=1e-5)
    assert jams["sandbox"]["events"]["threshold"] == 0.9
    for event, row, label, fields, observation in zip(
        expected.events, rows, audacity, rttm, annotation["data"], strict=True
    ):
        assert (float(row["onset"]), float(row["offset"])) == pytest.approx(event[:2], abs=1e-3)
        assert row["label"] == label[2] == fields[7] == observation["value"] == event.label
        assert [float(x) for x in label[:2]] == pytest.approx(event[:2], abs=1e-5)
        assert fields[:3] == ["SPEAKER", "guit_e_slide", "1"]
        assert len(fields) == 10
        assert float(fields[3]) == pytest.approx(event.onset, abs=1e-3)
        assert float(fields[4]) == pytest.approx(event.offset - event.onset, abs=1e-3)
        assert observation["time"] + observation["duration"] == pytest.approx(event.offset, abs=1e-5)
        assert observation["confidence"] == pytest.approx(event.score, abs=1e-5)

    header, *scores = csv.reader((tmp_path / "scores.csv").open())
    assert header == ["start", "end", *tagger.labels]
    np.testing.assert_allclose(np.array(scores, float)[:, 0], expected.starts, atol=1e-3)
    np.testing.assert_allclose(np.array(scores, float)[:, 2:], expected.scores, atol=2e-5)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "scores.csv", "p.png"])


def test_timeline_prints_the_chosen_format(run, audio_dir):
    path = audio_dir / "guit_e_slide.flac"
    table = run("timeline", path, "--threshold", 0.9)[1].splitlines()
    assert table[0].split() == ["onset", "offset", "score", "label"]
    assert table[1].split()[:2] == ["0:00.0", "0:04.3"]
    assert run("timeline", path, "--format", "rttm")[1].startswith(
        "SPEAKER guit_e_slide 1 0.000 4.325 <NA> <NA> LABEL"
    )
    assert run("timeline", path, "--threshold", 1)[1] == "no class reaches 1 in 4.33 s\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "events.xml"], "events.xml selects no format; end the name in one of .csv (csv), .txt (aud"),
        (["--out", "nowhere/events.csv"], "nowhere/events.csv cannot be written"),
        (["--window", "200", "--hop", "1"], "position table ends at"),
        (["--hop", "3"], "A hop of 3 s must be at least"),
        (["--release", "0.8"], "release=0.8"),
        (["--median", "2"], "median=2 must be an odd number"),
        (["--plot", "picture.docx"], "picture.docx selects no picture format; end the name in one of ."),
    ],
)
def test_timeline_errors_leave_no_files(run, audio_dir, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    recording = audio_dir / "drum_cowbell.flac"
    status, out, err = run("timeline", recording, "--scores", "scores.csv", *options)
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert message in err
    assert not list(tmp_path.iterdir())


def test_old_results_are_replaced_atomically(run, audio_dir, tmp_path):
    """A program that has the old file open continues to read the old content."""
    out = tmp_path / "events.csv"
    out.write_text("before")
    with out.open() as reader:
        assert run("timeline", audio_dir / "drum_cowbell.flac", "--out", out)[0] == 0
        assert reader.read() == "before"
    assert out.read_text().startswith("onset,offset,label,score\n")
    assert out.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


def test_timeline_rejects_folders(run, audio_dir):
    status, _, err = run("timeline", audio_dir)
    assert status == 1
    assert err == f"error: {audio_dir} is a folder; sslam timeline takes one recording, sslam tag folders.\n"


def test_damaged_recording_keeps_old_results(run, write_sound, tmp_path):
    samples = np.zeros(400_000, np.float32)
    samples[-1] = np.nan
    path = write_sound("sound.wav", samples=samples)
    (tmp_path / "events.csv").write_text("before")
    status, _, err = run("timeline", path, "--out", tmp_path / "events.csv", "--plot", tmp_path / "plot.png")
    assert status == 1
    assert err == f"error: {path}: not_finite: NaN or infinite samples in the 5 s after 20 s\n"
    assert (tmp_path / "events.csv").read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["events.csv", "sound.wav"]


@pytest.mark.usefixtures("_python_s_own_sigint")
@pytest.mark.parametrize("command", ["tag", "timeline"])
def test_interrupt(run, write_sound, tmp_path, monkeypatch, command):
    """Ctrl-C interrupts the computation, when results and files are incomplete."""
    paths = [write_sound(f"{n}.wav", seconds=30) for n in range(3)]
    classify, calls = SSLAMTagger._classify, []

    def interrupted(self, windows):
        calls.append(len(windows))
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return classify(self, windows)

    monkeypatch.setattr(SSLAMTagger, "_classify", interrupted)
    if command == "tag":
        status, out, err = run("tag", *paths, "--format", "json", "--batch-size", 4)
        assert [entry["path"] for entry in json.loads(out)] == [str(paths[0])]
    else:
        outputs = ["--out", tmp_path / "e.csv", "--scores", tmp_path / "s.csv", "--plot", tmp_path / "p.png"]
        status, out, err = run("timeline", paths[0], *outputs)
        assert out == ""
    assert (status, err) == (130, "interrupted\n")
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_closed_pipe_is_no_error(model_folder, sounds):
    command = f"{sys.executable} -m modeling_sslam tag {sounds} {sounds} --model {model_folder} --format csv"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.stdout == "path,label,score\n"
    assert done.stderr == ""


def test_package_imports_no_optional_packages_and_missing_ones_are_reported():
    code = (
        "import sys, modeling_sslam\n"
        "print([m for m in ('modeling_sslam.inference', 'datasets', 'matplotlib') if m in sys.modules])\n"
        "sys.modules['soundfile'] = None\n"
        "from modeling_sslam.__main__ import main\n"
        "sys.exit(main(['tag', 'x', '--model', 'y']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.stdout == "[]\n"
    assert done.stderr == 'error: soundfile is not installed: pip install "modeling-sslam[inference]"\n'
    assert done.returncode == 1


def test_help_has_summaries_and_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    summaries = " ".join(capsys.readouterr().out.split())
    for name in COMMANDS:
        command = import_module(f"modeling_sslam.inference.commands.{name}")
        assert f"{name} {command.SUMMARY}" in summaries
        with pytest.raises(SystemExit):
            main([name, "--help"])
        text = capsys.readouterr().out
        assert command.SUMMARY in text
        assert text.split("examples:")[1].count(f"sslam {name} ") >= 2


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in COMMANDS), ["tag", "x", "--model", "m", "--top-k", "0"]]
)
def test_help_and_argument_errors_import_neither_torch_nor_transformers(arguments):
    code = (
        "import sys\n"
        "from modeling_sslam.__main__ import main\n"
        "try:\n"
        "    main(sys.argv[1:])\n"
        "finally:\n"
        "    print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=REPOSITORY, check=False
    )
    assert done.returncode == (0 if "--help" in arguments else 2), done.stderr
    assert done.stdout.endswith("[]\n")


def test_poolings_of_the_command_and_of_the_embedder_are_equal(capsys):
    with pytest.raises(SystemExit):
        main(["embed", "--help"])
    assert f"--pooling {{{','.join(EMBEDDING_POOLINGS)}}}" in capsys.readouterr().out

"""The whole story on a CPU, in minutes: sounds, both stages of pre-training, fine-tuning, evaluation, and a pipeline
that names what it hears. Run by `make quickstart`; every step is a command that is printed before it runs.

    python -m examples.quickstart outputs/quickstart

The encoder is tiny and has heard a thousand synthetic clips: it is the way that is worth a look, not the result.
Called again it goes on from where it was.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import datasets
from transformers import pipeline

from modeling_sslam.common.audio import read_waveform
from modeling_sslam.common.encoded_audio import EncodedAudio

CONFIGS = Path("training/configs")
RECORDINGS = Path("tests/fixtures/audio")
# What can be heard in the recordings, in words; the classifier knows other ones.
HEARD = {"drum_cowbell.flac": "a cowbell", "guit_e_slide.flac": "an electric guitar, sliding"}
NUM_SOURCES = 3
# The held-out mixture that is left as a sound file: applause, a mosquito and a siren.
EXAMPLE_CLIP = 8


def run(*arguments: str | Path) -> None:
    """Prints a module of the project with its arguments as one would type it, and runs it."""
    words = list(map(str, arguments))
    print(f"\n$ python -m {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for all that it makes")
    out = parser.parse_args().out
    data, stage1, stage2, classifier = (out / name for name in ("data", "stage1", "stage2", "classifier"))

    if not data.exists():
        run("training.soundscapes", data, "--clips", "1600", "--seconds", "2.58", "--max-sources", "3", "--plot")
    common = ("--data", data, "--resume", "auto")
    tiny = CONFIGS / "pretrain_tiny.yaml"
    run("training.pretrain", "--config", tiny, *common, "--output_dir", stage1, "--max_updates", "500")
    tiny = CONFIGS / "pretrain_tiny_stage2.yaml"
    init = ("--init_from", stage1 / "model")
    run("training.pretrain", "--config", tiny, *common, *init, "--output_dir", stage2, "--max_updates", "200")
    tiny = CONFIGS / "finetune_tiny.yaml"
    run("training.finetune", "--config", tiny, *common, "--model", stage2 / "model", "--output_dir", classifier)

    print("\nWhat it hears:")
    tagger = pipeline("audio-classification", str(classifier / "model"), trust_remote_code=True)
    test = datasets.load_dataset(str(data), split="test").cast_column("audio", EncodedAudio())
    clip = test[EXAMPLE_CLIP]
    true = {clip["id"]: (clip["audio"]["bytes"], ", ".join(sorted(clip["labels"])))}
    true |= {name: (str(RECORDINGS / name), words) for name, words in HEARD.items()}
    extractor = tagger.feature_extractor
    for name, (audio, words) in true.items():
        waveform = read_waveform(audio, extractor.sampling_rate, extractor.num_samples(extractor.max_length))
        print(f"\n{name}, in it: {words}")
        for label in tagger(waveform.numpy(), top_k=NUM_SOURCES):
            print(f"  {label['score']:.2f}  {label['label']}")
    sample = out / f"{clip['id']}.flac"
    sample.write_bytes(clip["audio"]["bytes"])

    evaluation = classifier / "model" / "evaluation" / f"{data.name}-test"
    print("\nLeft behind:")
    for path, what in {
        classifier / "model": "the classifier, with its card: a folder for from_pretrained and for the Hub",
        stage2 / "model": "the pre-trained encoder",
        stage1 / "curves.png": "curves of stage 1",
        stage2 / "curves.png": "curves of stage 2",
        classifier / "curves.png": "curves of fine-tuning",
        evaluation / "per_class.png": "average precision by class",
        evaluation / "results.json": "all results on the test clips",
        sample: "the clip above",
        data / "soundscapes.png": "what the sounds look like",
    }.items():
        print(f"  {path}  {what}")


if __name__ == "__main__":
    main()

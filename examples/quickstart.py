"""Pre-train, fine-tune, evaluate and use a tiny model, in minutes on a CPU. `make quickstart` runs this.

    python -m examples.quickstart outputs/quickstart

The steps: generate sounds, both stages of pre-training, fine-tuning with its evaluation, and a pipeline that labels
sounds. Every step is a command of the project, which is printed before it runs. The encoder is tiny and is trained on
about a thousand synthetic clips: the program shows the steps, not the quality that they can reach. After an
interruption, a second call continues.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
from transformers import Pipeline, pipeline

from modeling_sslam import SSLAMFeatureExtractor
from modeling_sslam.common.audio import read_waveform
from modeling_sslam.common.encoded_audio import EncodedAudio

CONFIGS = Path("training/configs")
RECORDINGS = Path("tests/fixtures/audio")
# Descriptions of the recordings. The classifier has other classes.
CONTENT = {"drum_cowbell.flac": "a cowbell", "guit_e_slide.flac": "an electric guitar, sliding"}
# A held-out mixture of applause, a mosquito and a siren.
EXAMPLE_CLIP = 8
# As many labels are printed as the mixture has sources.
NUM_SOURCES = 3


def run(*arguments: object) -> None:
    """Print the command line of a module of the project, and run it."""
    words = list(map(str, arguments))
    print(f"\n$ python -m {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)


def clip_to_label(data: Path) -> dict[str, Any]:
    """Return the test clip that the program labels and writes as a sound file."""
    test = datasets.load_dataset(str(data), split="test").cast_column("audio", EncodedAudio())
    return test[EXAMPLE_CLIP]


def print_labels(
    labeller: Pipeline, extractor: SSLAMFeatureExtractor, name: str, audio: bytes | str, content: str
) -> None:
    """Print the labels of a sound beside the sounds that it contains."""
    waveform = read_waveform(audio, extractor.sampling_rate, extractor.num_samples(extractor.max_length))
    print(f"\n{name} contains {content}")
    for label in labeller(waveform.numpy(), top_k=NUM_SOURCES):
        print(f"  {label['score']:.2f}  {label['label']}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for everything that the steps write")
    out = parser.parse_args().out
    data, stage1, stage2, classifier = (out / name for name in ("data", "stage1", "stage2", "classifier"))

    if not data.exists():
        run("training.soundscapes", data, "--clips", 1600, "--seconds", 2.58, "--max-sources", 3, "--plot")
    common = ("--data", data, "--resume", "auto")
    config = CONFIGS / "pretrain_tiny.yaml"
    run("training.pretrain", "--config", config, *common, "--output_dir", stage1, "--max_updates", 500)
    config = CONFIGS / "pretrain_tiny_stage2.yaml"
    init = ("--init_from", stage1 / "model")
    run("training.pretrain", "--config", config, *common, *init, "--output_dir", stage2, "--max_updates", 200)
    config = CONFIGS / "finetune_tiny.yaml"
    run("training.finetune", "--config", config, *common, "--model", stage2 / "model", "--output_dir", classifier)

    print("\nLabels of the classifier:")
    model = classifier / "model"
    labeller = pipeline("audio-classification", str(model), trust_remote_code=True)
    extractor = SSLAMFeatureExtractor.from_pretrained(model)
    clip = clip_to_label(data)
    print_labels(labeller, extractor, clip["id"], clip["audio"]["bytes"], ", ".join(sorted(clip["labels"])))
    for name, content in CONTENT.items():
        print_labels(labeller, extractor, name, str(RECORDINGS / name), content)
    sample = out / f"{clip['id']}.flac"
    sample.write_bytes(clip["audio"]["bytes"])

    evaluation = model / "evaluation" / f"{data.name}-test"
    print("\nFiles:")
    for path, what in {
        model: "the classifier and its card, a folder for from_pretrained and for the Hub",
        stage2 / "model": "the pre-trained encoder",
        stage1 / "curves.png": "curves of stage 1",
        stage2 / "curves.png": "curves of stage 2",
        classifier / "curves.png": "curves of fine-tuning",
        evaluation / "per_class.png": "average precision by class",
        evaluation / "results.json": "all results on the test clips",
        sample: "the clip above",
        data / "soundscapes.png": "pictures of the sounds",
    }.items():
        print(f"  {path}  {what}")


if __name__ == "__main__":
    main()

"""Converts a published-style fine-tuned checkpoint and classifies real recordings with the result.

The checkpoint in the repository is tiny and its weights are random: what it says of the recordings means nothing, but
every step is the one that a real checkpoint takes. Run by `make quickstart`; give a checkpoint of your own with

    python -m examples.quickstart outputs/mine --checkpoint SSLAM_AS2M_Finetuned.pt sound.wav other.flac
"""

import argparse
from pathlib import Path

import soundfile
import torch
import torchaudio
from transformers import pipeline

from conversion.convert import convert

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to write the converted model to (replaced if it is there)")
    parser.add_argument("recordings", type=Path, nargs="*", help="sound files (default: the recordings of the tests)")
    parser.add_argument("--checkpoint", type=Path, default=FIXTURES / "golden" / "sslam_finetuned.pt")
    arguments = parser.parse_args()
    recordings = arguments.recordings or sorted((FIXTURES / "audio").glob("*.flac"))

    convert(arguments.checkpoint, arguments.out, overwrite=True)

    classifier = pipeline("audio-classification", str(arguments.out), trust_remote_code=True)
    encoder, extractor = classifier.model.sslam, classifier.feature_extractor
    for recording in recordings:
        samples, sampling_rate = soundfile.read(recording, dtype="float32", always_2d=True)
        waveform = torchaudio.functional.resample(
            torch.from_numpy(samples).mean(1), sampling_rate, extractor.sampling_rate
        )
        print(f"\n{recording.name}, {len(samples) / sampling_rate:.2f} s")
        for label in classifier(waveform.numpy(), top_k=3):
            print(f"  {label['score']:.3f}  {label['label']}")
        inputs = extractor(waveform, sampling_rate=extractor.sampling_rate, return_tensors="pt")
        with torch.inference_mode():
            embedding = encoder(**inputs).pooler_output
        print(f"  embedding of shape {tuple(embedding.shape)}")
    print(f"\nThe model is in {arguments.out}; its README.md says how to use it.")


if __name__ == "__main__":
    main()

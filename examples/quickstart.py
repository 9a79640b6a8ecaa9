"""Pre-train, fine-tune, evaluate and use a tiny model, in minutes on a CPU. `make quickstart` runs this.

    python -m examples.quickstart outputs/quickstart

The steps are:

1. Mix the recordings of examples/sounds into scenes.
2. Pre-train an encoder in stage 1 and stage 2.
3. Compare linear heads on the encoder, linear heads on new (random) weights, and a random forest on MFCCs.
4. Fine-tune a classifier, and evaluate it on the test scenes.
5. Print labels for every held-out recording, for the first test scene of a bass drum and a cymbal, and for the first
   test scene with each number of sources. Print the nearest neighbours of a held-out recording.

A quarter of the recordings are held out: they occur only in test scenes. Steps 1 to 4 run commands of the project,
which are printed first. After an interruption, a second call continues.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.parquet as pq

from modeling_sslam.common.encoded_audio import EncodedAudio
from modeling_sslam.inference import SSLAMTagger, embed
from training.data.mixing.settings import read_settings
from training.data.sources import open_scene_pools

CONFIGS = Path("training/configs")
SOUNDS = Path("examples/sounds")
SPLITS = ("train=0.6", "validation=0.15", "test=0.25")
MAX_SOURCES = 3
# Sources of the scene that README.md shows.
EXAMPLE_SOURCES = {"bass_drum", "cymbal"}
# Events have similar levels over faint noise, so each source of a scene is audible. The faintest noise is nearly
# digital silence, which also surrounds a recording that is shorter than a clip.
MIXING = ("--event-seconds", 1, 2.5, "--level", -90, -50, "--snr", 50, 60, "--pitch", -2, 2, "--stretch", 0.8, 1.25)


def run(*arguments: object) -> None:
    """Print the command line of a module of the project, and run it."""
    words = list(map(str, arguments))
    print(f"\n$ python -m {shlex.join(words)}", flush=True)
    subprocess.run([sys.executable, "-m", *words], check=True)


def example_scenes(scenes: Path) -> list[dict[str, Any]]:
    """Return the first test scene of `EXAMPLE_SOURCES`, and the first with each number of sources."""
    # Streaming reads the files themselves. Without it, `datasets` keeps a copy, and returns that copy also for another
    # folder of the same name.
    test = datasets.load_dataset(str(scenes), split="test", streaming=True).cast_column("audio", EncodedAudio())
    found: dict[int, dict[str, Any]] = {}
    for row in test:
        found.setdefault(0 if set(row["labels"]) == EXAMPLE_SOURCES else row["num_sources"], row)
    return [row for _, row in sorted(found.items())]


def held_out_recordings(scenes: Path) -> dict[Path, str]:
    """Return the recordings of the test scenes and their classes."""
    settings = read_settings(scenes / "scenes.yaml")
    test = open_scene_pools(settings)["test"].mixer.sounds
    return {SOUNDS / name: label for name, label in zip(test.ids, test.labels, strict=True)}


def print_scenes(tagger: SSLAMTagger, scenes: Path, out: Path) -> list[Path]:
    """Print the labels of some held-out scenes beside their sources, and write the scenes as sound files."""
    print("\nTest scenes, each with as many labels as it has sources:")
    files = []
    for row in example_scenes(scenes):
        path = out / f"{row['id']}.flac"
        path.write_bytes(row["audio"]["bytes"])
        files.append(path)
        print(f"\n  {path} contains {', '.join(sorted(row['labels']))}")
        for label in tagger.tag(path, top_k=row["num_sources"]):
            wrong = "" if label["label"] in row["labels"] else "  (wrong)"
            print(f"    {label['score']:.2f}  {label['label']}{wrong}")
    return files


def print_share_found(predictions: Path, labels: list[str]) -> None:
    """Print the share of sources that are among the top labels of a scene, which are as many as it has sources.

    Args:
        predictions: The table of labels and scores that the evaluation wrote.
        labels: The classes in the order of the scores.
    """
    found: dict[int, list[float]] = {}
    for row in pq.read_table(predictions).to_pylist():
        first = {labels[i] for i in np.argsort(row["scores"])[-len(row["labels"]) :]}
        found.setdefault(row["group"], []).append(len(first & set(row["labels"])) / len(row["labels"]))
    print("\n  Share of the sources among the top labels of a scene, as many labels as it has sources:")
    for num_sources, shares in sorted(found.items()):
        print(f"    {num_sources} source{'s' * (num_sources > 1)}: {np.mean(shares):.0%} in {len(shares)} scenes")


def print_recordings(tagger: SSLAMTagger, recordings: dict[Path, str]) -> None:
    """Print the top label of each held-out recording beside its class."""
    print(f"\nHeld-out recordings:\n\n  {'file':<50}{'class':<12}score  top label")
    num_right = 0
    for path, truth in recordings.items():
        (label,) = tagger.tag(path, top_k=1)
        right = label["label"] == truth
        num_right += right
        print(f"  {path!s:<50}{truth:<12} {label['score']:.2f}  {label['label']}{'' if right else '  (wrong)'}")
    print(f"\n  The top label is right for {num_right} of {len(recordings)} held-out recordings.")


def similarities(model: Path) -> tuple[list[Path], np.ndarray]:
    """Return the paths of all recordings and the cosine similarities of their embeddings, -inf on the diagonal."""
    clips = list(embed(str(SOUNDS), str(model), pooling="mean"))
    vectors = np.stack([clip.embedding for clip in clips])
    vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return [Path(clip.name) for clip in clips], similarity


def print_neighbours(models: dict[str, Path], recordings: dict[Path, str], top_k: int = 3) -> None:
    """Print the nearest neighbours of the first held-out recording, and how often neighbours share a class.

    Args:
        models: Models by their descriptions. The first one gives the list of neighbours.
        recordings: The held-out recordings and their classes. A class is the name of a recording's folder.
        top_k: Number of neighbours in the list.
    """
    for number, (description, model) in enumerate(models.items()):
        paths, similarity = similarities(model)
        if number == 0:
            query = paths.index(next(iter(recordings)))
            print(f"\nNearest neighbours of {paths[query]} among the other {len(paths) - 1} recordings:\n")
            for i in np.argsort(-similarity[query])[:top_k]:
                print(f"  {similarity[query, i]:.3f}  {paths[i]!s:<50}{paths[i].parent.name}")
            print("\n  Held-out recordings whose nearest neighbour has the same class:")
        nearest = {path: paths[similarity[i].argmax()] for i, path in enumerate(paths)}
        num_right = sum(nearest[path].parent.name == label for path, label in recordings.items())
        print(f"    by embeddings of the {description}: {num_right} of {len(recordings)}")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for all files that the steps write")
    out = parser.parse_args().out
    scenes, stage1, stage2, probes, classifier = (
        out / name for name in ("scenes", "stage1", "stage2", "probes", "classifier")
    )

    if not scenes.exists():
        size = ("--clips", 2000, "--seconds", 2.58, "--max-sources", MAX_SOURCES)
        run("training.soundscapes", scenes, "--sounds", SOUNDS, *size, "--splits", *SPLITS, *MIXING, "--plot")
    resumable = ("--data", scenes, "--resume", "auto")
    config = CONFIGS / "pretrain_tiny.yaml"
    run("training.pretrain", "--config", config, *resumable, "--output_dir", stage1, "--max_updates", 1000)
    config = CONFIGS / "pretrain_tiny_stage2.yaml"
    init = ("--init_from", stage1 / "model")
    run("training.pretrain", "--config", config, *resumable, *init, "--output_dir", stage2, "--max_updates", 200)
    encoder, model = stage2 / "model", classifier / "model"
    heads = ("--layers", "all", "--poolings", "mean", "max", "std", "--compare", "new_weights", "mfcc_forest")
    folders = ("--output_dir", probes, "--cache_dir", out / "features")
    run("training.linear_eval", "--model", encoder, "--data", scenes, *folders, *heads)
    config = CONFIGS / "finetune_tiny.yaml"
    run("training.finetune", "--config", config, *resumable, "--model", encoder, "--output_dir", classifier)

    tagger = SSLAMTagger.from_pretrained(model)
    recordings = held_out_recordings(scenes)
    evaluation = model / "evaluation" / f"{scenes.name}-test"
    clips = print_scenes(tagger, scenes, out)
    print_share_found(evaluation / "predictions.parquet", tagger.labels)
    print_recordings(tagger, recordings)
    print_neighbours({"classifier": model, "pre-trained encoder": encoder}, recordings)

    print("\nFiles:")
    for path, what in {
        model: "the classifier and its card, a folder for from_pretrained and for the Hub",
        encoder: "the pre-trained encoder",
        stage1 / "curves.png": "curves of stage 1",
        stage2 / "curves.png": "curves of stage 2",
        probes / "heads.md": "linear evaluation of the encoder, of new weights and of MFCCs",
        classifier / "curves.png": "curves of fine-tuning",
        evaluation / "per_class.png": "average precision by class",
        evaluation / "results.json": "all results on the test scenes",
        **dict.fromkeys(clips, "a scene above"),
        scenes / "soundscapes.png": "pictures of scenes and recordings",
    }.items():
        print(f"  {path}  {what}")


if __name__ == "__main__":
    main()

"""Train a classifier on frozen features: embed the clips once, then fit the classifier in seconds.

    python -m training.soundscapes soundscapes --clips 600 --seconds 3 --max-sources 1
    python -m examples.classify_with_features outputs/quickstart/classifier/model soundscapes

The data set needs the columns `id`, `audio` and `labels`, and the splits train and test. The feature vector of a clip
is the mean over its patches. On other data, the CLS token (`pooling="cls"`) or another layer may work better.
"""

import argparse

import datasets
import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler

from modeling_sslam.inference import Embedder, embed
from modeling_sslam.inference.embedding.dataset import AudioDataset


def features_and_labels(embedder: Embedder, dataset: str, split: str) -> tuple[np.ndarray, list[list[str]]]:
    """Return features `(clips, hidden_size)`, the mean over a clip's windows, and the labels of each clip."""
    features: dict[str, list[np.ndarray]] = {}
    for clip in embed(AudioDataset(dataset, split=split), embedder):
        features.setdefault(clip.name, []).append(clip.embedding)
    rows = datasets.load_dataset(dataset, split=split, streaming=True).select_columns(["id", "labels"])
    labels = {row["id"]: row["labels"] for row in rows}
    return np.stack([np.mean(windows, axis=0) for windows in features.values()]), [labels[id_] for id_ in features]


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a model")
    parser.add_argument("dataset", help="folder or Hub id of a data set")
    arguments = parser.parse_args()

    embedder = Embedder.from_pretrained(arguments.model, pooling="mean")
    train, train_labels = features_and_labels(embedder, arguments.dataset, "train")
    test, test_labels = features_and_labels(embedder, arguments.dataset, "test")

    binarizer = MultiLabelBinarizer().fit(train_labels)
    classifier = make_pipeline(StandardScaler(), OneVsRestClassifier(LogisticRegression(C=0.1, max_iter=1000)))
    classifier.fit(train, binarizer.transform(train_labels))

    # A class needs training clips for its classifier, and test clips for its average precision.
    known = [[label for label in labels if label in binarizer.classes_] for labels in test_labels]
    targets, scores = binarizer.transform(known), classifier.predict_proba(test)
    precision = {
        binarizer.classes_[index]: average_precision_score(targets[:, index], scores[:, index])
        for index in np.flatnonzero(targets.any(axis=0))
    }
    print(f"mAP {np.mean(list(precision.values())):.3f} over {len(precision)} classes, {len(test)} test clips")
    for label in sorted(precision, key=precision.__getitem__, reverse=True)[:5]:
        print(f"  {precision[label]:.3f}  {label}")


if __name__ == "__main__":
    main()

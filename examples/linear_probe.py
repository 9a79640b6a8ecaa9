"""How much of a labelled data set a frozen encoder makes linearly separable:

    python -m examples.linear_probe MODEL DATASET            # e.g. runs/tiny/model soundscapes
    python -m examples.linear_probe MODEL DATASET --random   # the same architecture with new weights, to compare with

Features of a clip are the mean over its patch tokens; one logistic regression per class, fitted on the split "train",
scored by mean average precision on "test". Best regularisation by "validation".
"""

import argparse
import io

import datasets
import numpy as np
import soundfile
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MultiLabelBinarizer, StandardScaler
from tqdm import tqdm
from transformers import set_seed

from modeling_sslam import SSLAMFeatureExtractor, SSLAMModel

STRENGTHS = (0.001, 0.01, 0.1, 1.0)


@torch.inference_mode()
def clip_features(
    model: SSLAMModel, extractor: SSLAMFeatureExtractor, clips: datasets.Dataset, batch_size: int = 32
) -> np.ndarray:
    """float32 `(clips, hidden_size)`: the mean over all patch tokens of each clip."""
    features = []
    for start in tqdm(range(0, len(clips), batch_size), desc="Features", leave=False):
        encoded = clips[start : start + batch_size]["audio"]
        waveforms = [soundfile.read(io.BytesIO(audio["bytes"]), dtype="float32")[0] for audio in encoded]
        inputs = extractor(
            waveforms, sampling_rate=extractor.sampling_rate, padding="longest", truncation=False, return_tensors="pt"
        )
        states = model(**inputs.to(model.device)).last_hidden_state[:, 1:]
        features.append(states.mean(1).cpu().numpy())
    return np.concatenate(features)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a pre-trained model")
    parser.add_argument("dataset", help="folder of training.soundscapes")
    parser.add_argument("--random", action="store_true", help="with new weights in place of the trained ones")
    parser.add_argument("--seed", type=int, default=0, help="of the new weights")
    arguments = parser.parse_args()

    set_seed(arguments.seed)
    extractor = SSLAMFeatureExtractor.from_pretrained(arguments.model)
    model = SSLAMModel.from_pretrained(arguments.model)
    if arguments.random:
        model = SSLAMModel(model.config)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    data = datasets.load_dataset(arguments.dataset).cast_column("audio", datasets.Audio(decode=False))
    labels = MultiLabelBinarizer().fit(data["train"]["labels"])
    x = {split: clip_features(model, extractor, clips) for split, clips in data.items()}
    y = {split: labels.transform(clips["labels"]) for split, clips in data.items()}

    def fit(strength: float) -> OneVsRestClassifier:
        classifier = OneVsRestClassifier(LogisticRegression(C=strength, max_iter=1000))
        return make_pipeline(StandardScaler(), classifier).fit(x["train"], y["train"])

    def score(probe: OneVsRestClassifier, split: str) -> float:
        return average_precision_score(y[split], probe.predict_proba(x[split]), average="macro")

    best = max((fit(strength) for strength in STRENGTHS), key=lambda probe: score(probe, "validation"))
    name = f"{arguments.model}, new weights" if arguments.random else arguments.model
    print(f"{name}: mAP {score(best, 'test'):.4f} over {len(labels.classes_)} classes, {len(y['test'])} clips")


if __name__ == "__main__":
    main()

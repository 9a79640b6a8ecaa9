"""Add a column of embeddings to a data set with `datasets.map`, which computes in batches and caches the result.

    python -m training.soundscapes soundscapes --clips 60 --seconds 3
    python -m examples.datasets_map outputs/quickstart/classifier/model soundscapes with_embeddings

Clips longer than the model's input are truncated. For long recordings, several processes, or runs that may be
interrupted, use `sslam embed`.
"""

import argparse

import datasets
import numpy as np
import torch

from modeling_sslam import SSLAMFeatureExtractor, SSLAMModel
from modeling_sslam.common.audio import read_waveform


class AddEmbeddings:
    """Function of batches for `datasets.map`.

    `datasets` caches the results under a hash of this object, so other weights get another cache entry.
    """

    def __init__(self, model: str) -> None:
        self.extractor = SSLAMFeatureExtractor.from_pretrained(model)
        self.model = SSLAMModel.from_pretrained(model).eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def __call__(self, batch: dict[str, list]) -> dict[str, np.ndarray]:
        """Embed the clips of a batch. The embedding is the state of the CLS token."""
        rate, longest = self.extractor.sampling_rate, self.extractor.num_samples(self.extractor.max_length)
        waveforms = [read_waveform(audio["bytes"] or audio["path"], rate, longest) for audio in batch["audio"]]
        inputs = self.extractor(waveforms, sampling_rate=rate, return_tensors="pt").to(self.model.device)
        return {"embedding": self.model(**inputs).pooler_output.cpu().numpy()}


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id of a model")
    parser.add_argument("dataset", help="folder or Hub id of a data set with a column `audio`")
    parser.add_argument("out", help="folder to write, for datasets.load_from_disk")
    parser.add_argument("--split", default="train", help="split of the data set (default: train)")
    arguments = parser.parse_args()

    dataset = datasets.load_dataset(arguments.dataset, split=arguments.split)
    # Keep the files encoded: read_waveform averages channels and resamples as in training, without torchcodec.
    dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
    dataset = dataset.map(AddEmbeddings(arguments.model), batched=True, batch_size=8)
    dataset.save_to_disk(arguments.out)
    print(dataset)


if __name__ == "__main__":
    main()

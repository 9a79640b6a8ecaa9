"""Embeddings as one more column of a data set, by `datasets.map`: cached, batched, and saved with the rest.

    python -m training.soundscapes soundscapes --clips 60 --seconds 3
    python -m examples.datasets_map outputs/quickstart soundscapes with_embeddings

For what fits this pattern. For recordings longer than the model's window, many processes or interrupted runs there is
`sslam embed`.
"""

import argparse

import datasets
import torch

from modeling_sslam import SSLAMFeatureExtractor, SSLAMModel
from modeling_sslam.common.audio import read_waveform


class AddEmbeddings:
    """A function of batches. `datasets` caches what it gives by a hash of what it holds, the weights among it."""

    def __init__(self, model: str) -> None:
        self.extractor = SSLAMFeatureExtractor.from_pretrained(model)
        self.model = SSLAMModel.from_pretrained(model).eval().to("cuda" if torch.cuda.is_available() else "cpu")

    @torch.inference_mode()
    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        rate, longest = self.extractor.sampling_rate, self.extractor.num_samples(self.extractor.max_length)
        waveforms = [read_waveform(audio["bytes"] or audio["path"], rate, longest) for audio in batch["audio"]]
        inputs = self.extractor(waveforms, sampling_rate=rate, return_tensors="pt").to(self.model.device)
        return {"embedding": self.model(**inputs).pooler_output.cpu().numpy()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or Hub id")
    parser.add_argument("dataset", help="folder or Hub id, with a column `audio`")
    parser.add_argument("out", help="folder to save to, for datasets.load_from_disk")
    parser.add_argument("--split", default="train")
    arguments = parser.parse_args()

    dataset = datasets.load_dataset(arguments.dataset, split=arguments.split)
    # Undecoded: the model's own reader mixes down and resamples as in training, and needs no torchcodec.
    dataset = dataset.cast_column("audio", datasets.Audio(decode=False))
    dataset = dataset.map(AddEmbeddings(arguments.model), batched=True, batch_size=8)
    dataset.save_to_disk(arguments.out)
    print(dataset)


if __name__ == "__main__":
    main()

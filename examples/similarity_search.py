"""Find the places in recordings that sound most like a query, with FAISS on the embeddings that `sslam embed` wrote.

    sslam embed tests/fixtures/audio --model outputs/quickstart/classifier/model --out embeddings --window 1 --hop 0.5
    python -m examples.similarity_search embeddings tests/fixtures/audio/misc_crow.flac

The first window of the query is embedded with the model and settings that `sslam embed` used.
"""

import argparse
import json
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq

from modeling_sslam.inference import embed


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors to unit length. Their inner product is then the cosine similarity."""
    vectors = np.array(vectors, dtype=np.float32)
    faiss.normalize_L2(vectors)
    return vectors


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", type=Path, help="folder that sslam embed wrote with --pooling cls or mean")
    parser.add_argument("query", help="sound file to compare with")
    parser.add_argument("--top-k", type=int, default=5, help="number of places to print (default: 5)")
    arguments = parser.parse_args()

    settings = json.loads((arguments.embeddings / "settings.json").read_text())
    if settings["pooling"] not in ("cls", "mean") or settings["layer"] == "all":
        parser.error(
            f"{arguments.embeddings} has several vectors per window. Run sslam embed with --pooling cls or mean and "
            "one --layer."
        )

    rows = pq.read_table(arguments.embeddings / "data").to_pandas()
    vectors = unit_vectors(np.stack(rows["embedding"]))
    # This search is exact. For millions of vectors use faiss.index_factory(size, "IVF4096,PQ64",
    # faiss.METRIC_INNER_PRODUCT).
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)

    chosen = {name: settings[name] for name in ("pooling", "layer", "window")}
    query = next(embed(arguments.query, settings["model"], **chosen))
    similarities, neighbours = index.search(unit_vectors(query.embedding[None]), arguments.top_k)
    names = rows["path" if "path" in rows else "id"]
    for similarity, i in zip(similarities[0], neighbours[0], strict=True):
        if i >= 0:  # FAISS returns -1 if there are fewer vectors than requested neighbours
            print(f"{similarity:.3f}  {names[i]}  {rows['start'][i]:.2f} to {rows['end'][i]:.2f} s")


if __name__ == "__main__":
    main()

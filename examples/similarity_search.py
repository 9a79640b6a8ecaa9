"""Find the places in recordings that sound like a query: nearest neighbours with FAISS in the table of `sslam embed`.

    sslam embed tests/fixtures/audio --model outputs/quickstart/classifier/model --out embeddings --window 1 --hop 0.5
    python -m examples.similarity_search embeddings tests/fixtures/audio/misc_crow.flac

The query's first window is embedded with the model and the settings of the table.
"""

import argparse
import json
from pathlib import Path

import faiss
import numpy as np
import pyarrow.parquet as pq

from modeling_sslam.inference import embed


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Scale vectors to length 1, so that their inner product is the cosine similarity."""
    vectors = np.array(vectors, dtype=np.float32)
    faiss.normalize_L2(vectors)
    return vectors


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("embeddings", type=Path, help="folder that sslam embed wrote with pooling cls or mean")
    parser.add_argument("query", help="sound file to compare with")
    parser.add_argument("--top-k", type=int, default=5, help="number of places to print (default: 5)")
    arguments = parser.parse_args()

    settings = json.loads((arguments.embeddings / "settings.json").read_text())
    if settings["pooling"] not in ("cls", "mean") or settings["layer"] == "all":
        parser.error(f"{arguments.embeddings} has several vectors a window; use --pooling cls or mean, and one layer.")

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
        if i >= 0:  # FAISS returns -1 where there are fewer vectors than neighbours
            print(f"{similarity:.3f}  {names[i]}  {rows['start'][i]:.2f} to {rows['end'][i]:.2f} s")


if __name__ == "__main__":
    main()

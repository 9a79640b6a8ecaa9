"""Embeddings as table rows: one vector a row, as a list of fixed size, with its place in the sound."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from ...common.errors import InferenceError
from .embedder import ClipEmbedding, Embedder

# Axes of a window's embedding by pooling, without the vector's own axis.
POOLED_AXES: dict[str, tuple[str, ...]] = {"cls": (), "mean": (), "frame": ("time",), "patch": ("time", "mel_band")}
COLUMNS = {
    "path": "The sound file.",
    "row": "Shard and row of the sound in the data set.",
    "id": "Id of the sound in the data set.",
    "start": "Start of the vector's stretch, in seconds from the beginning of the sound.",
    "end": "End of the vector's stretch, in seconds from the beginning of the sound.",
    "window": "Number of the window within the sound.",
    "mel_band": "Row of patches; 0 holds the lowest frequencies.",
    "layer": "Number of the block whose output the vector is; 0 is the embeddings' output.",
    "model": "Folder or Hub id of the model.",
    "embedding": "The vector.",
}


def axes_of(embedder: Embedder) -> tuple[str, ...]:
    """Return the names of all axes of `ClipEmbedding.embedding` but the last."""
    return (*(("layer",) if embedder.layer == "all" else ()), *POOLED_AXES[embedder.pooling])


def table_schema(embedder: Embedder, key: str, dtype: str) -> pa.Schema:
    """Return the columns of the table.

    `window`, `mel_band` and `layer` are left out unless a window has several vectors that they tell apart.

    Args:
        embedder: The embedder of the rows.
        key: "path", or "row" for the sounds of a data set, which also have an "id".
        dtype: Type of the vectors, "float32" or "float16".
    """
    axes = axes_of(embedder)
    columns = [(name, pa.string()) for name in ((key,) if key == "path" else (key, "id"))]
    columns += [("start", pa.float64()), ("end", pa.float64())]
    columns += [("window", pa.int32())] if "time" in axes else []
    columns += [(name, pa.int16()) for name in ("mel_band", "layer") if name in axes]
    element = {"float32": pa.float32(), "float16": pa.float16()}[dtype]
    return pa.schema([*columns, ("model", pa.string()), ("embedding", pa.list_(element, embedder.hidden_size))])


def to_table(clips: list[ClipEmbedding], embedder: Embedder, schema: pa.Schema, model_id: str) -> pa.Table:
    """Return the rows of embeddings.

    Args:
        clips: The embeddings, at least one.
        embedder: The embedder that computed them.
        schema: The columns, from [`table_schema`].
        model_id: Content of the column `model`.

    Raises:
        InferenceError: If a value is not finite in the precision of the column.
    """
    axes, vector_type = axes_of(embedder), schema.field("embedding").type
    dtype = np.dtype(vector_type.value_type.to_pandas_dtype())
    with np.errstate(over="ignore"):
        values = np.concatenate([clip.embedding.ravel() for clip in clips]).astype(dtype)
    if not np.isfinite(values).all():
        raise InferenceError(
            f"The embeddings have values that {dtype} cannot hold. Compute and write in float32 (--dtype float32, "
            "--dtype-out float32); if that does not help, the model's weights are broken."
        )
    shapes = [clip.embedding.shape[:-1] for clip in clips]
    places = np.concatenate([np.indices(shape).reshape(len(axes), math.prod(shape)) for shape in shapes], axis=1)

    def repeat(values: Iterable) -> np.ndarray:
        return np.repeat(np.array(list(values)), [math.prod(shape) for shape in shapes])

    keys = repeat(clip.key for clip in clips)
    columns: dict[str, Any] = {
        "path": keys,
        "row": keys,
        "id": repeat(clip.name for clip in clips) if "id" in schema.names else None,
        "start": repeat(clip.start for clip in clips),
        "end": repeat(clip.end for clip in clips),
        "window": repeat(clip.window for clip in clips),
        "model": np.full(len(keys), model_id),
        **dict(zip(axes, places, strict=True)),
    }
    if "time" in axes:
        step = embedder.patch_frames / embedder.frames_per_second
        columns["start"] = columns["start"] + columns["time"] * step
        columns["end"] = np.minimum(columns["start"] + step, columns["end"])
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(values), vector_type.list_size)
    others = [pa.array(columns[field.name], field.type) for field in schema if field.name != "embedding"]
    return pa.table([*others, vectors], schema=schema)

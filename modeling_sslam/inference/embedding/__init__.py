"""Embeddings of sounds."""

# Ways to make one embedding of a window. They stand here because `sslam embed --help` must not import torch.
EMBEDDING_POOLINGS = ("cls", "mean", "frame", "patch")

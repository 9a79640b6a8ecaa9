"""Embeddings of sounds."""

# How the states of a window become its embedding. Here, because `sslam embed --help` needs them and must not load torch.
EMBEDDING_POOLINGS = ("cls", "mean", "frame", "patch")

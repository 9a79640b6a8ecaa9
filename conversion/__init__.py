"""Conversion of published SSLAM and EAT checkpoints to transformers and back: `python -m conversion --help`.

In the order of the work: `reader` takes weights and settings out of a file and executes nothing of it, `layouts` holds
the published names as tables, `configuration` tells from both what model it is, `writer` puts it down in the layout
asked for, or `onnx_export` as a graph, checked, and all or nothing. `convert` is the whole of it in one function.
"""


class ConversionError(ValueError):
    """A source that cannot be converted, or not as asked: the message says what is wrong with it and what to do."""

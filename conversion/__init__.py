"""Conversion of published SSLAM and EAT checkpoints to transformers and back: `python -m conversion --help`.

The published names are tables in `modeling_sslam.layouts`. The modules follow the order of the work, and each uses
only those above it:

- `pickles` runs a pickle's program without calling anything, `torch_files` finds the tensors of a `.pt` file.
- `reader` reads weights and settings from a file or folder.
- `avex` holds facts about the Earth Species Project's checkpoints.
- `configuration` derives the model's configuration from weights and settings.
- `writer` writes a model in a layout and checks the result; `onnx_export` writes an ONNX graph.
- `card` renders the model card.
- `convert` runs one conversion from start to end.

`hub` downloads sources from the Hub and uploads results.
"""


class ConversionError(ValueError):
    """A source cannot be converted, or not in the way asked for. The message names the fault and the remedy."""

"""Export of encoder and classifier as ONNX graphs, and the check that a graph computes the model's numbers.

A graph's input is the model's, `input_values`. The feature extractor computes them outside the graph.
"""

import copy
import importlib.util
import logging
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from modeling_sslam import SSLAMConfig, SSLAMFeatureExtractor, SSLAMForAudioClassification, SSLAMPreTrainedModel
from modeling_sslam.common.files import write_errors

from . import ConversionError
from .writer import Check

GRAPH = "model.onnx"
REQUIRED = ("onnx", "onnxruntime", "onnxscript")
# The first opset with LayerNormalization (17) and exact GELU (20) as single operators.
OPSET = 20
# The largest difference of a graph's outputs from the model's.
TOLERANCE = 1e-4
# Name of the graph's dynamic size. T and the number of tokens are multiples of it.
TIME_PATCHES = "time_patches"

Inputs = dict[str, torch.Tensor]


class ExportedForward(nn.Module):
    """Forward pass of a graph: takes tensors, returns a tuple of tensors."""

    def __init__(self, model: SSLAMPreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Compute the model's outputs.

        Args:
            input_values: `(batch_size, T, num_mel_bins)`.
            attention_mask: `(batch_size, T)`, 0 on padding.
        """
        # Outside torch nothing checks T, and the convolution would drop the frames of a partial patch. This reshaping
        # fails on them.
        patch_size = self.model.config.patch_size
        input_values = input_values.unflatten(1, (-1, patch_size)).flatten(1, 2)
        return self.model(input_values, attention_mask=attention_mask).to_tuple()


def output_names(model: SSLAMPreTrainedModel) -> list[str]:
    """Return the names of a graph's outputs in order. The model's outputs have the same names."""
    return ["logits"] if isinstance(model, SSLAMForAudioClassification) else ["last_hidden_state", "pooler_output"]


def export_graph(model: SSLAMPreTrainedModel, file: Path, masked: bool) -> None:
    """Write the float32 graph of an encoder or classifier.

    Its inputs are `input_values`, float32 of shape `(batch_size, T, num_mel_bins)`, and, if `masked`,
    `attention_mask`, int64 of shape `(batch_size, T)`. Any batch size is valid, and any T that is a multiple of
    `patch_size` within the position table. Running the graph on another T fails. [`output_names`] lists
    the outputs.

    Args:
        model: A float32 model in eval mode.
        file: The file to write.
        masked: Whether the graph takes an `attention_mask`.

    Raises:
        ConversionError: If packages are missing, or torch cannot export the model.
    """
    if missing := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        raise ConversionError(f'ONNX needs {", ".join(missing)}, which is not installed: pip install ".[onnx]".')
    config = model.config
    batch = torch.export.Dim("batch_size")
    frames = config.patch_size * torch.export.Dim(TIME_PATCHES, max=config.max_position_embeddings)
    # torch exports a size of 1 as a constant.
    inputs = _inputs(config, batch_size=2, num_patches=2, masked=masked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of equal names and of its own calls
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # no warning that torchvision is missing
        implementation = config._attn_implementation
        # Eager attention: sdpa in transformers 4 slices the mask to a size that torch cannot express in a graph.
        model.set_attn_implementation("eager")
        try:
            program = torch.onnx.export(
                ExportedForward(model).eval(),
                kwargs=inputs,
                dynamic_shapes={name: {0: batch, 1: frames} for name in inputs},
                input_names=list(inputs),
                output_names=output_names(model),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        except torch.onnx.OnnxExporterError as error:
            raise ConversionError(
                f"torch cannot export this model as an ONNX graph: {_first_line(error.__cause__ or error)}"
            ) from error
        finally:
            model.set_attn_implementation(implementation)
    assert program is not None  # an export with dynamo returns a program
    if not isinstance(model, SSLAMForAudioClassification):
        # torch names this size by an internal symbol.
        shape = program.model.graph.outputs[0].shape
        assert shape is not None
        shape[1] = f"{config.num_mel_patches}*{TIME_PATCHES} + 1"
    # One file, except for graphs above 2 GB, the limit of a protobuf message.
    with write_errors(file):
        program.save(file)


def write_onnx(
    model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, folder: Path, masked: bool = False
) -> Check:
    """Write a folder with `model.onnx` and the configurations of model and feature extractor.

    Args:
        model: An encoder or a classifier.
        extractor: Its feature extractor.
        folder: The folder, which must not exist.
        masked: Whether the graph takes an `attention_mask`.

    Raises:
        ConversionError: If packages are missing, or torch cannot export the model.
    """
    # Build the model anew in float32, because a model in half precision has a rounded position table.
    model = type(model).from_pretrained(
        None, config=model.config, state_dict=model.float().state_dict(), dtype=torch.float32
    )
    folder.mkdir()
    export_graph(model, folder / GRAPH, masked)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # The folder has no source files of a model. Saving refers to the configuration's source file by itself.
    config.auto_map = {}
    config.dtype = torch.float32
    config.save_pretrained(folder)
    extractor.save_pretrained(folder)
    probes = _probes(model.config, extractor, masked)
    with torch.inference_mode():
        expected = [ExportedForward(model)(**inputs) for inputs in probes]
    return partial(check_onnx, probes=probes, expected=expected)


def check_onnx(path: Path, probes: list[Inputs], expected: list[tuple[torch.Tensor, ...]]) -> str:
    """Run a written graph in onnxruntime and compare its outputs with the model's.

    Args:
        path: The folder.
        probes: Inputs of several batch sizes and lengths.
        expected: The model's outputs for each.

    Raises:
        ConversionError: If onnxruntime cannot run the graph, or its outputs differ by more than `TOLERANCE`.
    """
    import onnxruntime

    SSLAMFeatureExtractor.from_pretrained(path)
    try:
        session = onnxruntime.InferenceSession(path / GRAPH, providers=["CPUExecutionProvider"])
        found = [session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()}) for inputs in probes]
    # Catch any type, because onnxruntime's errors have no common base class.
    except Exception as error:
        raise ConversionError(f"onnxruntime cannot run the graph: {_first_line(error)}") from error
    difference = max(
        np.abs(ours - theirs.numpy()).max().item()
        for outputs, tensors in zip(found, expected, strict=True)
        for ours, theirs in zip(outputs, tensors, strict=True)
    )
    if not difference <= TOLERANCE:
        raise ConversionError(
            f"The graph computes other numbers than the model: they differ by up to {difference:.3g}, more than "
            f"{TOLERANCE:g}."
        )
    shapes = ", ".join(" x ".join(map(str, inputs["input_values"].shape[:2])) for inputs in probes)
    return f"run in onnxruntime {onnxruntime.__version__} on {shapes} frames, within {difference:.1e} of the model"


def _probes(config: SSLAMConfig, extractor: SSLAMFeatureExtractor, masked: bool) -> list[Inputs]:
    """Return inputs of other sizes than the export's: the shortest clip, an odd batch, and a training clip."""
    longest = config.max_position_embeddings
    as_trained = min(extractor.max_length // config.patch_size, longest)
    shapes = ((1, 1), (3, min(5, longest)), (1, as_trained))
    return [_inputs(config, batch_size, num_patches, masked) for batch_size, num_patches in shapes]


def _inputs(config: SSLAMConfig, batch_size: int, num_patches: int, masked: bool) -> Inputs:
    """Return noise of `num_patches` patches in time. If `masked`, all clips but the first end one patch earlier."""
    frames = num_patches * config.patch_size
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_values": torch.randn(batch_size, frames, config.num_mel_bins, generator=generator)}
    if masked:
        inputs["attention_mask"] = torch.ones(batch_size, frames, dtype=torch.int64)
        if num_patches > 1:
            inputs["attention_mask"][1:, frames - config.patch_size :] = 0
    return inputs


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]

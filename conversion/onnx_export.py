"""ONNX graphs of encoder and classifier, and the check that they compute the same.

Their input is the model's, `input_values`: the filter bank stays with the feature extractor.
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

from . import ConversionError
from .writer import Check

GRAPH = "model.onnx"
REQUIRED = ("onnx", "onnxruntime", "onnxscript")
# The first with LayerNormalization (17) and the exact GELU (20) as single operators.
OPSET = 20
# What a graph may differ by from the model it was made of.
TOLERANCE = 1e-4
# The size that T and the number of tokens are given by.
TIME_PATCHES = "time_patches"

Inputs = dict[str, torch.Tensor]


class ExportedForward(nn.Module):
    """What a graph computes: tensors in, a tuple of tensors out."""

    def __init__(self, model: SSLAMPreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        # Outside torch nothing checks the length, and a convolution drops frames that make no whole patch. This fails.
        patch_size = self.model.config.patch_size
        input_values = input_values.unflatten(1, (-1, patch_size)).flatten(1, 2)
        return self.model(input_values, attention_mask=attention_mask).to_tuple()


def output_names(model: SSLAMPreTrainedModel) -> list[str]:
    """Of a graph's outputs, in their order: those of the model."""
    return ["logits"] if isinstance(model, SSLAMForAudioClassification) else ["last_hidden_state", "pooler_output"]


def export_graph(model: SSLAMPreTrainedModel, file: Path, masked: bool) -> None:
    """Writes the graph of an encoder or classifier in eval mode, in float32.

    Its inputs are `input_values`, float32 of shape `(batch_size, T, num_mel_bins)`, and, if `masked`,
    `attention_mask`, int64 of shape `(batch_size, T)`. The batch size is any, T any multiple of `patch_size` up to the
    position table; running it with another T fails. Outputs: [`output_names`].

    Raises:
        ConversionError: If packages are missing, or torch makes no graph of the model.
    """
    if missing := [name for name in REQUIRED if importlib.util.find_spec(name) is None]:
        raise ConversionError(f'ONNX needs {", ".join(missing)}, which is not installed: pip install ".[onnx]".')
    config = model.config
    batch = torch.export.Dim("batch_size")
    frames = config.patch_size * torch.export.Dim(TIME_PATCHES, max=config.max_position_embeddings)
    # Neither size may be 1, which torch takes for a constant.
    inputs = _inputs(config, batch_size=2, num_patches=2, masked=masked)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names of sizes that agree, and about what torch itself calls
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # that torchvision is not there
        implementation = config._attn_implementation
        # The model's own attention: that of transformers 4 cuts the mask to a size that torch cannot express.
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
                f"torch makes no ONNX graph of this model: {_first_line(error.__cause__ or error)}"
            ) from error
        finally:
            model.set_attn_implementation(implementation)
    if not isinstance(model, SSLAMForAudioClassification):
        # torch calls this size after a symbol of its own.
        program.model.graph.outputs[0].shape[1] = f"{config.num_mel_patches}*{TIME_PATCHES} + 1"
    # One file, but for graphs beyond the 2 GB that a protobuf message may have.
    program.save(file)


def write_onnx(
    model: SSLAMPreTrainedModel, extractor: SSLAMFeatureExtractor, folder: Path, masked: bool = False
) -> Check:
    """A folder with `model.onnx`, the model's configuration (its labels) and that of the feature extractor."""
    # Made anew, as from_pretrained would: the position table of a model in half precision is rounded.
    model = type(model).from_pretrained(
        None, config=model.config, state_dict=model.float().state_dict(), dtype=torch.float32
    )
    folder.mkdir()
    export_graph(model, folder / GRAPH, masked)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # The folder has no source of a model that this could refer to; saving puts in what it has.
    config.auto_map = {}
    config.dtype = torch.float32
    config.save_pretrained(folder)
    extractor.save_pretrained(folder)
    probes = _probes(model.config, extractor, masked)
    with torch.inference_mode():
        expected = [ExportedForward(model)(**inputs) for inputs in probes]
    return partial(check_onnx, probes=probes, expected=expected)


def check_onnx(path: Path, probes: list[Inputs], expected: list[tuple[torch.Tensor, ...]]) -> str:
    """Runs the graph in onnxruntime on what the model was run on.

    Args:
        path: The folder.
        probes: Inputs of several batch sizes and lengths.
        expected: What the model made of each.

    Raises:
        ConversionError: If onnxruntime cannot run it, or it computes something else.
    """
    import onnxruntime

    SSLAMFeatureExtractor.from_pretrained(path)
    try:
        session = onnxruntime.InferenceSession(path / GRAPH, providers=["CPUExecutionProvider"])
        found = [session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()}) for inputs in probes]
    # Not by type: onnxruntime's errors have no class in common.
    except Exception as error:
        raise ConversionError(f"onnxruntime cannot run the graph: {_first_line(error)}") from error
    difference = max(
        np.abs(ours - theirs.numpy()).max().item()
        for outputs, tensors in zip(found, expected, strict=True)
        for ours, theirs in zip(outputs, tensors, strict=True)
    )
    if not difference <= TOLERANCE:
        raise ConversionError(
            f"The graph computes something else than the model: they differ by up to {difference:.3g}, more than "
            f"{TOLERANCE:g}."
        )
    shapes = ", ".join(" x ".join(map(str, inputs["input_values"].shape[:2])) for inputs in probes)
    return f"run in onnxruntime {onnxruntime.__version__} on {shapes} frames, within {difference:.1e} of the model"


def _probes(config: SSLAMConfig, extractor: SSLAMFeatureExtractor, masked: bool) -> list[Inputs]:
    """Other batch sizes and lengths than those of the export: the shortest clip, an odd batch, a clip as trained."""
    longest = config.max_position_embeddings
    as_trained = min(extractor.max_length // config.patch_size, longest)
    shapes = ((1, 1), (3, min(5, longest)), (1, as_trained))
    return [_inputs(config, batch_size, num_patches, masked) for batch_size, num_patches in shapes]


def _inputs(config: SSLAMConfig, batch_size: int, num_patches: int, masked: bool) -> Inputs:
    """Noise in `num_patches` patches of time; if `masked`, all but the first clip end a patch early."""
    frames = num_patches * config.patch_size
    generator = torch.Generator().manual_seed(0)
    inputs = {"input_values": torch.randn(batch_size, frames, config.num_mel_bins, generator=generator)}
    if masked:
        inputs["attention_mask"] = torch.ones(batch_size, frames, dtype=torch.int64)
        if num_patches > 1:
            inputs["attention_mask"][1:, frames - config.patch_size :] = 0
    return inputs


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]

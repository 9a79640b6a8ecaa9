"""Compute one update of a small model, whole in each process (DDP), also compiled, and sharded (FSDP).

    distributed_update.py FOLDER [NUM_MICRO_BATCHES [KIND ...]]

test_pretrain_distributed.py starts this in several processes. The main process writes the results to FOLDER/KIND.pt
for each kind: ddp and fsdp; objective, whose objective is one compiled graph; blocks, whose blocks are compiled and
recompute activations.
"""

import os
import sys
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import DistributedDataParallelKwargs
from torch.distributed.fsdp import fully_shard

from modeling_sslam import SSLAMConfig, SSLAMForPreTraining
from modeling_sslam.modeling_sslam_pretraining import draw_unmixed_starts, inverse_block_masks
from training.pretrain import compile_blocks, pretraining_losses
from training.run.accumulation import accumulate_gradients
from training.run.checkpointing import load_optimizer, save_optimizer
from training.run.optimization import OptimizerConfig, make_optimizer

BATCH_SIZE = 3


def make_model() -> SSLAMForPreTraining:
    torch.manual_seed(0)
    config = SSLAMConfig(
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=512,
        num_mel_bins=32,
        max_length=64,
        max_position_embeddings=8,
        num_clones=2,
        decoder_num_layers=2,
        initializer_range=0.2,
        mask_noise_std=0.0,
    )
    return SSLAMForPreTraining(config).train()


def micro_batch(index: int) -> torch.Tensor:
    """Return the input of a forward pass. It does not depend on the process."""
    return torch.randn(BATCH_SIZE, 64, 32, generator=torch.Generator().manual_seed(index))


def mask_generator(index: int) -> torch.Generator:
    """Return the generator of a forward pass's masks and windows, after the draws of the passes before it."""
    generator, config = torch.Generator().manual_seed(99), make_model().config
    for _ in range(index):
        inverse_block_masks(BATCH_SIZE, config.max_length // config.patch_size, config, generator)
        draw_unmixed_starts(config.max_length // config.patch_size, config, generator)
    return generator


def update(folder: Path, kind: str, num_micro_batches: int) -> None:
    # The model fills several buckets, between which DDP divides the graph.
    buckets = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=1)
    accelerator = Accelerator(gradient_accumulation_steps=num_micro_batches, kwargs_handlers=[buckets])
    model = make_model()
    # The backend runs torch's own operators, and compiles in seconds.
    if kind == "objective":
        model.set_memory("fast")
        model.compile(fullgraph=True, dynamic=False, backend="aot_eager")
    elif kind == "blocks":
        compile_blocks(model, backend="aot_eager")
    if kind == "fsdp":
        for layer in (*model.sslam.encoder.layers, *model.teacher.encoder.layers):
            fully_shard(layer)
        fully_shard(model)
        optimizer = accelerator.prepare(make_optimizer(model, OptimizerConfig()))
    else:
        model, optimizer = accelerator.prepare(model, make_optimizer(model, OptimizerConfig()))
    plain_model = accelerator.unwrap_model(model)

    first = accelerator.process_index * num_micro_batches
    inputs = [micro_batch(first + i) for i in range(num_micro_batches)]
    compute_losses = partial(pretraining_losses, model, mask_generator(first))
    outputs = accumulate_gradients(accelerator, model, inputs, compute_losses)
    gradients = {name: whole(p.grad) for name, p in plain_model.named_parameters() if p.grad is not None}
    optimizer.step()
    plain_model.update_teacher(plain_model.ema_decay(1))
    weights = {name: whole(p.detach()) for name, p in plain_model.named_parameters()}

    # Save the state unsharded, and load it into an optimiser without state.
    save_optimizer(folder, accelerator, model, optimizer)
    accelerator.wait_for_everyone()
    moments = first_moments(plain_model, optimizer)
    optimizer.zero_grad()
    optimizer.optimizer.state.clear()
    load_optimizer(folder, model, optimizer)
    loaded_moments = first_moments(plain_model, optimizer)

    losses = accelerator.gather(torch.stack([output["loss"] for output in outputs]))
    deviations = accelerator.gather(outputs[0]["pred_var"])
    if accelerator.is_main_process:
        result = {
            "gradients": gradients,
            "weights": weights,
            "moments": moments,
            "loaded_moments": loaded_moments,
            "losses": losses,
            "pred_var": deviations,
        }
        torch.save(result, folder / f"{kind}.pt")
    accelerator.wait_for_everyone()


def first_moments(model: torch.nn.Module, optimizer: AcceleratedOptimizer) -> dict[str, torch.Tensor]:
    state = optimizer.optimizer.state
    return {name: whole(state[p]["exp_avg"]) for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


if __name__ == "__main__":
    folder, num_micro_batches, *kinds = *sys.argv[1:], *(["1"] if len(sys.argv) == 2 else [])
    for kind in kinds or ("ddp", "fsdp"):
        torch.compiler.reset()
        update(Path(folder), kind, int(num_micro_batches))
    Accelerator().end_training()
    # Skip the interpreter's shutdown. It sometimes aborts ("terminate called without an active exception"), because
    # threads of torch's process groups outlive their owners. All results are written by now.
    os._exit(0)

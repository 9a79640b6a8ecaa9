"""Memory of a fine-tuning update of the base size with 48 clips of 10 s in bfloat16, compared with 24 GB.

    python -m benchmarks.finetuning_memory [--batch_size 48] [--gradient_checkpointing]

On a GPU, the program runs the update and reads the peak. Without a GPU, it counts bytes on the CPU. The memory that
autograd keeps for the backward pass (each storage once) grows linearly with the batch size. The program extrapolates
it from two small batches, and adds weights, gradients and AdamW's two moments in float32. Workspaces of kernels are
not counted.
"""

import argparse
import json

import torch

from modeling_sslam import SSLAMConfig, SSLAMForAudioClassification
from training.run.losses import loss_sum

NUM_LABELS = 527
# Copies of the parameters: weights, gradients and two moments.
NUM_COPIES = 4
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=48)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = SSLAMForAudioClassification(SSLAMConfig(num_labels=NUM_LABELS, drop_path_rate=0.1)).to(device).train()
    if arguments.gradient_checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    row = {"device": device, "batch_size": arguments.batch_size, "parameters_million": round(num_parameters / 1e6, 1)}
    if device == "cuda":
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for _ in range(2):
            loss_of(model, arguments.batch_size).backward()
            optimizer.step()
            optimizer.zero_grad()
        row["peak_gib"] = round(torch.cuda.max_memory_allocated() / GIB, 2)
    else:
        one, two = kept_bytes(model, 1), kept_bytes(model, 2)
        kept = one + (two - one) * (arguments.batch_size - 1)
        row["kept_for_backward_gib"] = round(kept / GIB, 2)
        row["kept_per_clip_mib"] = round((two - one) / 2**20, 1)
        row["weights_gradients_moments_gib"] = round(NUM_COPIES * 4 * num_parameters / GIB, 2)
        row["sum_gib"] = round((kept + NUM_COPIES * 4 * num_parameters) / GIB, 2)
    print(json.dumps(row))


def loss_of(model: SSLAMForAudioClassification, batch_size: int) -> torch.Tensor:
    device, config = model.device, model.config
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(torch.randn(batch_size, config.max_length, config.num_mel_bins, device=device)).logits
    return loss_sum(logits, torch.ones_like(logits), "bce_per_target")


def kept_bytes(model: SSLAMForAudioClassification, batch_size: int) -> int:
    """Count the bytes of all storages that the graph of one forward pass holds, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = loss_of(model, batch_size)
    total = sum(kept.values())
    loss.detach_()
    return total


if __name__ == "__main__":
    main()

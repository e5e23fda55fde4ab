"""Two processes of torchtune that share a model, as its distributed recipes do it: FSDP2 over Gloo, bf16.

Usage: torchtune_shared.py MODEL_DIR ROWS.json BATCH ACCUMULATION lora|full
Rank 0 prints one JSON line after each optimizer step. The loop is that of `lora_finetune_distributed` and
`full_finetune_distributed` without what is not training.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torchtune import training
from torchtune.data import padded_collate_sft
from torchtune.models.llama3_2 import llama3_2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import LoRALinear, get_adapter_params, set_trainable_params

from torchtune_lora import lora_model, read, shape

RANKS = 2
CPU = torch.device("cpu")


def main(rank: int, model_dir: Path, rows_path: str, batch_size: int, accumulation: int, method: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo")
    rows = json.load(open(rows_path))
    torch.manual_seed(42)
    model = load(model_dir, method)
    learning_rate = 3e-4 if method == "lora" else 2e-5
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.01, fused=True)
    loss_fn = CEWithChunkedOutputLoss(num_output_chunks=1)
    model.set_num_output_chunks(loss_fn.num_output_chunks)
    per_step = batch_size * accumulation
    for step, start in enumerate(range(0, len(rows), per_step), 1):
        loss_sum, num_labels = torch.zeros(()), torch.zeros((), dtype=torch.long)
        mine = rows[start : start + per_step][rank::RANKS]
        for first in range(0, len(mine), batch_size):
            batch = padded_collate_sft(mine[first : first + batch_size], padding_idx=2)
            labels = batch.pop("labels")
            count = (labels != -100).sum()
            labels = torch.hstack((labels[..., 1:], torch.full((labels.shape[0], 1), -100)))
            loss = loss_fn(model(**batch), labels) * count
            loss_sum, num_labels = loss_sum + loss.detach(), num_labels + count
            loss.backward()
        dist.all_reduce(num_labels)
        dist.all_reduce(loss_sum)
        training.scale_grads(model, RANKS / num_labels)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if rank == 0:
            print(json.dumps({"step": step, "loss": (loss_sum / num_labels).item()}), flush=True)
    dist.destroy_process_group()


def load(model_dir: Path, method: str) -> nn.Module:
    config = json.loads((model_dir / "config.json").read_text())
    with training.set_default_dtype(torch.bfloat16), torch.device("meta"):
        model = lora_model(config) if method == "lora" else llama3_2(**shape(config))
    if method == "lora":
        set_trainable_params(model, get_adapter_params(model))
    conditions = [partial(training.get_shard_conditions, names_to_match=None)]
    training.shard_model(model=model, shard_conditions=conditions, cpu_offload=False, reshard_after_forward=True)
    with training.set_default_dtype(torch.bfloat16), CPU:
        for module in model.modules():
            if isinstance(module, LoRALinear):
                module.to_empty(device=CPU)
                module.initialize_parameters()
            if hasattr(module, "rope_init"):
                module.rope_init()
    training.load_from_full_model_state_dict(model, read(model_dir, config), CPU, cpu_offload=False)
    training.validate_no_params_on_meta_device(model)
    return model.train()


if __name__ == "__main__":
    os.environ.setdefault("MASTER_PORT", "29517")
    arguments = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    torch.multiprocessing.spawn(main, arguments, nprocs=RANKS)

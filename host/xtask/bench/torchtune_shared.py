"""torchtune's own distributed recipes on two processes of this machine: FSDP2 over Gloo, bf16.

Usage: torchtune_shared.py MODEL_DIR ROWS.json BATCH ACCUMULATION lora|full
Rank 0 prints one JSON line after each optimizer step. Loading, loop and updates are those of the installed
`lora_finetune_distributed` and `full_finetune_distributed`; given to them are the rows, the weights and a place for the
losses; taken from them are checkpoints and what they do to a GPU's memory.
"""

import gc
import importlib.util
import json
import os
import sys
from pathlib import Path

import torch
import torchtune
from omegaconf import OmegaConf
from torch.utils.data import Dataset
from torchtune import training

from torchtune_lora import read, shape

RANKS = 2


class Rows(Dataset):
    def __init__(self, tokenizer, path: str):
        self.rows = json.load(open(path))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class Tokenizer:
    pad_id = 2


class Lines:
    def log_config(self, config) -> None:
        pass

    def log_dict(self, payload: dict, step: int) -> None:
        print(json.dumps({"step": step, "loss": float(payload["loss"])}), flush=True)

    def close(self) -> None:
        pass


def constant(optimizer, num_training_steps: int, last_epoch: int):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)


def config(model: dict, rows_path: str, batch_size: int, accumulation: int, method: str):
    part = lambda name, **settings: {"_component_": name, **settings}
    own = lambda name, **settings: part(f"torchtune_shared.{name}", **settings)
    factory = "torchtune.models.llama3_2." + ("lora_llama3_2" if method == "lora" else "llama3_2")
    adapter = dict(lora_attn_modules=["q_proj", "v_proj"], apply_lora_to_mlp=False, lora_rank=8, lora_alpha=16)
    rate = 3e-4 if method == "lora" else 2e-5
    return OmegaConf.create({
        "model": part(factory, **shape(model), **(adapter if method == "lora" else {})),
        "optimizer": part("torch.optim.AdamW", lr=rate, weight_decay=0.01, fused=True),
        "lr_scheduler": own("constant"),
        # Its default of 8 chunks is four times slower in bf16 on a CPU.
        "loss": part("torchtune.modules.loss.CEWithChunkedOutputLoss", num_output_chunks=1),
        "dataset": own("Rows", path=rows_path),
        "tokenizer": own("Tokenizer"),
        "metric_logger": own("Lines"),
        "checkpointer": {},
        "resume_from_checkpoint": False,
        "batch_size": batch_size,
        "gradient_accumulation_steps": accumulation // RANKS,
        "shuffle": False,
        "epochs": 1,
        "max_steps_per_epoch": None,
        "seed": 42,
        "device": "cpu",
        "dtype": "bf16",
        "output_dir": "",
    })


def recipe(method: str, settings):
    """The recipe; torchtune lets nobody import its recipes."""
    path = Path(torchtune.__file__).parents[1] / f"recipes/{method}_finetune_distributed.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    name = {"lora": "LoRA", "full": "Full"}[method] + "FinetuneRecipeDistributed"
    return getattr(module, name)(settings)


def main(rank: int, model_dir: Path, rows_path: str, batch_size: int, accumulation: int, method: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": str(rank)}
    # Of a GPU alone, and asked on a CPU too.
    training.get_memory_stats = training.log_memory_stats = lambda *_, **__: None
    training.cleanup_before_training = gc.collect
    model = json.loads((model_dir / "config.json").read_text())
    settings = config(model, rows_path, batch_size, accumulation, method)
    if method == "lora":
        torch.distributed.init_process_group("gloo")
    run = recipe(method, settings)
    weights = {training.MODEL_KEY: read(model_dir, model)}
    if method == "lora":
        run.load_checkpoint, run.save_checkpoint = lambda **_: weights, lambda **_: None
    else:
        client = run._checkpoint_client
        client.load_base_checkpoint, client.save_checkpoint = lambda: weights, lambda **_: None
    run.setup(settings)
    run.train()
    run.cleanup()


if __name__ == "__main__":
    os.environ.setdefault("MASTER_PORT", "29517")
    arguments = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    torch.multiprocessing.spawn(main, arguments, nprocs=RANKS)

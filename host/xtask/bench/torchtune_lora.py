"""LoRA with torchtune's model, collation and loss, at their best on this machine: bf16, one output chunk.

Usage: torchtune_lora.py MODEL_DIR ROWS.json BATCH ACCUMULATION
Prints one JSON line after each optimizer step. The loop is that of its `lora_finetune_single_device` recipe without what
is not training: no profiler, no logging to disk, no checkpoint.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torchtune import training
from torchtune.data import padded_collate_sft
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.modules.loss import CEWithChunkedOutputLoss
from torchtune.modules.peft import get_adapter_params, set_trainable_params


def main(model_dir: Path, rows_path: str, batch_size: int, accumulation: int) -> None:
    rows = json.load(open(rows_path))
    torch.manual_seed(42)
    model = load(model_dir)
    adapters = get_adapter_params(model)
    set_trainable_params(model, adapters)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4, weight_decay=0.01, fused=True)
    # Its default of 8 chunks is four times slower in bf16 on a CPU.
    loss_fn = CEWithChunkedOutputLoss(num_output_chunks=1)
    model.set_num_output_chunks(loss_fn.num_output_chunks)
    per_step = batch_size * accumulation
    for step, start in enumerate(range(0, len(rows), per_step), 1):
        loss_sum, num_labels = 0.0, 0
        for first in range(start, start + per_step, batch_size):
            batch = padded_collate_sft(rows[first : first + batch_size], padding_idx=2)
            labels = batch.pop("labels")
            count = (labels != -100).sum()
            labels = torch.hstack((labels[..., 1:], torch.full((labels.shape[0], 1), -100)))
            loss = loss_fn(model(**batch), labels) * count
            loss_sum, num_labels = loss_sum + loss.item(), num_labels + count
            loss.backward()
        training.scale_grads(model, 1 / num_labels)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(json.dumps({"step": step, "loss": loss_sum / num_labels.item()}), flush=True)


def load(model_dir: Path) -> torch.nn.Module:
    config = json.loads((model_dir / "config.json").read_text())
    with training.set_default_dtype(torch.bfloat16):
        model = lora_model(config)
    missing = model.load_state_dict(read(model_dir, config), strict=False)
    assert not missing.unexpected_keys and all("lora" in key for key in missing.missing_keys), missing
    return model.train()


def read(model_dir: Path, config: dict) -> dict:
    """The weights by torchtune's names."""
    weights = {}
    for shard in sorted(model_dir.glob("*.safetensors")):
        weights.update(load_file(shard))
    heads, kv_heads, dim = config["num_attention_heads"], config["num_key_value_heads"], config["hidden_size"]
    return hf_to_tune(weights, num_heads=heads, num_kv_heads=kv_heads, dim=dim, head_dim=config["head_dim"])


def shape(config: dict) -> dict:
    return dict(
        vocab_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        embed_dim=config["hidden_size"],
        max_seq_len=512,
        intermediate_dim=config["intermediate_size"],
        norm_eps=config["rms_norm_eps"],
        rope_base=config["rope_theta"],
        scale_factor=1,  # its RoPE scaling divides by this: none
        tie_word_embeddings=config["tie_word_embeddings"],
    )


def lora_model(config: dict) -> torch.nn.Module:
    return lora_llama3_2(["q_proj", "v_proj"], lora_rank=8, lora_alpha=16, **shape(config))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

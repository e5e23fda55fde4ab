"""LoRA with transformers and PEFT, at their best on this machine: everything bf16, SDPA, batches padded to their longest row.

Usage: peft_lora.py MODEL_DIR ROWS.json BATCH ACCUMULATION
Prints one JSON line after each optimizer step.
"""

import json
import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main(model_dir: str, rows_path: str, batch_size: int, accumulation: int) -> None:
    rows = json.load(open(rows_path))
    torch.manual_seed(42)
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16, attn_implementation="sdpa")
    lora = LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    # Adapters in fp32, PEFT's default, cost a conversion of every input.
    model = get_peft_model(base, lora, autocast_adapter_dtype=False).train()
    model.config.use_cache = False
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=3e-4, weight_decay=0.01, fused=True)
    per_step = batch_size * accumulation
    for step, start in enumerate(range(0, len(rows), per_step), 1):
        of_step = rows[start : start + per_step]
        labels_in_step = sum(label != -100 for row in of_step for label in row["labels"][1:])
        loss_sum = 0.0
        for first in range(0, per_step, batch_size):
            batch = collate(of_step[first : first + batch_size])
            loss = model(**batch, num_items_in_batch=torch.tensor(labels_in_step)).loss
            loss.backward()
            loss_sum += loss.item()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(json.dumps({"step": step, "loss": loss_sum}), flush=True)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    longest = max(len(row["tokens"]) for row in rows)
    pad = lambda values, filler: values + [filler] * (longest - len(values))
    return {
        "input_ids": torch.tensor([pad(row["tokens"], 2) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["tokens"]), 0) for row in rows]),
    }


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))

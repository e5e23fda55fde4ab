"""The imported folder equals what transformers itself makes of the GGUF file: weights bit for bit, token ids on 1,000 rows.

Usage: import.py GGUF MODEL_DIR ROWS.jsonl
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

NUM_ROWS = 1000


def main(gguf: Path, model_dir: Path, rows_path: Path) -> None:
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    ours = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
    compare_weights(theirs.state_dict(), ours.state_dict())
    compare_configs(theirs.config.to_dict(), ours.config.to_dict())

    their_tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    our_tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [json.loads(line) for line, _ in zip(rows_path.open(), range(NUM_ROWS))]
    if len(rows) < NUM_ROWS:
        sys.exit(f"{rows_path} has {len(rows)} rows, {NUM_ROWS} are needed")
    compare_tokens(their_tokenizer, our_tokenizer, rows)


def compare_weights(theirs: dict, ours: dict) -> None:
    if theirs.keys() != ours.keys():
        sys.exit(f"other tensors: {sorted(theirs.keys() ^ ours.keys())[:5]}")
    for name, tensor in theirs.items():
        # As integers: equal bits, not merely equal numbers.
        if tensor.shape != ours[name].shape or not torch.equal(tensor.view(torch.int16), ours[name].view(torch.int16)):
            sys.exit(f"`{name}` differs")
    print(f"weights: {len(theirs)} tensors equal bit for bit")


def compare_configs(theirs: dict, ours: dict) -> None:
    # The GGUF's own name, and ids that only a tokenizer has.
    skipped = {"_name_or_path", "_model_name_or_path", "transformers_version", "unk_token_id", "quantization_config", "architectures"}
    differing = {k: (theirs.get(k), ours.get(k)) for k in (theirs.keys() | ours.keys()) - skipped
                 if not close(theirs.get(k), ours.get(k))}
    if differing:
        sys.exit(f"config differs (theirs, ours): {differing}")
    print("config: equal")


def close(a, b) -> bool:
    """The GGUF stores fp32; the folder has the decimal that was meant."""
    return abs(a - b) <= 1e-6 * abs(a) if isinstance(a, float) and isinstance(b, float) else a == b


def compare_tokens(theirs, ours, rows: list[dict]) -> None:
    num_tokens = 0
    for row in rows:
        for text in (row["document"], row["summary"], f"<|im_start|>user\n{row['summary']}<|im_end|>\n"):
            expected, found = theirs(text)["input_ids"], ours(text)["input_ids"]
            if expected != found:
                sys.exit(f"row `{row['id']}`: token ids differ\ntheirs {expected}\nours   {found}")
            if ours.decode(found) != theirs.decode(expected):
                sys.exit(f"row `{row['id']}`: decoding differs")
            num_tokens += len(found)
    messages = [{"role": "user", "content": "Hello"}]
    chats = [t.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for t in (theirs, ours)]
    if chats[0] != chats[1]:
        sys.exit(f"chat templates differ: {chats}")
    print(f"tokens: {num_tokens} ids of {len(rows)} rows equal, chat template equal")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))

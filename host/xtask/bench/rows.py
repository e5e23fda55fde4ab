"""Tokens and labels of the first rows, made once, so that every program trains on the same ones.

Usage: rows.py MODEL_DIR ROWS.jsonl NUM_ROWS OUT.json

SummarizeTemplate: three pieces, each stripped of trailing spaces and encoded on its own, between BOS (where the
tokenizer's files add one) and the summary with EOS, which alone carry loss; cut to MAX_SEQ_LEN with EOS at the end.
"""

import json
import sys
from pathlib import Path

from transformers import AutoTokenizer

MAX_SEQ_LEN = 512


def main(model_dir: str, rows_path: Path, num_rows: int, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    encode = lambda text: tokenizer(text.rstrip(" "), add_special_tokens=False)["input_ids"]
    begin = [tokenizer.bos_token_id] if tokenizer("x")["input_ids"][0] == tokenizer.bos_token_id else []
    rows = []
    for line, _ in zip(rows_path.open(), range(num_rows)):
        row = json.loads(line)
        pieces = ["Summarize this dialogue:\n", row["document"], "\n---\nSummary:\n"]
        prompt = begin + [token for piece in pieces for token in encode(piece)]
        answer = [*encode(row["summary"]), tokenizer.eos_token_id]
        tokens, labels = prompt + answer, [-100] * len(prompt) + answer
        if len(tokens) > MAX_SEQ_LEN:
            tokens = tokens[: MAX_SEQ_LEN - 1] + [tokenizer.eos_token_id]
            labels = labels[: MAX_SEQ_LEN - 1] + [tokenizer.eos_token_id]
        rows.append({"tokens": tokens, "labels": labels})
    if len(rows) < num_rows:
        sys.exit(f"{rows_path} has {len(rows)} rows, {num_rows} are needed")
    out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))

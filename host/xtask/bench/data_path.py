"""torchtune's own way from a file of rows to packs: `instruct_dataset` with its summary template and packing, on one core.

Usage: data_path.py ROWS.jsonl MODEL_DIR
Prints a line for each of two passes: one that reads the file, and one that finds it in the cache of `datasets`.
"""

import sys
import tempfile
import time

from torchtune.data import SummarizeTemplate
from torchtune.datasets import instruct_dataset
from torchtune.modules.transforms.tokenizers import HuggingFaceBaseTokenizer, tokenize_messages_no_special_tokens

MAX_SEQ_LEN = 512


class Tokenizer:
    """What its model tokenizers without special tokens of their own do, over a tokenizer.json."""

    def __init__(self, model_dir: str) -> None:
        self.base = HuggingFaceBaseTokenizer(f"{model_dir}/tokenizer.json", tokenizer_config_json_path=f"{model_dir}/tokenizer_config.json")
        self.template = SummarizeTemplate()
        self.max_seq_len, self.pad_id = MAX_SEQ_LEN, 0

    def encode(self, text: str, add_bos: bool, add_eos: bool, trim_leading_whitespace: bool = False) -> list:
        return self.base.encode(text, add_bos=add_bos, add_eos=add_eos)

    def __call__(self, sample: dict) -> dict:
        messages = self.template(sample.pop("messages"))
        bos = self.base.bos_id if self.base.hf_adds_bos else None
        sample["tokens"], sample["mask"] = tokenize_messages_no_special_tokens(self, messages, bos_id=bos, eos_id=self.base.eos_id)
        return sample


def main(rows_path: str, model_dir: str) -> None:
    tokenizer = Tokenizer(model_dir)
    with tempfile.TemporaryDirectory() as cache_dir:
        for _ in range(2):
            started = time.perf_counter()
            data = instruct_dataset(
                tokenizer,
                source="json",
                data_files=rows_path,
                split="train",
                column_map={"input": "document", "output": "summary"},
                packed=True,
                cache_dir=cache_dir,
            )
            seconds = time.perf_counter() - started
            print(f"packed in {seconds} s: {len(data)} packs")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])

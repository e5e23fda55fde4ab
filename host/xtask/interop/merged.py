"""transformers loads the merged model, PEFT the adapter on its base, and both give `host`'s logits.

They compute in fp64 here: in fp32 transformers is itself up to 1.2e-4 away from that on a tuned SmolLM2, which would leave
nothing of the tolerance to `host`. Weights, angles and adapters are the same numbers in both.

Usage: merged.py tokens  MODEL_DIR ROWS.jsonl OUT.json
       merged.py compare MODEL_DIR CHECKPOINT_DIR TOKENS.json BASE MERGED ADAPTED

The last three are `host-rank --logits` files: tensors `0`, `1`, … of shape [tokens, vocabulary], one for each list of ids in
TOKENS.json, of the imported model, the merged model, and the imported model with the adapter.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_ROWS = 4


def write_tokens(model_dir: str, rows: str, out: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    documents = [json.loads(line)["document"] for line, _ in zip(open(rows), range(NUM_ROWS))]
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(out).write_text(json.dumps([tokenizer(document)["input_ids"][:256] for document in documents]))


@torch.no_grad()
def compare(model_dir: str, checkpoint_dir: str, tokens_path: str, *of_host: str) -> None:
    rows = json.loads(Path(tokens_path).read_text())
    load = lambda folder: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    adapt = lambda: PeftModel.from_pretrained(load(model_dir), f"{checkpoint_dir}/adapter").eval()
    logits = lambda model: [model(torch.tensor([tokens])).logits[0] for tokens in rows]

    base = logits(load(model_dir).double())
    merged = logits(load(checkpoint_dir).double())
    adapted = logits(adapt().double())
    host_base, host_merged, host_adapted = ([load_file(path)[str(i)] for i in range(len(rows))] for path in of_host)

    agree("imported model: transformers, host", base, host_base)
    agree("merged model: transformers, host", merged, host_merged)
    agree("adapter on its base: PEFT, host", adapted, host_adapted)
    own = max(distance(a, b) for a, b in zip(merged, logits(load(checkpoint_dir))))
    print(f"merged model: transformers in fp32 differs by {own:.1e} from itself in fp64")
    merged_alike(adapt(), load(checkpoint_dir))
    moved = max((a - b).abs().max().item() for a, b in zip(base, merged))
    if moved < 1e-2:
        sys.exit(f"training moved no logit by more than {moved:.1e}: this compares a model with itself")


def merged_alike(adapted: PeftModel, merged: torch.nn.Module) -> None:
    """PEFT's own merge, rounded to bf16 as the checkpoint is, gives the checkpoint's weights.

    W + s·B·A is summed in fp32 on both sides, each within a few 2^-24 of the other, and bf16's steps are 2^-8 apart: about one
    weight in 2^14 may fall on the other side of a step. Allowed: one in 1,000, by one step.
    """
    expected, found = adapted.merge_and_unload().state_dict(), merged.state_dict()
    if expected.keys() != found.keys():
        sys.exit(f"merged weights: other names, {expected.keys() ^ found.keys()}")
    other = total = 0
    for name, weight in expected.items():
        ours, theirs = weight.to(torch.bfloat16).float(), found[name].float()
        if ((ours - theirs).abs() > 2**-7 * ours.abs()).any():
            sys.exit(f"merged weights: `{name}` differs by more than one bf16 step")
        other, total = other + (ours != theirs).sum().item(), total + ours.numel()
    print(f"merged weights: PEFT's merge, host's: {other} of {total} are one bf16 step apart")
    if other * 1000 > total:
        sys.exit("merged weights: they do not agree")


TOLERANCE = 1e-4  # The numbers contract's.


def distance(expected: torch.Tensor, found: torch.Tensor) -> float:
    return ((expected - found).abs() / expected.abs().clamp(min=1)).max().item()


def agree(what: str, expected: list[torch.Tensor], found: list[torch.Tensor]) -> None:
    """Within TOLERANCE · max(1, |logit|), and the same next token unless the top two are closer than that."""
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.shape != b.shape:
            sys.exit(f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}")
        worst = max(worst, distance(a, b))
        top = a.topk(2).values
        clear = (top[:, 0] - top[:, 1]) > 2 * TOLERANCE * top[:, 0].abs().clamp(min=1)
        if not torch.equal(a.argmax(-1)[clear], b.argmax(-1)[clear]):
            sys.exit(f"{what}: another next token")
    print(f"{what}: logits differ by {worst:.1e} relative, {TOLERANCE:.0e} allowed")
    # Not `worst > tolerance`, which a NaN passes.
    if not worst <= TOLERANCE:
        sys.exit(f"{what}: they do not agree")


if __name__ == "__main__":
    {"tokens": write_tokens, "compare": compare}[sys.argv[1]](*sys.argv[2:])

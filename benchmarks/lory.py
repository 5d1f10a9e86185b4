"""Lory against a dense model of its active size, on documents in random order and beside their like.

    moekit prepare FILES... --out DATA
    python benchmarks/lory.py DATA --work FOLDER --out benchmarks/results/lory.md

Each document of DATA is cut into passages of about --passage tokens, which are the documents of the trial: the paper's
sequences hold several documents each, and those of a small model are short. As many tokens of each domain are taken.
Every run of a seed has the same settings; those of one order have the same batches. A finished run is not made again.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from measure import commit, machine, table

from moekit.compare.statistics import difference
from moekit.config import RunConfig, validate
from moekit.data import TokenDataset, open_dataset, prepare, validation_windows
from moekit.formats.checkpoint import load
from moekit.formats.tokenizer import load_tokenizer
from moekit.nn.model import Model
from moekit.train import metrics, train
from moekit.train.state import newest

SHAPE = {"hidden_size": 96, "num_hidden_layers": 4, "initializer_range": 0.02, "tie_word_embeddings": True}
HEADS = {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 24}
ORDERS = ("shuffled", "similar", "source")


def passages(dataset: TokenDataset, decode: Any, size: int, most: int) -> Iterator[dict[str, str]]:
    """Yields records of about `size` tokens each, `most` tokens of each domain, in order."""
    for domain in dataset.domains:
        taken = 0
        for tokens, _ in dataset.documents(domain):
            text = decode(tokens.tolist())
            pieces = max(1, round(len(tokens) / size))
            width = math.ceil(len(text) / pieces)
            for first in range(0, len(text), width):
                if part := text[first : first + width].strip():
                    yield {"text": part, "domain": domain}
            taken += len(tokens)
            if taken >= most:
                break


def passage_data(source: Path, out: Path, size: int, most: int) -> Path:
    """Returns the prepared data of passages, with the order in which like stand beside like."""
    decode = load_tokenizer(source).decode
    for split in ("train", "valid"):
        file = out.parent / f"passages.{split}.jsonl"
        if not file.is_file():
            rows = passages(open_dataset(source, split), decode, size, most)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            out.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
    train_file, valid_file = (out.parent / f"passages.{split}.jsonl" for split in ("train", "valid"))
    prepare([train_file], out, valid_paths=[valid_file], tokenizer=source, similar=True)
    return out


def settings(args: argparse.Namespace, data: Path, kind: str, order: str, seed: int) -> RunConfig:
    steps = round(args.tokens / (args.length * args.batch))
    ffn: dict[str, Any] = {"kind": "dense", "intermediate_size": 256}
    if kind == "lory":
        ffn |= {"kind": "lory", "n_routed_experts": args.experts, "segment_size": args.segment}
        ffn["warmup_steps"] = round(0.05 * steps)
    tree = {
        "model": {**SHAPE, "vocab_size": load_tokenizer(data).vocab_size, "attention": HEADS, "ffn": ffn},
        "data": {"path": str(data), "sequence_length": args.length, "batch_size": args.batch, "order": order},
        "optimizer": {"lr": args.lr},
        "schedule": {"kind": "cosine", "warmup_steps": round(0.05 * steps)},
        "steps": steps,
        "seed": seed,
        "log_every": max(1, steps // 20),
        "eval_tokens": 32768,
    }
    return validate(RunConfig, tree)


def specialised(model: Model, valid: TokenDataset, length: int) -> dict[str, float]:
    """Returns, over all layers, what a segment's weights say of its domain (bits), and how far from equal they are.

    Segments count that the router decides, all but the first of each window. "active" is the paper's: a weight above
    2/E; "largest" the mean of the heaviest weight.
    """
    mass, active, largest = [], [], []
    experts = model.config.ffn.n_routed_experts  # type: ignore[union-attr]
    model.eval()
    for domain in valid.domains:
        sums = torch.zeros(model.config.num_hidden_layers, experts)
        for batch in validation_windows(valid, domain, length, 32768, 16):
            with torch.no_grad():
                routings = model(torch.from_numpy(batch.input_ids), return_routing=True, return_logits=False).routing
            for layer, routing in enumerate(routings):
                decided = routing.scores.view(len(batch.input_ids), -1, experts)[:, 1:].flatten(0, 1)
                sums[layer] += decided.sum(0)
                active.append((decided > 2 / experts).float().sum(1).mean())
                largest.append(decided.amax(1).mean())
        mass.append(sums / sums.sum(1, keepdim=True))
    shares = torch.stack(mass)  # domains, layers, experts
    entropy = torch.special.entr(shares).sum(-1) / math.log(2)
    overall = torch.special.entr(shares.mean(0)).sum(-1) / math.log(2)
    return {
        "information": float((overall - entropy.mean(0)).mean()),
        "entropy": float(entropy.mean()),
        "overall": float(overall.mean()),
        "active": float(torch.stack(active).mean()),
        "largest": float(torch.stack(largest).mean()),
    }


def mean_sd(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ({statistics.stdev(values):.3f})" if len(values) > 1 else "")


def interval(differences: list[float]) -> str:
    """Returns Student's 95% interval of the mean; nothing for one seed."""
    found = difference(dict(enumerate(differences)), dict.fromkeys(range(len(differences)), 0.0))
    return "" if found is None or found.low is None else f"{found.low:+.3f} to {found.high:+.3f}"


def write(args: argparse.Namespace, data: Path) -> None:
    """Writes losses, paired differences and what routing says of domains, of all runs."""
    valid, seeds = open_dataset(data, "valid"), range(args.seeds)
    similar = valid.manifest.similar
    assert similar is not None
    losses: dict[tuple[str, str], list[dict[str, float]]] = {}
    routing: dict[str, list[dict[str, float]]] = {}
    for order in args.orders:
        for kind in ("dense", "lory"):
            for seed in seeds:
                folder = args.work / f"{kind}-{order}-{seed}"
                last = [record for record in metrics.read(folder) if record["kind"] == "eval"][-1]
                by_domain = {domain: score["loss"] for domain, score in last["domains"].items()}
                losses.setdefault((kind, order), []).append({"mean": last["loss"]} | by_domain)
                if kind == "lory":
                    checkpoint = newest(folder)
                    assert checkpoint is not None
                    routing.setdefault(order, []).append(specialised(load(checkpoint), valid, args.length))
    columns = ("mean", *valid.domains)

    def gains(order: str, column: str) -> list[float]:
        pairs = zip(losses["lory", order], losses["dense", order], strict=True)
        return [ours[column] - dense[column] for ours, dense in pairs]

    rows = [
        [kind, order, *(mean_sd([one[column] for one in found]) for column in columns)]
        for (kind, order), found in losses.items()
    ]
    less = [[order, *(mean_sd(gains(order, column)) for column in columns)] for order in args.orders]
    singly = [
        [order, *(f"{gain:+.3f}" for gain in gains(order, "mean")), interval(gains(order, "mean"))]
        for order in args.orders
    ]
    told = [
        [order, *(mean_sd([one[key] for one in found]) for key in ("information", "overall", "active", "largest"))]
        for order, found in routing.items()
    ]
    command = f"python benchmarks/lory.py DATA --work FOLDER --seeds {args.seeds} --tokens {args.tokens:g}"
    counted = valid.manifest.splits["train"]
    parts = [
        "# Lory: similar documents beside each other, or any",
        f"`{command}`, commit {commit()}, {machine(torch.device('cpu'))}.",
        f"{counted.documents:,} passages of {counted.tokens / counted.documents:.0f} tokens. Mean cosine of "
        f"neighbours: {similar.similarity} in similar order, {similar.similarity_shuffled} shuffled. "
        f"Standard deviations over {args.seeds} seed{'s' * (args.seeds > 1)} in brackets.",
        "## Loss, nats per token, unseen text",
        table(("model", "order", *columns), rows),
        "## Lory less dense, the same seed and batches",
        table(("order", *columns), less),
        table(("order", *(f"seed {seed}" for seed in seeds), "95% interval of the mean"), singly),
        "## What routing says",
        "Information: of a segment's weights about its domain, bits, mean of layers; overall: entropy of the weights "
        f"over all text, of at most {math.log2(args.experts):g}; active: experts with a weight above 2/E; largest: the "
        "heaviest weight.",
        table(("order", "information", "overall", "active", "largest"), told),
    ]
    text = "\n\n".join(parts) + "\n"
    if args.out is None:
        sys.stdout.write(text)
    else:
        args.out.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="prepared data")
    parser.add_argument("--work", type=Path, required=True, help="folder of passages and runs")
    parser.add_argument("--out", type=Path, help="page to write; else standard output")
    parser.add_argument("--tokens", type=float, default=3e6, help="of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--segment", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--passage", type=int, default=128, help="tokens of a passage, about")
    parser.add_argument("--domain-tokens", type=int, default=750_000, help="of each domain, about")
    args = parser.parse_args(argv)
    data = passage_data(args.data, args.work / "data", args.passage, args.domain_tokens)
    runs = [(seed, order, kind) for seed in range(args.seeds) for order in args.orders for kind in ("lory", "dense")]
    for seed, order, kind in runs:
        folder = args.work / f"{kind}-{order}-{seed}"
        if not (folder / "receipt.json").is_file():
            config = settings(args, data, kind, order, seed)
            train(config, folder, resume=(folder / "config.yaml").is_file())
    write(args, data)


if __name__ == "__main__":
    main()

"""Speed of reading a prompt beside transformers and llama.cpp with the same weights.

    python benchmarks/prefill.py --out benchmarks/results/prefill.md
    python benchmarks/prefill.py --dtype bf16 int8 --prompts 1x512 8x256 --impl eager grouped_mm

One forward pass, new random tokens each round, the last token's logits; with --cache what later tokens need is kept.
llama.cpp, which is given single prompts only, as llama-bench has it. The contestants of a model and dtype take turns,
round by round; speed-ups are over the fastest of transformers and over llama.cpp.
"""

import argparse
from collections.abc import Sequence

import binding
import llama
import measure
import peers
import torch
from torch import nn

from moekit.nn.cache import KVCache
from moekit.nn.model import Model


def prompt(text: str) -> tuple[int, int]:
    batch, length = map(int, text.split("x"))
    return batch, length


def reading(args: argparse.Namespace, model: nn.Module, dtype: str, size: tuple[int, int]) -> measure.Contestant:
    state: dict[str, torch.Tensor] = {}

    def room() -> dict[str, object]:
        if not isinstance(model, Model):
            return {"use_cache": args.cache}
        kept = torch.float32 if dtype == "fp32" else torch.bfloat16
        return {"cache": KVCache(model.config, *size, args.device, kept) if args.cache else None}

    @torch.no_grad()
    def forward() -> None:
        with peers.precision(args, dtype):
            model(state["ids"], logits_to_keep=1, **room())

    model.eval()
    return measure.Contestant(
        {"forward": forward}, lambda number: state.update(ids=peers.random_ids(args, args.shape, *size, number))
    )


def compare(args: argparse.Namespace, kind: str, dtype: str) -> tuple[list[list[str]], list[str]]:
    """Returns the rows of a model and dtype, and who is missing."""
    found, rows = peers.lineup(args, args.shape, kind, dtype, max(length for _, length in args.prompts)), []
    with llama.bench(args, kind, dtype, found.missing) as bench:
        for batch, length in args.prompts:
            size = batch, length
            entrants = {name: reading(args, model, dtype, size) for name, model in (found.theirs | found.ours).items()}
            others = bench("-p", length, "-n", 0) if batch == 1 else {}
            seconds = measure.in_turn(others | entrants, args.repeats, args.device)
            best, llamas = (measure.fastest(seconds, names) for names in (found.theirs, others))
            for name, stages in seconds.items():
                took = measure.median(stages)
                rows.append([
                    peers.KINDS[kind], dtype, f"{batch} x {length}", name, f"{batch * length / took:,.0f}",
                    f"{took * 1e3:.1f}", measure.speedup(stages, best), measure.speedup(stages, llamas),
                    found.difference.get(name, ""),
                ])  # fmt: skip
    return rows, found.missing


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=7)
    peers.options(parser, more=peers.CODES)
    llama.options(parser)
    parser.add_argument("--prompts", nargs="+", type=prompt, default=[(1, 512), (8, 256)], metavar="BATCHxLENGTH")
    parser.add_argument("--cache", action="store_true", help="keep what later tokens need of the prompts")
    args = measure.parse(parser, argv)
    header = "shape of | dtype | prompt | who | tokens/s | ms | x transformers | x llama.cpp | logits off by"
    what = f"Prompts {'into' if args.cache else 'without'} a cache, random tokens. {args.shape}."
    peers.report(args, "Prefill", what, header, compare, llama.versions())


if __name__ == "__main__":
    binding.bound(main)

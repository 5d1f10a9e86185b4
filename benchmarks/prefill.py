"""Speed of reading a prompt beside transformers' model of the same shape and weights, and llama.cpp's own bench.

    python benchmarks/prefill.py --out benchmarks/results/prefill.md
    python benchmarks/prefill.py --dtype bf16 --prompts 1x512 8x256 --impl eager grouped_mm --gguf model-f32.gguf

One forward pass without a cache, new random tokens each round, the last token's logits. The contestants of a model and
dtype take turns in one process; the speed-up is over the fastest of transformers, round by round.
"""

import argparse
import inspect
from collections.abc import Sequence

import binding
import measure
import peers
import torch
from torch import nn

from moekit.nn.model import Model

LAST = {"logits_to_keep": 1}
OURS = LAST if "logits_to_keep" in inspect.signature(Model.forward).parameters else {}


def prompt(text: str) -> tuple[int, int]:
    batch, length = map(int, text.split("x"))
    return batch, length


def reading(
    args: argparse.Namespace, model: nn.Module, options: dict[str, object], dtype: str, size: tuple[int, int]
) -> measure.Contestant:
    state: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def forward() -> None:
        with peers.precision(args, dtype):
            model(state["ids"], **options)

    model.eval()
    return measure.Contestant(
        {"forward": forward}, lambda number: state.update(ids=peers.random_ids(args, args.shape, *size, number))
    )


def compare(args: argparse.Namespace, kind: str, dtype: str) -> tuple[list[list[str]], list[str]]:
    """Returns the rows of a model and dtype, and who is missing."""
    found = peers.lineup(args, args.shape, kind, dtype, max(length for _, length in args.prompts))
    rows = []
    for size in args.prompts:
        entrants = {
            name: reading(args, model, {"use_cache": False, **LAST}, dtype, size)
            for name, model in found.theirs.items()
        }
        entrants |= {name: reading(args, model, OURS, dtype, size) for name, model in found.ours.items()}
        seconds = measure.in_turn(entrants, args.repeats, args.device)
        best = measure.fastest(seconds, found.theirs)
        for name, stages in seconds.items():
            took = measure.median(stages)
            rows.append([
                peers.KINDS[kind], dtype, "{} x {}".format(*size), name, f"{size[0] * size[1] / took:,.0f}",
                f"{took * 1e3:.1f}", measure.speedup(stages, best), found.difference[name],
            ])  # fmt: skip
            measure.progress(" ".join(rows[-1]))
    return rows, found.missing


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=7)
    peers.options(parser)
    peers.llama_options(parser)
    parser.add_argument("--prompts", nargs="+", type=prompt, default=[(1, 512), (8, 256)], metavar="BATCHxLENGTH")
    args = measure.parse(parser, argv)
    guard, rows, missing = measure.Guard(args.device), [], []
    if not OURS:
        missing.append("moekit with the last token's logits only: the model forms those of every token and is timed so")
    for kind in args.models:
        for dtype in args.dtype:
            more, absent = compare(args, kind, dtype)
            rows, missing = rows + more, missing + absent
    header = ["shape of", "dtype", "prompt", "who", "tokens/s", "ms", "speed-up", "logits off by"]
    lengths = ",".join(str(length) for _, length in args.prompts)
    llama, not_run = peers.llama_bench(args, ["-p", lengths, "-n", "0"])
    what = f"Prompts without a cache, random tokens. {args.shape}."
    tables = [measure.table(header, rows), *llama]
    measure.report(args, "Prefill", what, guard, tables, missing + not_run, peers.versions())


if __name__ == "__main__":
    binding.bound(main)

"""Speed of a training step beside transformers' model of the same shape and weights: tokens per second, by stage.

    python benchmarks/train_step.py --out benchmarks/results/train_step.md
    python benchmarks/train_step.py --shape reference,experts=128 --dtype amp --impl grouped_mm eager --backend torch

Forward, backward and fused AdamW on random tokens, new ones each step. The contestants of a model and dtype take turns
in one process, step by step; the speed-up is over the fastest of transformers, round by round.
"""

import argparse
import statistics
from collections.abc import Sequence

import binding
import measure
import peers


def compare(args: argparse.Namespace, kind: str, dtype: str) -> tuple[list[list[str]], list[str]]:
    """Returns the rows of a model and dtype, and who is missing."""
    found = peers.lineup(args, args.shape, kind, dtype, args.length, copies=4)
    entrants = {
        name: peers.training_step(args, model, dtype, args.shape, args.batch, args.length)
        for name, model in (found.theirs | found.ours).items()
    }
    seconds, rows = measure.in_turn(entrants, args.repeats, args.device), []
    best = measure.fastest(seconds, found.theirs)
    for name, stages in seconds.items():
        took = measure.median(stages)
        split = " / ".join(f"{statistics.median(stage):.3f}" for stage in stages.values())
        rows.append([
            peers.KINDS[kind], dtype, name, f"{args.batch * args.length / took:,.0f}", f"{took:.3f}", split,
            measure.speedup(stages, best), found.difference[name],
        ])  # fmt: skip
    return rows, found.missing


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=5)
    peers.options(parser)
    parser.add_argument("--batch", type=int, default=8, help="sequences (8)")
    parser.add_argument("--length", type=int, default=256, help="tokens of each (256)")
    args = measure.parse(parser, argv)
    header = "shape of | dtype | who | tokens/s | step s | forward / backward / AdamW s | speed-up | logits off by"
    what = f"Batch {args.batch} x {args.length}, AdamW, random tokens. {args.shape}."
    peers.report(args, "Training step", what, header, compare)


if __name__ == "__main__":
    binding.bound(main)

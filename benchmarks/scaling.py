"""How a training step grows with experts, granularity, sequence and batch, beside transformers' model.

    python benchmarks/scaling.py --sweep experts --out benchmarks/results/scaling_experts.md
    python benchmarks/scaling.py --sweep granularity --values 1 16 --dtype fp32 --models deepseek_v2 --impl none

experts: more of them, as many chosen. granularity m: each expert 1/m as wide, m times as many, m times as many chosen
(at 4 it is the reference shape), so that parameters and FLOPs stay. sequence: longer ones, --budget tokens a step.
batch: more of 256 tokens. All points of a sweep are passed through `--repeats` times, in turn; at each point the
contestants take turns for `--steps` steps. Growth is the time per token over that of the first point.
"""

import argparse
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import binding
import measure
import peers

from moekit.errors import ConfigError

SWEEPS = {
    "experts": (16, 32, 64, 128, 256),
    "granularity": (1, 2, 4, 8, 16),
    "sequence": (128, 256, 512, 1024, 2048),
    "batch": (1, 2, 4, 8, 16),
}


class Point(NamedTuple):
    shape: peers.Shape
    batch: int
    length: int


def granular(shape: peers.Shape, m: int) -> peers.Shape:
    """Returns the shape cut m times finer than 16 experts; a quarter of the chosen are shared, as far as that goes."""
    coarse = shape.experts * shape.width // 16
    active = (shape.chosen + shape.shared) * shape.width
    if coarse % m or active % coarse:
        raise ConfigError(
            f"granularity is {m} but must divide {coarse}, and {coarse} must divide {active} active units"
        )
    chosen = active // coarse * m
    shared = max(1, chosen // 4)
    return shape._replace(experts=16 * m, width=coarse // m, chosen=chosen - shared, shared=shared)


def point(args: argparse.Namespace, value: int) -> Point:
    """Returns the shape and the tokens of a step at a value of the sweep."""
    batch = max(1, args.budget // 256)
    if args.sweep == "experts":
        return Point(args.shape._replace(experts=value), batch, 256)
    if args.sweep == "granularity":
        return Point(granular(args.shape, value), batch, 256)
    if args.sweep == "sequence":
        return Point(args.shape, max(1, args.budget // value), value)
    return Point(args.shape, value, 256)


def visit(
    args: argparse.Namespace, here: Point, kind: str, dtype: str, seconds: dict[str, measure.Seconds]
) -> list[str]:
    """Adds the figures of one pass at a point to `seconds` and returns who was missing."""
    found = peers.lineup(args, here.shape, kind, dtype, here.length, copies=4)
    entrants = {
        name: peers.training_step(args, model, dtype, *here) for name, model in (found.theirs | found.ours).items()
    }
    for name, stages in measure.in_turn(entrants, args.steps, args.device).items():
        kept = seconds.setdefault(name, {stage: [] for stage in stages})
        for stage, figures in stages.items():
            kept[stage] += figures
    return found.missing


def compare(args: argparse.Namespace, kind: str, dtype: str) -> tuple[list[list[str]], list[str]]:
    """Returns the rows of a model and dtype, and who is missing where."""
    points = {value: point(args, value) for value in args.values or SWEEPS[args.sweep]}
    found: dict[int, dict[str, measure.Seconds]] = {value: {} for value in points}
    missing, rows = [], []
    for _ in range(args.repeats):
        for value, here in points.items():
            missing += visit(args, here, kind, dtype, found[value])
    first: dict[str, float] = {}
    for value, here in points.items():
        best = measure.fastest(found[value], [name for name in found[value] if name.startswith("transformers")])
        for name, stages in found[value].items():
            each = measure.median(stages) / (here.batch * here.length)
            split = " / ".join(f"{statistics.median(stage):.3f}" for stage in stages.values())
            rows.append([
                str(value), peers.KINDS[kind], dtype, name, f"{1 / each:,.0f}", split,
                f"{each / first.setdefault(name, each):.2f}", measure.speedup(stages, best),
            ])  # fmt: skip
    return rows, missing


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=2)
    peers.options(parser, dtypes=["amp"])
    parser.set_defaults(models=["qwen2_moe"])
    parser.add_argument("--sweep", choices=SWEEPS, required=True)
    parser.add_argument("--values", type=int, nargs="+", help="instead of the sweep's own")
    parser.add_argument("--budget", type=int, default=2048, help="tokens of a step, the batch sweep aside (2048)")
    parser.add_argument("--steps", type=int, default=2, help="steps that count at a point, after one more (2)")
    args = measure.parse(parser, argv)
    header = f"{args.sweep} | shape of | dtype | who | tokens/s | forward / backward / AdamW s | growth | speed-up"
    what = f"Training steps, AdamW, {args.steps} of them a round, of {args.budget} tokens, the batch sweep aside."
    peers.report(args, f"Scaling: {args.sweep}", f"{what} {args.shape}.", header, compare)


if __name__ == "__main__":
    binding.bound(main)

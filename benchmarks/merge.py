"""Merging experts into one (MEO) against dispatching to them, and where merging starts to win.

    python benchmarks/merge.py --out benchmarks/results/merge.md --picture benchmarks/results/merge.png
    python benchmarks/merge.py --sweep chosen --dtype fp32

One feed-forward layer of BERT-base, 16 experts of each linear map, GELU. Vanilla is the paper's MoE: each token of each
map through m experts, by our dispatching. MEO merges m experts of each map once for a sequence. Dense is one expert's
network. Gates, tokens and weights are new on every call; before a call with backward the weights are written to, as an
optimiser would.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import binding
import calls
import measure
from torch import nn

from moekit import pictures
from moekit.config import MEOConfig
from moekit.nn.ffn import MLP
from moekit.nn.variants.meo import MEO

SWEEPS = ("chosen", "length", "batch")
DTYPES = ("fp32", "bf16")


class Point(NamedTuple):
    chosen: int
    length: int
    batch: int


def points(sweep: str, args: argparse.Namespace) -> list[Point]:
    """Returns the shapes of a sweep."""
    values = getattr(args, sweep)
    return [Point(args.at.chosen, args.at.length, args.at.batch)._replace(**{sweep: value}) for value in values]


def gates(layer: nn.Module) -> list[nn.Parameter]:
    assert isinstance(layer, MEO)
    return [linear.gate.weight for linear in (layer.up_proj, layer.down_proj)]


def lineup(args: argparse.Namespace, point: Point) -> dict[str, nn.Module]:
    """Returns the layers that take turns."""
    settings = {"intermediate_size": args.width, "n_routed_experts": args.experts, "num_experts_per_tok": point.chosen}
    made: dict[str, nn.Module] = {
        "dense": MLP(args.dim, args.width),
        "vanilla": MEO(MEOConfig(mode="dispatch", level="token", **settings), args.dim, 0),
        "MEO": MEO(MEOConfig(mode="merge", level="sequence", **settings), args.dim, 0),
    }
    for layer in made.values():
        layer.to(args.device)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
    return made


def one(args: argparse.Namespace, point: Point, dtype: str, backward: bool) -> dict[str, measure.Seconds]:
    """Returns the seconds of everybody at one shape."""
    shape = point.batch, point.length
    entrants = {
        name: calls.entrant(args, layer, shape, dtype, backward, gates) for name, layer in lineup(args, point).items()
    }
    seconds = measure.in_turn(entrants, args.repeats, args.device)
    ratio = measure.median(seconds["MEO"]) / measure.median(seconds["vanilla"])
    measure.progress(f"{dtype} {point} {'with backward' if backward else 'forward'}: {ratio:.2f} of vanilla")
    return seconds


def flops(args: argparse.Namespace, point: Point) -> tuple[float, float]:
    """Returns the forward FLOPs of vanilla MoE and of MEO, in billions, by `MEOConfig`'s rule."""
    settings = {"intermediate_size": args.width, "n_routed_experts": args.experts, "num_experts_per_tok": point.chosen}
    counted = (
        MEOConfig(mode=mode, level=level, **settings).forward_flops(args.dim, point.length)
        for mode, level in (("dispatch", "token"), ("merge", "sequence"))
    )
    vanilla, merged = (point.batch * count / 1e9 for count in counted)
    return vanilla, merged


def sweep(args: argparse.Namespace, name: str, curves: dict[str, dict[str, list[float]]]) -> str:
    """Returns the table of one sweep, and adds its ratios to the curves."""
    rows = []
    for dtype in args.dtype:
        for backward in (False, True):
            for point in points(name, args):
                seconds = one(args, point, dtype, backward)
                ms = {who: measure.median(stages) * 1e3 for who, stages in seconds.items()}
                gains = [
                    b / a for a, b in zip(*(measure.totals(seconds[who]) for who in ("MEO", "vanilla")), strict=True)
                ]
                ratio = 1 / sorted(gains)[len(gains) // 2]
                stage = "with backward" if backward else "forward"
                curves.setdefault(name, {}).setdefault(f"{dtype}, {stage}", []).append(ratio)
                vanilla, merged = flops(args, point)
                figures = [f"{ms[who]:.1f}" for who in ("dense", "vanilla", "MEO")]
                shape = [str(point.chosen), str(point.length), str(point.batch)]
                rows.append([*shape, dtype, stage, *figures, f"{ratio:.2f}", f"{merged / vanilla:.2f}"])
    header = "m | tokens | sequences | dtype | pass | dense ms | vanilla ms | MEO ms | MEO / vanilla | FLOPs"
    return f"## Over {WORDS[name]}\n\n" + measure.table(header.split(" | "), rows)


WORDS = {
    "chosen": "the experts chosen, m",
    "length": "the tokens of a sequence",
    "batch": "the sequences of a batch",
}


def crossing(values: Sequence[int], ratios: Sequence[float]) -> str:
    """Returns from which value on merging is faster, as words."""
    wins = [ratio < 1 for ratio in ratios]
    first = next((place for place in range(len(wins)) if all(wins[place:])), None)
    if first is None:
        return f"does not win at {values[-1]}"
    return f"wins from {values[first]} on"


def verdicts(args: argparse.Namespace, curves: dict[str, dict[str, list[float]]]) -> str:
    """Returns where merging starts to win, a line a curve."""
    lines = [
        f"- over {WORDS[name]}, {what}: {crossing(getattr(args, name), ratios)}"
        for name, of in curves.items()
        for what, ratios in of.items()
    ]
    return "## Where merging starts to win\n\n" + "\n".join(lines)


def draw(args: argparse.Namespace, curves: dict[str, list[float]], name: str) -> None:
    """Writes the picture of one sweep."""
    axes = pictures.plot(x=WORDS[name], y="MEO's time / vanilla MoE's")
    values = getattr(args, name)
    axes.set_xscale("log", base=2)
    axes.set_xticks(values, [str(value) for value in values])
    axes.axhline(1, color="#888888", linewidth=1, linestyle=":")
    for what, ratios in curves.items():
        axes.plot(values, ratios, marker="o", markersize=3, label=what)
    axes.set_ylim(bottom=0)
    axes.legend(framealpha=1, edgecolor="none")
    axes.get_figure().savefig(args.picture, dpi=160)


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=7)
    parser.add_argument("--dim", type=int, default=768, help="width of the model (768)")
    parser.add_argument("--width", type=int, default=3072, help="width of an expert (3072)")
    parser.add_argument("--experts", type=int, default=16, help="of each linear map (16)")
    parser.add_argument("--at", type=int, nargs=3, default=(4, 128, 8), metavar=("M", "TOKENS", "SEQUENCES"))
    parser.add_argument("--sweep", nargs="+", choices=SWEEPS, default=list(SWEEPS))
    parser.add_argument("--chosen", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--length", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--picture", type=Path, metavar="FILE.png", help="a picture of the sweep over m")
    args = measure.parse(parser, argv)
    args.at = Point(*args.at)
    guard = measure.Guard(args.device)
    curves: dict[str, dict[str, list[float]]] = {}
    tables = [sweep(args, name, curves) for name in args.sweep]
    what = (
        f"One layer of {args.dim} and {args.width}, {args.experts} experts of each linear map; where a sweep does not "
        f"say otherwise, m = {args.at.chosen}, {args.at.batch} sequences of {args.at.length} tokens. bf16 is autocast "
        "over float32 weights. The last column is the counted ratio of forward FLOPs."
    )
    parts = [verdicts(args, curves), *tables]
    if args.picture and "chosen" in curves:
        draw(args, curves["chosen"], "chosen")
        parts.insert(1, f"![MEO's time over vanilla MoE's, over m]({args.picture.name})")
    measure.report(args, "Merging against dispatching", what, guard, parts, [])


if __name__ == "__main__":
    binding.bound(main)

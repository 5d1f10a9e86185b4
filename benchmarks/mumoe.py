"""A muMoE layer against a dense one of as many parameters, forward and with backward.

    python benchmarks/mumoe.py --threads 1 --out benchmarks/results/mumoe.md
    python benchmarks/mumoe.py --dtype fp32 --layers cp-64 tr-64

One feed-forward layer of GPT-2's width with GELU. A layer is named by factorisation and experts, and by both levels
where there are two; its rank gives it the dense layer's parameters. Tokens and gates are new on every call, and before
it the weights are written to, as an optimiser would.
"""

import argparse
from collections.abc import Sequence

import binding
import calls
import measure
from torch import nn

from moekit.config import MuMoEConfig
from moekit.nn.ffn import MLP
from moekit.nn.variants.mumoe import MuMoE


def gates(layer: nn.Module) -> list[nn.Parameter]:
    assert isinstance(layer, MuMoE)
    return list(layer.router)


def made(config: MuMoEConfig, dim: int) -> MuMoE:
    layer = MuMoE(config, dim)
    layer.reset_parameters()
    return layer


def settings(name: str, width: int) -> MuMoEConfig:
    """Returns the settings of a layer by its name: cp-64, or tr-16x16 with two levels."""
    factorization, _, experts = name.partition("-")
    first, _, second = experts.partition("x")
    return MuMoEConfig.model_validate({
        "intermediate_size": width,
        "factorization": factorization,
        "n_routed_experts": int(first) * int(second or 1),
        "second_level_experts": int(second) if second else None,
    })  # fmt: skip


def rows(args: argparse.Namespace, dtype: str) -> list[list[str]]:
    """Returns a line a layer: what it counts, and its time forward and with backward beside the dense one's."""
    layers: dict[str, nn.Module] = {"dense": MLP(args.dim, args.width)}
    layers |= {name: made(settings(name, args.width), args.dim) for name in args.layers}
    cells: dict[str, list[str]] = {}
    dense_flops = 4 * args.dim * args.width * args.tokens
    for name, layer in layers.items():
        config = None if name == "dense" else settings(name, args.width)
        flops = dense_flops if config is None else config.forward_flops(args.dim, args.tokens)
        parameters = f"{sum(p.numel() for p in layer.parameters()):,}"
        rank = "" if config is None else str(config.matched_rank(args.dim))
        cells[name] = [name, dtype, rank, parameters, f"{flops / 1e9:.2f}"]
    for backward in (False, True):
        entrants = {
            name: calls.entrant(args, layer, (1, args.tokens), dtype, backward, gates) for name, layer in layers.items()
        }
        seconds = measure.in_turn(entrants, args.repeats, args.device)
        for name, stages in seconds.items():
            cells[name] += [f"{measure.median(stages) * 1e3:.1f}", measure.speedup(seconds["dense"], stages)]
        measure.progress(f"{dtype}, {'with backward' if backward else 'forward'}: done")
    return list(cells.values())


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=7)
    parser.add_argument("--dim", type=int, default=768, help="width of the model (768)")
    parser.add_argument("--width", type=int, default=3072, help="intermediate width (3072)")
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a call (1024)")
    parser.add_argument("--layers", nargs="+", default=["cp-64", "cp-256", "cp-16x16", "tr-64", "tr-256", "tr-16x16"])
    parser.add_argument("--dtype", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    args = measure.parse(parser, argv)
    guard = measure.Guard(args.device)
    header = "layer | dtype | rank | parameters | forward GFLOP | forward ms | / dense | with backward ms | / dense"
    tables = [measure.table(header.split(" | "), rows(args, dtype)) for dtype in args.dtype]
    what = (
        f"One layer of {args.dim} and {args.width}, {args.tokens:,} tokens. bf16 is autocast over float32 weights. "
        "/ dense is the time over the dense layer's, the median of the rounds' ratios."
    )
    measure.report(args, "muMoE beside a dense layer", what, guard, tables, [])


if __name__ == "__main__":
    binding.bound(main)

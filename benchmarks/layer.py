"""One MoE layer against a dense SwiGLU of equal FLOPs, by back end, forward and with backward.

    python benchmarks/layer.py --out benchmarks/results/layer.md
    python benchmarks/layer.py --sizes 512x352 --dtype bf16 --backend torch native --impl none

Tokens and router are new on every call, so routing and the experts' loads are: a kernel that is made for one shape pays
for the next. Before a call with backward the weights are written to, as an optimiser would, so that what a back end has
packed for speed is packed again. eff is the dense time over the layer's, round by round: 1 is all that can be had.
"""

import argparse
from collections.abc import Sequence

import binding
import measure
import peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moekit.nn.moe import MoE
from moekit.nn.router import RouterContext

BACKENDS = ("auto", "torch", "native", "triton")


class Dense(nn.Module):
    """A plain SwiGLU, torch's own products."""

    def __init__(self, dim: int, ff: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(*shape, bias=False) for shape in ((dim, ff), (dim, ff), (ff, dim)))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


def size(text: str) -> tuple[int, int]:
    dim, ff = map(int, text.split("x"))
    return dim, ff


def entrant(
    args: argparse.Namespace, layer: nn.Module, router: nn.Parameter | None, dtype: str, dim: int, backward: bool
) -> measure.Contestant:
    """Returns a layer as one stage; `router` is drawn anew before each call."""
    layer.train(backward)
    state: dict[str, Tensor] = {}

    @torch.no_grad()
    def prepare(number: int) -> None:
        draw = torch.Generator().manual_seed(number % 2**31)
        x, d_y = (torch.randn(1, args.tokens, dim, generator=draw) for _ in range(2))
        if router is not None:
            router.copy_(torch.randn(router.shape, generator=draw) * peers.ROUTER_STD)
        low = torch.bfloat16 if dtype == "bf16" else torch.float32
        state.update(x=x.to(args.device, low).requires_grad_(backward), d_y=d_y.to(args.device, low))
        if backward:
            for parameter in layer.parameters():
                parameter.grad = None
                parameter.mul_(1)

    def forward() -> Tensor:
        with peers.precision(args, dtype):
            y = layer(state["x"])
        return y if isinstance(y, Tensor) else y.y

    def run() -> None:
        if backward:
            forward().backward(state["d_y"])
        else:
            with torch.no_grad():
                forward()

    return measure.Contestant({"call": run}, prepare)


class Ours(nn.Module):
    """Our MoE layer, which also wants token ids."""

    def __init__(self, moe: MoE) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor) -> Tensor:
        token_ids = torch.zeros(x.shape[0] * x.shape[1], dtype=torch.int64, device=x.device)
        y: Tensor = self.moe(x, RouterContext(token_ids, len(x))).y
        return y


def one_size(args: argparse.Namespace, kind: str, dtype: str, dim: int, ff: int) -> tuple[list[list[str]], list[str]]:
    """Returns the rows of a size and dtype, and who is missing."""
    shape = args.shape._replace(hidden=dim, width=ff, layers=1, dense_layers=0, vocab=64)
    found = peers.lineup(args, shape, kind, dtype, 64)
    active = (shape.chosen + shape.shared) * ff
    dense = Dense(dim, active).to(args.device, torch.bfloat16 if dtype == "bf16" else torch.float32)
    layers: dict[str, tuple[nn.Module, nn.Parameter | None]] = {"dense": (dense, None)}
    for name, theirs in found.theirs.items():
        layers[name] = theirs.model.layers[0].mlp, theirs.model.layers[0].mlp.gate.weight
    for name, ours in found.ours.items():
        layers[name] = Ours(ours.moe_layers[0]), ours.moe_layers[0].router.weight
    cells: dict[str, list[str]] = {name: [] for name in layers}
    for backward in (False, True):
        entrants = {name: entrant(args, *layer, dtype, dim, backward) for name, layer in layers.items()}
        flops = 6 * args.tokens * dim * active * (3 if backward else 1)
        seconds = measure.in_turn(entrants, args.repeats, args.device)
        for name, stages in seconds.items():
            took = measure.median(stages)
            speed = [f"{took * 1e3:.1f}", f"{flops / took / 1e9:,.0f}", measure.speedup(stages, seconds["dense"])]
            cells[name] += speed
    rows = [[peers.KINDS[kind], f"{dim}, {ff}", dtype, name, *texts] for name, texts in cells.items()]
    return rows, found.missing


def compare(args: argparse.Namespace, kind: str, dtype: str) -> tuple[list[list[str]], list[str]]:
    """Returns the rows of a dtype, and who is missing."""
    sizes = [one_size(args, kind, dtype, dim, ff) for dim, ff in args.sizes]
    return [row for rows, _ in sizes for row in rows], [line for _, missing in sizes for line in missing]


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=7)
    peers.options(parser, dtypes=("fp32", "bf16"))
    parser.set_defaults(models=["deepseek_v2"], backend=list(BACKENDS))
    parser.add_argument(
        "--sizes", nargs="+", type=size, default=[(512, 128), (512, 352), (1024, 128), (1024, 352)], metavar="DIMxWIDTH"
    )
    parser.add_argument("--tokens", type=int, default=2048, help="of one call (2048)")
    args = measure.parse(parser, argv)
    header = "block of | d, h | dtype | who | forward ms | GFLOP/s | eff | with backward ms | GFLOP/s | eff"
    shape = args.shape
    what = f"{args.tokens} tokens, {shape.experts} experts, top-{shape.chosen}, {shape.shared} shared."
    peers.report(args, "One MoE layer", what, header, compare)


if __name__ == "__main__":
    binding.bound(main)

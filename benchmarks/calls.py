"""One feed-forward layer as a contestant: new tokens on every call, weights written to before it."""

import argparse
from collections.abc import Callable

import measure
import torch
from torch import Tensor, nn

from moekit.nn.router import RouterContext
from moekit.nn.variants.layer import VariantLayer

GATE_STD = 0.3
"""Of the gates' weights: different tokens and sequences then choose different experts, as a trained model's do."""


def entrant(
    args: argparse.Namespace,
    layer: nn.Module,
    shape: tuple[int, int],
    dtype: str,
    backward: bool,
    gates: Callable[[nn.Module], list[nn.Parameter]],
) -> measure.Contestant:
    """Returns a layer as one stage, on (sequences, tokens) of `args.dim`; `gates` are drawn anew before each call.

    Weights are written to before a call, as an optimiser would.
    """
    layer.to(args.device).train(backward)
    state: dict[str, Tensor] = {}

    @torch.no_grad()
    def prepare(number: int) -> None:
        draw = torch.Generator().manual_seed(number % 2**31)
        x, d_y = (torch.randn(*shape, args.dim, generator=draw) for _ in range(2))
        if isinstance(layer, VariantLayer):
            for gate in gates(layer):
                gate.copy_(torch.randn(gate.shape, generator=draw) * GATE_STD)
        state.update(x=x.to(args.device).requires_grad_(backward), d_y=d_y.to(args.device))
        for parameter in layer.parameters():
            parameter.grad = None
            parameter.mul_(1)

    def forward(x: Tensor) -> Tensor:
        if not isinstance(layer, VariantLayer):
            y: Tensor = layer(x)
            return y
        token_ids = torch.zeros(x.shape[0] * x.shape[1], dtype=torch.int64, device=x.device)
        y = layer(x, RouterContext(token_ids, len(x))).y
        return y

    def run() -> None:
        with torch.set_grad_enabled(backward):
            with torch.autocast(args.device.type, torch.bfloat16, enabled=dtype == "bf16"):
                y = forward(state["x"])
            if backward:
                y.backward(state["d_y"].to(y.dtype))

    return measure.Contestant({"call": run}, prepare)

"""Load health: how evenly experts are used, and which of them died."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.config import ModelConfig
from moekit.ops.routing import Routing


class Load(NamedTuple):
    """Sums of routing results for each MoE layer, over the micro-batches of a step or the steps of a log window."""

    tokens_per_expert: Int[Tensor, "layers experts"]
    units: Int[Tensor, " layers"]
    squared_lse: Float[Tensor, " layers"]


def no_load(config: ModelConfig, device: torch.device) -> Load:
    """Returns sums to start from; they stay on the device, so that a GPU is not waited for."""
    layers, experts = len(config.gates), 1 if config.ffn.kind == "dense" else config.ffn.n_routed_experts
    return Load(
        torch.zeros(layers, experts, dtype=torch.int64, device=device),
        torch.zeros(layers, dtype=torch.int64, device=device),
        torch.zeros(layers, dtype=torch.float64, device=device),
    )


def add_routing(load: Load, routings: Sequence[Routing]) -> None:
    """Adds a micro-batch."""
    for layer, routing in enumerate(routings):
        load.tokens_per_expert[layer] += routing.tokens_per_expert.sum(0)
        load.units[layer] += routing.units.sum()
        if routing.squared_lse_sums is not None:
            load.squared_lse[layer] += routing.squared_lse_sums.detach().sum()


def measure(load: Load) -> dict[str, list[float]]:
    """Returns one number per MoE layer, with four decimals; nothing without such layers.

    max_violation: largest load / mean load - 1 (arXiv 2408.15664), 0 at perfect balance; entropy: of the load, as a
    fraction of its largest value; dead: experts without a token; router_z: root mean square of the log-sum-exp of the
    router's logits, 0 for hash routing.
    """
    tokens, units, squared_lse = (sums.double().cpu() for sums in load)
    if not len(tokens):
        return {}
    found = {
        "max_violation": (tokens.amax(1) / tokens.mean(1).clamp(min=1e-9) - 1).tolist(),
        "entropy": [load_entropy(row) for row in tokens],
        "dead": (tokens == 0).sum(1).tolist(),
        "router_z": (squared_lse / units.clamp(min=1)).sqrt().tolist(),
    }
    return {name: [round(value, 4) for value in values] for name, values in found.items()}


def load_entropy(tokens_per_expert: Float[Tensor, " experts"]) -> float:
    """Returns the entropy of the load, as a fraction of log(experts); 1 for a single expert or no tokens."""
    total, experts = float(tokens_per_expert.sum()), len(tokens_per_expert)
    if experts == 1 or total == 0:
        return 1.0
    return float(torch.special.entr(tokens_per_expert / total).sum()) / math.log(experts)

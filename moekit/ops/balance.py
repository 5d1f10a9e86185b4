"""Balance: losses that are functions of a `Routing`, and the loss-free update of the selection bias.

Each loss is 1 at perfect balance, so with its factor it equals that factor (DeepSeekMoE, arXiv 2401.06066, Eq. 12-17).
Importance and load, squared variations, are 0 there. Counts carry no gradient, the sums of scores do. transformers'
`load_balancing_loss_func` is another quantity: it does not divide by k and pools all layers, so it is k at balance.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.ops.merge import mixing
from moekit.ops.routing import Routing


class LoadSums(NamedTuple):
    """Load per expert and real units, summed over what an optimiser step has seen before this micro-batch."""

    tokens_per_expert: Int[Tensor, " experts"]
    units: Int[Tensor, ""]


class Balance(NamedTuple):
    """Load f (Eq. 13) and mean affinity P (Eq. 14), per sequence or pooled into one row."""

    load: Float[Tensor, "sequences experts"]
    affinity: Float[Tensor, "sequences experts"]
    tokens_per_group: Int[Tensor, "sequences groups"]
    units: Int[Tensor, " sequences"]


def measure(routing: Routing, per_sequence: bool, prior: LoadSums | None = None) -> Balance:
    """Returns f and P. f is 1 for every expert at perfect balance and P sums to 1 over the experts.

    `prior` adds the load of the earlier micro-batches of the step to f: with it, balance is asked of the global batch
    (Qiu et al., arXiv 2501.11873). P is the micro-batch's own, since gradients of earlier ones are gone.
    """
    assert routing.score_sums is not None, "hash routing has no balance loss"
    k = routing.expert_ids.shape[1]
    counted = routing.tokens_per_expert, routing.score_sums, routing.tokens_per_group, routing.units
    counts, sums, groups, units = counted if per_sequence else (x.sum(0, keepdim=True) for x in counted)
    real = units.clamp(min=1).to(sums.dtype).unsqueeze(-1)
    if prior is None:
        load = counts.to(sums.dtype) / real
    else:
        load = (counts + prior.tokens_per_expert).to(sums.dtype) / (real + prior.units)
    return Balance(load * (counts.shape[1] / k), sums / real, groups, units)


def _mean(per_sequence: Float[Tensor, " sequences"], units: Int[Tensor, " sequences"]) -> Float[Tensor, ""]:
    """Returns the mean over the sequences that are not all padding."""
    present = (units > 0).to(per_sequence.dtype)
    return (per_sequence * present).sum() / present.sum().clamp(min=1)


def expert_loss(balance: Balance) -> Float[Tensor, ""]:
    """Returns sum_i f_i P_i, averaged over sequences (Eq. 12; with sigmoid scores DeepSeek-V3, Eq. 17-20).

    The paper does not say: DeepSeek-V3's f could count the top-k of the unbiased scores; we count what was chosen.
    """
    return _mean((balance.load * balance.affinity).sum(-1), balance.units)


def device_loss(balance: Balance, n_group: int) -> Float[Tensor, ""]:
    """Returns sum_i f'_i P'_i over groups of experts: mean load times summed affinity (Eq. 15-17)."""
    load = balance.load.unflatten(-1, (n_group, -1)).mean(-1)
    affinity = balance.affinity.unflatten(-1, (n_group, -1)).sum(-1)
    return _mean((load * affinity).sum(-1), balance.units)


def communication_loss(balance: Balance, topk_group: int) -> Float[Tensor, ""]:
    """Returns sum_i f''_i P''_i with f'' the share of tokens sent to group i (DeepSeek-V2, Eq. 29-31).

    1 when every token reaches exactly `topk_group` groups and all groups are reached equally.
    """
    n_group, units = balance.tokens_per_group.shape[1], balance.units.clamp(min=1).unsqueeze(-1)
    share = balance.tokens_per_group.to(balance.affinity.dtype) * (n_group / topk_group) / units
    affinity = balance.affinity.unflatten(-1, (n_group, -1)).sum(-1)
    return _mean((share * affinity).sum(-1), balance.units)


def z_loss(routing: Routing) -> Float[Tensor, ""]:
    """Returns the mean squared log-sum-exp of the router's logits (ST-MoE, arXiv 2202.08906, Eq. 5)."""
    assert routing.squared_lse_sums is not None, "hash routing has no router logits"
    return routing.squared_lse_sums.sum() / routing.units.sum().clamp(min=1)


def importance_loss(routing: Routing) -> Float[Tensor, ""]:
    """Returns the squared variation of the experts' summed weights (arXiv 1701.06538, Eq. 6-7); 0 at balance."""
    return _squared_variation(mixing(routing, routing.tokens_per_expert.shape[1]).sum(0))


def load_loss(routing: Routing) -> Float[Tensor, ""]:
    """Returns the squared variation of the units that an expert may expect (arXiv 1701.06538, Eq. 10-11).

    The scores are those of `routing.route_noisy`; without noise they have no gradient.
    """
    assert routing.score_sums is not None
    return _squared_variation(routing.score_sums.sum(0))


def _squared_variation(x: Float[Tensor, " experts"]) -> Float[Tensor, ""]:
    """Returns variance / mean^2, the variance over n - 1 as in the paper's code; 0 for one expert."""
    return x.var() / (x.mean().square() + 1e-10) if len(x) > 1 else x.sum() * 0


def updated_bias(
    expert_bias: Float[Tensor, " experts"], tokens_per_expert: Int[Tensor, " experts"], speed: float
) -> Float[Tensor, " experts"]:
    """Returns the selection bias after one optimiser step: up by `speed` where under-loaded, down where over-loaded.

    `tokens_per_expert` is the demand of the whole global batch (loss-free balancing, arXiv 2408.15664, Algorithm 1).
    The bias is not centred: only its differences choose.
    """
    load = tokens_per_expert.to(torch.float64)
    return expert_bias + speed * torch.sign(load.mean() - load).to(expert_bias.dtype)

"""Scores to `Routing`: who computes what, with which weight, and the small sums that balancing needs.

Everything here is float32 (float64 for a float64 input) whatever the model's dtype: a bf16 router flips near ties.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moekit.ops.kernels import choice as compiled

DROPPED = -1
"""The expert id of a choice that no expert computes: padding, or a token that a full expert refused."""


class Routing(NamedTuple):
    """One layer's routing result. `weights`, `scores` and the sums of scores carry gradients; counts do not.

    The sums are taken per sequence over real units only; balance losses, load health and the bias update need no more.
    """

    expert_ids: Int[Tensor, "units k"]
    weights: Float[Tensor, "units k"]
    scores: Float[Tensor, "units experts"] | None
    tokens_per_expert: Int[Tensor, "sequences experts"]
    """Choices before any capacity limit: the demand."""
    tokens_per_group: Int[Tensor, "sequences groups"]
    """Tokens with at least one chosen expert in the group (DeepSeek-V2, Eq. 31)."""
    score_sums: Float[Tensor, "sequences experts"] | None
    """Sums of the affinities, normalised to sum 1 over the experts of each unit."""
    squared_lse_sums: Float[Tensor, " sequences"] | None
    units: Int[Tensor, " sequences"]
    """Real units in each sequence; padding is not counted."""


def top_k(choice: Float[Tensor, "units experts"], k: int) -> Int[Tensor, "units k"]:
    """Returns the ids of the k largest, best first; among equals the lower id wins, on every device."""
    if compiled.has_choice(choice):
        return compiled.largest(choice, k)
    return choice.sort(dim=-1, descending=True, stable=True).indices[:, :k].contiguous()  # lets the rest go


def limit_groups(
    choice: Float[Tensor, "units experts"], n_group: int, topk_group: int, best: int
) -> Float[Tensor, "units experts"]:
    """Returns `choice` with all but the `topk_group` best groups at minus infinity.

    A group scores the sum of its `best` highest entries: 1 in DeepSeek-V2 (the maximum), 2 in DeepSeek-V3.
    """
    if topk_group == n_group:
        return choice
    grouped = choice.unflatten(-1, (n_group, -1))
    kept = top_k(grouped.topk(best, dim=-1).values.sum(-1), topk_group)
    allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=choice.device).scatter_(1, kept, True)
    limited: Tensor = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(1)
    return limited


def route(
    logits: Float[Tensor, "units experts"],
    k: int,
    *,
    scoring_func: Literal["softmax", "sigmoid"] = "softmax",
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
    expert_bias: Float[Tensor, " experts"] | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_best: int = 1,
    sequences: int = 1,
    mask: Bool[Tensor, " units"] | None = None,
    skip_top: int = 0,
    softmax_over_rest: bool = False,
) -> Routing:
    """Returns the top-k routing of `units` that form `sequences` equal, contiguous sequences (padding masked false).

    DeepSeekMoE (arXiv 2401.06066), Eq. 9-11: affinities are a softmax over all experts (or sigmoids: DeepSeek-V3, Eq.
    15), and the weight is the raw affinity, not renormalised over the chosen, unless `norm_topk_prob`. Switch is k = 1,
    GShard k = 2. `expert_bias` chooses but does not weigh (DeepSeek-V3, Eq. 16).
    `skip_top` takes from each unit the experts that it would choose first, before groups are limited; k must be left.
    The paper does not say: whether the softmax is recomputed without them (Figure 4). It is not, unless
    `softmax_over_rest`; `scores` and the sums are those over all experts either way.
    Differs from the paper: DeepSeek-V2's code scales only weights that are not renormalised; no released model has
    both, and we always scale, as DeepSeek-V3 does.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if n_group == 1 and not skip_top and mask is None and compiled.has_choice(logits):
        found = compiled.route(
            *(logits, expert_bias, k, sequences),
            sigmoid=scoring_func == "sigmoid",
            normed=norm_topk_prob,
            factor=routed_scaling_factor,
        )
        return of_routes(found)
    scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
    choice = scores.detach() if expert_bias is None else scores.detach() + expert_bias
    affinities = scores
    if skip_top:
        skipped = top_k(choice, skip_top)
        choice = choice.scatter(1, skipped, -torch.inf)
        if softmax_over_rest:
            affinities = logits.scatter(1, skipped, -torch.inf).softmax(-1)
    expert_ids = top_k(limit_groups(choice, n_group, topk_group, group_best), k)
    weights = affinities.gather(1, expert_ids)
    if norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    shares = scores if scoring_func == "softmax" else scores / (scores.sum(-1, keepdim=True) + 1e-20)
    squared_lse = logits.logsumexp(-1).square()
    if mask is not None:
        shares, squared_lse = shares * mask.unsqueeze(-1), squared_lse * mask
    routing = _counted(expert_ids, weights * routed_scaling_factor, logits.shape[1], n_group, sequences, mask)
    sums = _per_sequence(shares, sequences), _per_sequence(squared_lse, sequences)
    return routing._replace(scores=scores, score_sums=sums[0], squared_lse_sums=sums[1])


def of_routes(found: compiled.Routes) -> Routing:
    """Returns the routing that the compiled choice has found: no groups, no padding."""
    sequences = len(found.counts)
    length = torch.full((sequences,), len(found.ids) // max(sequences, 1), device=found.ids.device)
    return Routing(
        *(found.ids, found.weights, found.scores, found.counts, length.unsqueeze(-1)),
        *(found.score_sums, found.squared_lse_sums, length),
    )


def route_noisy(
    logits: Float[Tensor, "units experts"],
    k: int,
    noise_std: Float[Tensor, "units experts"] | None = None,
    *,
    sequences: int = 1,
    mask: Bool[Tensor, " units"] | None = None,
) -> Routing:
    """Returns noisy top-k routing: the k largest of logits + noise, weights their softmax (arXiv 1701.06538, Eq. 3-5).

    `noise_std` multiplies a standard normal drawn here; None: no noise. `scores` are the probabilities that an expert
    would be among the chosen if its own noise alone were drawn again (Eq. 8-9), which have a gradient where choices
    have none; without noise, or with all experts chosen, they are 1 for those.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    noisy = logits if noise_std is None else logits + torch.randn_like(logits) * noise_std
    experts = logits.shape[1]
    order = top_k(noisy.detach(), min(k + 1, experts))
    expert_ids = order[:, :k]
    weights = noisy.gather(1, expert_ids).softmax(-1)
    chosen = torch.zeros_like(logits).scatter_(1, expert_ids, 1)
    if noise_std is None or k == experts:
        scores = chosen
    else:
        last, next_best = noisy.gather(1, order[:, k - 1 :]).unsqueeze(1).unbind(-1)
        scores = torch.special.ndtr((logits - torch.where(chosen.bool(), next_best, last)) / noise_std)
    routing = _counted(expert_ids, weights, experts, 1, sequences, mask)
    shares = scores if mask is None else scores * mask.unsqueeze(-1)
    return routing._replace(scores=shares, score_sums=_per_sequence(shares, sequences))


def route_by_hash(
    token_ids: Int[Tensor, " units"],
    table: Int[Tensor, "vocab k"],
    n_experts: int,
    *,
    routed_scaling_factor: float = 1.0,
    sequences: int = 1,
    mask: Bool[Tensor, " units"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Routing:
    """Returns the routing of a fixed table from token id to experts; weights 1/k (Hash Layers, arXiv 2106.04426).

    There is nothing to learn, hence no scores and no balance loss.
    """
    expert_ids = table[token_ids]
    weights = torch.full(expert_ids.shape, routed_scaling_factor / table.shape[1], dtype=dtype, device=table.device)
    return _counted(expert_ids, weights, n_experts, 1, sequences, mask)


def of_tokens(routing: Routing, length: int, mask: Bool[Tensor, " tokens"] | None = None) -> Routing:
    """Returns the routing of sequences of `length` tokens, each of which is routed as its sequence is."""
    ids, weights = (part.repeat_interleave(length, 0) for part in (routing.expert_ids, routing.weights))
    return _counted(ids, weights, routing.tokens_per_expert.shape[1], 1, len(routing.expert_ids), mask)


def random_hash_table(vocab_size: int, n_experts: int, k: int, seed: int) -> Int[Tensor, "vocab k"]:
    """Returns k distinct random experts for every token id, the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(vocab_size, n_experts, generator=generator, device="cpu")
    return noise.argsort(dim=1, stable=True)[:, :k].contiguous()


def balanced_hash_table(token_counts: Int[Tensor, " vocab"], n_experts: int, k: int) -> Int[Tensor, "vocab k"]:
    """Returns k distinct experts for every token id, filled greedily from the most frequent token on.

    Each token goes to the experts with the least load so far (Hash Layers, section 3.1, "balanced assignment"), so the
    loads differ by at most the largest count of one token. Ties go to the lower id.
    """
    load = [0] * n_experts
    counts = token_counts.tolist()
    table = torch.empty(len(counts), k, dtype=torch.int64, device="cpu")
    for token in sorted(range(len(counts)), key=lambda token: -counts[token]):
        chosen = sorted(range(n_experts), key=lambda expert: (load[expert], expert))[:k]
        table[token] = torch.tensor(chosen, device="cpu")
        for expert in chosen:
            load[expert] += max(counts[token], 1)  # tokens never seen are spread too
    return table


def limit_capacity(
    routing: Routing, capacity: int | Float[Tensor, ""], policy: Literal["position", "score"]
) -> Routing:
    """Returns the routing with every choice beyond `capacity` tokens per expert dropped (id -1, weight 0).

    `position` keeps the first tokens, and first choices before second ones (GShard, arXiv 2006.16668, Algorithm 1);
    `score` keeps the highest weights (DeepSeek-V2, section 2.2.4). Counts are left as demanded.
    """
    ids, weights = routing.expert_ids.T.flatten(), routing.weights.detach().T.flatten()  # first choices first
    order = torch.arange(len(ids), device=ids.device)
    if policy == "score":
        order = weights.argsort(descending=True, stable=True)
    order = order[ids[order].argsort(stable=True)]  # by expert, priority kept inside
    by_expert = ids[order]
    first_row = torch.searchsorted(by_expert.contiguous(), by_expert.contiguous())
    rank = torch.empty_like(ids).scatter_(0, order, torch.arange(len(ids), device=ids.device) - first_row)
    kept = (rank < capacity).view(routing.expert_ids.shape[::-1]).T
    return routing._replace(expert_ids=routing.expert_ids.masked_fill(~kept, DROPPED), weights=routing.weights * kept)


def _counted(
    expert_ids: Int[Tensor, "units k"],
    weights: Float[Tensor, "units k"],
    n_experts: int,
    n_group: int,
    sequences: int,
    mask: Bool[Tensor, " units"] | None,
) -> Routing:
    """Returns a routing without scores: padding dropped, and each sequence's choices, groups and real units counted."""
    if mask is not None:
        expert_ids, weights = expert_ids.masked_fill(~mask.unsqueeze(-1), DROPPED), weights * mask.unsqueeze(-1)
    ids = torch.where(expert_ids == DROPPED, n_experts, expert_ids)  # dropped ids are counted at the side
    sequence = torch.arange(sequences, device=ids.device).repeat_interleave(len(ids) // max(sequences, 1))
    slots = (sequence.unsqueeze(-1) * (n_experts + 1) + ids).flatten()
    counts = slots.new_zeros(sequences * (n_experts + 1)).scatter_add_(0, slots, torch.ones_like(slots))
    counts = counts.view(sequences, n_experts + 1)[:, :n_experts]
    real = torch.ones(len(ids), dtype=torch.bool, device=ids.device) if mask is None else mask
    units = _per_sequence(real, sequences)
    groups = units.unsqueeze(-1)
    if n_group > 1:
        reached = F.one_hot(ids // (n_experts // n_group), n_group + 1).amax(1)[:, :n_group]
        groups = _per_sequence(reached, sequences)
    return Routing(expert_ids, weights, None, counts, groups, None, None, units)


def _per_sequence(x: Tensor, sequences: int) -> Tensor:
    """Returns the sums over the units of each sequence."""
    return x.reshape(sequences, len(x) // max(sequences, 1), *x.shape[1:]).sum(1)

"""The slow, obvious version of every formula: loops over tokens and experts, one line a paper's line.

The oracle of the tests, in float64. Nothing else imports it.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def swiglu(x: Float[Tensor, "*any dim"], gate_up: Float[Tensor, "ff2 dim"], down: Float[Tensor, "dim ff"]) -> Tensor:
    """Returns down (silu(gate x) * up x)."""
    gate, up = gate_up.chunk(2)
    y: Tensor = (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
    return y


def rounded(x: Float[Tensor, "*any dim"]) -> Float[Tensor, "*any dim"]:
    """Returns activations as 8-bit products with weights in codes take them: whole 127ths of each group's largest."""
    groups = []
    for group in x.split(32, dim=-1):
        scale = group.abs().amax(-1, keepdim=True) / 127
        groups.append(torch.where(scale == 0, 0, (group / scale).round() * scale))
    return torch.cat(groups, dim=-1)


def chosen_experts(
    scores: Float[Tensor, "units experts"],
    k: int,
    expert_bias: Float[Tensor, " experts"] | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_best: int = 1,
    skip_top: int = 0,
) -> list[list[int]]:
    """Returns the chosen ids per unit, best first, lower id first among equals; group limits by sorting lists.

    The first `skip_top` of all are taken away before.
    """
    chosen = []
    for row in scores.tolist() if expert_bias is None else (scores + expert_bias).tolist():
        size = len(row) // n_group
        skipped = sorted(range(len(row)), key=lambda i: (-row[i], i))[:skip_top]
        row = [-math.inf if i in skipped else one for i, one in enumerate(row)]
        group_score = [sum(sorted(row[g * size : (g + 1) * size])[-group_best:]) for g in range(n_group)]
        groups = sorted(range(n_group), key=lambda g: (-group_score[g], g))[:topk_group]
        allowed = [i for i in range(len(row)) if i // size in groups and i not in skipped]
        chosen.append(sorted(allowed, key=lambda i: (-row[i], i))[:k])
    return chosen


def moe(
    x: Float[Tensor, "tokens dim"],
    router: Float[Tensor, "experts dim"],
    gate_up: Float[Tensor, "experts ff2 dim"],
    down: Float[Tensor, "experts dim ff"],
    shared_gate_up: Float[Tensor, "ff2_shared dim"] | None,
    shared_down: Float[Tensor, "dim ff_shared"] | None,
    k: int,
    scoring_func: str = "softmax",
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
    expert_bias: Float[Tensor, " experts"] | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    group_best: int = 1,
    skip_top: int = 0,
    softmax_over_rest: bool = False,
) -> Float[Tensor, "tokens dim"]:
    """Returns the DeepSeekMoE layer without its residual (arXiv 2401.06066, Eq. 9-11), token by token."""
    outputs = []
    for token in x:
        logits = router @ token
        scores = logits.softmax(-1) if scoring_func == "softmax" else logits.sigmoid()
        limits = (expert_bias, n_group, topk_group, group_best)
        ids = chosen_experts(scores.detach()[None], k, *limits, skip_top)[0]
        if softmax_over_rest:
            skipped = chosen_experts(scores.detach()[None], skip_top, expert_bias)[0]
            rest = [i for i in range(len(scores)) if i not in skipped]
            scores = torch.stack([logits[i].exp() / logits[rest].exp().sum() for i in range(len(scores))])
        total = sum((scores[i] for i in ids), start=torch.zeros_like(scores[0])) if norm_topk_prob else 1.0
        y = torch.zeros_like(token)
        for i in ids:
            y = y + routed_scaling_factor * scores[i] / total * swiglu(token, gate_up[i], down[i])
        if shared_gate_up is not None and shared_down is not None:
            y = y + swiglu(token, shared_gate_up, shared_down)
        outputs.append(y)
    return torch.stack(outputs) if outputs else torch.zeros_like(x)


def mixed_linear(
    x: Float[Tensor, "tokens dim"],
    mix: Float[Tensor, "tokens experts"],
    weight: Float[Tensor, "experts out dim"],
    bias: Float[Tensor, "experts out"] | None = None,
) -> Float[Tensor, "tokens out"]:
    """Returns the sum of mix_e (W_e x + b_e): every expert computes every token."""
    outputs = [x @ weight[e].T + (0 if bias is None else bias[e]) for e in range(len(weight))]
    return torch.stack([mix[:, e : e + 1] * y for e, y in enumerate(outputs)]).sum(0)


def probability_of_choice(
    logits: Float[Tensor, "units experts"],
    noisy: Float[Tensor, "units experts"],
    noise_std: Float[Tensor, "units experts"],
    k: int,
) -> Float[Tensor, "units experts"]:
    """Returns the chance that an expert is among the k largest if its own noise were drawn anew (1701.06538, Eq. 9)."""
    chances = torch.zeros_like(logits)
    for unit in range(len(logits)):
        for e in range(logits.shape[1]):
            others = sorted(torch.cat((noisy[unit, :e], noisy[unit, e + 1 :])), reverse=True)
            chances[unit, e] = torch.special.ndtr((logits[unit, e] - others[k - 1]) / noise_std[unit, e])
    return chances


def expert_balance_loss(
    scores: Float[Tensor, "tokens experts"], chosen: list[list[int]], real: list[bool] | None = None
) -> Float[Tensor, ""]:
    """Returns sum_i f_i P_i over the real tokens (DeepSeekMoE, Eq. 12-14)."""
    f, p = _load_and_affinity(scores, chosen, real)
    return (f * p).sum()


def device_balance_loss(
    scores: Float[Tensor, "tokens experts"], chosen: list[list[int]], n_group: int
) -> Float[Tensor, ""]:
    """Returns sum over devices of mean load times summed affinity (DeepSeekMoE, Eq. 15-17)."""
    f, p = _load_and_affinity(scores, chosen, None)
    size = len(f) // n_group
    loss = torch.zeros_like(p[0])
    for g in range(n_group):
        members = range(g * size, (g + 1) * size)
        loss = loss + sum(float(f[i]) for i in members) / size * sum(
            (p[i] for i in members), start=torch.zeros_like(loss)
        )
    return loss


def communication_balance_loss(
    scores: Float[Tensor, "tokens experts"], chosen: list[list[int]], n_group: int, topk_group: int
) -> Float[Tensor, ""]:
    """Returns sum over devices of the share of tokens sent there times summed affinity (DeepSeek-V2, Eq. 29-31)."""
    _, p = _load_and_affinity(scores, chosen, None)
    size = scores.shape[1] // n_group
    loss = torch.zeros_like(p[0])
    for g in range(n_group):
        sent = sum(any(i // size == g for i in ids) for ids in chosen)
        share = n_group / (topk_group * len(chosen)) * sent
        loss = loss + share * sum((p[i] for i in range(g * size, (g + 1) * size)), start=torch.zeros_like(loss))
    return loss


def _load_and_affinity(scores: Tensor, chosen: list[list[int]], real: list[bool] | None) -> tuple[Tensor, Tensor]:
    n_experts, k = scores.shape[1], len(chosen[0])
    tokens = [t for t in range(len(chosen)) if real is None or real[t]]
    f = torch.zeros(n_experts, dtype=scores.dtype)
    p = torch.zeros_like(scores[0])
    for t in tokens:
        for i in chosen[t]:
            f[i] += n_experts / (k * len(tokens))
        p = p + scores[t] / scores[t].sum() / len(tokens)
    return f, p


def attention(
    q: Float[Tensor, "length heads head_dim"],
    k: Float[Tensor, "length kv_heads head_dim"],
    v: Float[Tensor, "length kv_heads value_dim"],
    scale: float,
    allowed: Bool[Tensor, "length length"] | None = None,
) -> Float[Tensor, "length heads value_dim"]:
    """Returns causal softmax attention, query by query and head by head."""
    length, heads, _ = q.shape
    y = [[torch.zeros_like(v[0, 0]) for _ in range(heads)] for _ in range(length)]
    for i in range(length):
        keys = [j for j in range(i + 1) if allowed is None or bool(allowed[i, j])]
        for h in range(heads):
            kv = h * k.shape[1] // heads
            p = torch.stack([q[i, h] @ k[j, kv] * scale for j in keys]).softmax(0)
            y[i][h] = sum((p[n] * v[j, kv] for n, j in enumerate(keys)), start=y[i][h])
    return torch.stack([torch.stack(row) for row in y])


def rotate(
    x: Float[Tensor, " rope"], position: int, inv_freq: list[float], interleaved: bool
) -> Float[Tensor, " rope"]:
    """Returns one head's vector rotated by its position; pairs (2i, 2i+1) interleaved, or (i, i + rope/2)."""
    half = len(x) // 2
    out = [torch.zeros_like(x[0]) for _ in range(len(x))]
    for i in range(half):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + half)
        cos, sin = math.cos(position * inv_freq[i]), math.sin(position * inv_freq[i])
        out[a], out[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return torch.stack(out)


def cross_entropy(logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"]) -> Float[Tensor, ""]:
    """Returns the sum over predicted tokens of -log softmax at the target, in nats."""
    total = torch.zeros_like(logits[0, 0])
    for row, target in zip(logits, targets.tolist(), strict=True):
        if target != -100:
            total = total - row.log_softmax(0)[target]
    return total


def entmax15(logits: Float[Tensor, "*units experts"]) -> Float[Tensor, "*units experts"]:
    """Returns p = max(z / 2 - tau, 0)^2 with sum 1, tau by bisection (arXiv 1905.05702)."""
    rows = []
    for z in logits.reshape(-1, logits.shape[-1]) / 2:
        low, high = float(z.detach().max()) - 1, float(z.detach().max())
        for _ in range(100):
            tau = (low + high) / 2
            low, high = (tau, high) if float((z.detach() - tau).clamp(min=0).square().sum()) > 1 else (low, tau)
        above = (z - low).clamp(min=0)  # one more step, Newton's, gives tau its gradient
        tau_of_z = low + (above.square().sum() - 1) / (2 * above.detach().sum())
        rows.append((z - tau_of_z).clamp(min=0).square())
    return torch.stack(rows).reshape(logits.shape) if rows else torch.zeros_like(logits)


def factorised_experts(experts: list[Tensor], input: Tensor, output: Tensor) -> Float[Tensor, "experts out _"]:
    """Returns the matrices that CP or tensor-ring factors stand for (arXiv 2402.12550), bias last."""
    equations = {
        (1, 2): "nr,ir,or->noi",  # levels of experts, axes of a factor: two in CP, three in a tensor ring
        (2, 2): "nr,mr,ir,or->nmoi",
        (1, 3): "nab,ibc,oac->noi",
        (2, 3): "nab,mbd,idc,oac->nmoi",
    }
    equation = equations[len(experts), input.dim()]
    return torch.einsum(equation, *experts, input, output).reshape(-1, len(output), len(input))


def mixed_experts(
    x: Float[Tensor, "tokens dim"], gates: list[Tensor], experts: Float[Tensor, "experts out _"]
) -> Float[Tensor, "tokens out"]:
    """Returns each token through the sum of all experts, each weighted by the product of its levels' gate values."""
    outputs = []
    for token, *values in zip(x, *gates, strict=True):
        weights = values[0] if len(values) == 1 else torch.outer(values[0], values[1]).flatten()
        outputs.append(torch.einsum("n,noi,i->o", weights, experts, F.pad(token, (0, 1), value=1.0)))
    return torch.stack(outputs) if outputs else x.new_zeros(0, experts.shape[1])

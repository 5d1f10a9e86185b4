"""How far the fast path is from the slow formulas of `ops/reference.py`: output and every gradient, float64.

python benchmarks/parity.py --out docs/results/parity.md
"""

import argparse
from pathlib import Path

import measure
import torch

from moekit import receipts
from moekit.config import MoEConfig
from moekit.nn.moe import MoE
from moekit.nn.router import RouterContext
from moekit.ops import balance, reference

CASES: dict[str, dict[str, object]] = {
    "DeepSeekMoE, 1 shared + 7 of 63": {"n_routed_experts": 63, "num_experts_per_tok": 7, "n_shared_experts": 1},
    "GShard, 2 of 16": {"n_routed_experts": 16, "num_experts_per_tok": 2},
    "Switch, 1 of 16": {"n_routed_experts": 16, "num_experts_per_tok": 1},
    "all experts chosen": {"n_routed_experts": 5, "num_experts_per_tok": 5},
    "renormalised and scaled": {
        "n_routed_experts": 12, "num_experts_per_tok": 3, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    "V2, 3 of 8 groups": {
        "n_routed_experts": 24, "num_experts_per_tok": 4, "topk_method": "group_limited_greedy", "n_group": 8,
        "topk_group": 3,
    },
    "V3, sigmoid, bias, 4 of 8 groups": {
        "n_routed_experts": 32, "num_experts_per_tok": 8, "topk_method": "noaux_tc", "scoring_func": "sigmoid",
        "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
}  # fmt: skip
TOKENS, DIM, FF = 37, 19, 13  # sizes that divide nothing


def difference(settings: dict[str, object]) -> tuple[float, float, int]:
    """Returns the largest absolute difference of output, of all gradients, and the experts without a token."""
    config = MoEConfig.model_validate({"moe_intermediate_size": FF, "aux_loss_alpha": 0.01, **settings})
    layer = MoE(config, DIM, vocab_size=11, layer=0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if layer.router.expert_bias is not None:
        layer.router.expert_bias = torch.randn(config.n_routed_experts).double() * 0.1
    x = torch.randn(1, TOKENS, DIM, dtype=torch.float64, requires_grad=True)
    out = layer(x, RouterContext(torch.zeros(TOKENS, dtype=torch.int64), sequences=1))
    aux = balance.expert_loss(balance.measure(out.routing, per_sequence=True))
    inputs = [x, *layer.parameters()]
    fast = torch.autograd.grad((out.y * torch.arange(DIM)).sum() + aux, inputs)

    shared = layer.shared_experts
    shared_gate_up = None if shared is None else torch.cat((shared.gate_proj.weight, shared.up_proj.weight))
    slow_y = reference.moe(
        x[0], layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj, shared_gate_up,
        None if shared is None else shared.down_proj.weight, config.num_experts_per_tok, config.scoring_func,
        config.norm_topk_prob, config.routed_scaling_factor, layer.router.expert_bias, config.n_group,
        config.topk_group, 2 if config.topk_method == "noaux_tc" else 1,
    )  # fmt: skip
    logits = x[0] @ layer.router.weight.T
    scores = logits.softmax(-1) if config.scoring_func == "softmax" else logits.sigmoid()
    chosen = reference.chosen_experts(
        scores.detach(), config.num_experts_per_tok, layer.router.expert_bias, config.n_group, config.topk_group,
        2 if config.topk_method == "noaux_tc" else 1,
    )  # fmt: skip
    slow_aux = reference.expert_balance_loss(scores, chosen)
    slow = torch.autograd.grad((slow_y * torch.arange(DIM)).sum() + slow_aux, inputs)
    gradient = max(float((a - b).abs().max()) for a, b in zip(fast, slow, strict=True))
    empty = int((out.routing.tokens_per_expert.sum(0) == 0).sum())
    return float((out.y[0] - slow_y).detach().abs().max()), gradient, empty


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    rows = [(name, *difference(settings)) for name, settings in CASES.items()]
    versions = receipts.versions()
    lines = [
        "# Formula parity",
        "",
        f"`python benchmarks/parity.py --out docs/results/parity.md`, commit {measure.commit()}, moekit "
        f"{versions['moekit']}, torch {versions['torch']}, {versions['system']}.",
        "",
        f"The layer against `ops/reference.py` in float64, {TOKENS} tokens, width {DIM}, experts of {FF}; the "
        "objective is a weighted sum of the output plus the expert-level balance loss.",
        "",
        "| layer | output, largest difference | gradients of input and every weight | experts without a token |",
        "| --- | --- | --- | --- |",
        *(f"| {name} | {y:.1e} | {gradient:.1e} | {empty} |" for name, y, gradient, empty in rows),
        "",
        f"The worst difference is {max(max(row[1], row[2]) for row in rows):.1e}; the bound is 1e-9. Gradients reach "
        "about 100 in size, so this is rounding and nothing else.",
        "",
    ]
    args.out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

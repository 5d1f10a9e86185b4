"""Routing: who is chosen, with which weight, and what is counted."""

import pytest
import torch
from torch import Tensor

from moekit.ops import reference
from moekit.ops.routing import (
    DROPPED,
    Routing,
    balanced_hash_table,
    limit_capacity,
    of_tokens,
    random_hash_table,
    route,
    route_by_hash,
    route_noisy,
    top_k,
)

GROUPS = {
    "ungrouped": {},
    "v2": {"n_group": 4, "topk_group": 2, "group_best": 1},
    "v3": {"n_group": 3, "topk_group": 2, "group_best": 2},
}


def logits(device: torch.device, tokens: int = 13, experts: int = 12) -> Tensor:
    return torch.randn(tokens, experts, dtype=torch.float64, device=device)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
def test_choice_equals_the_reference(
    device: torch.device, scoring_func: str, groups: dict[str, int], biased: bool
) -> None:
    x = logits(device)
    bias = torch.randn(12, device=device) if biased else None
    routing = route(x, 5, scoring_func=scoring_func, expert_bias=bias, **groups)
    assert routing.scores is not None
    chosen = reference.chosen_experts(routing.scores, 5, bias, **groups)
    assert routing.expert_ids.tolist() == chosen
    torch.testing.assert_close(routing.weights, routing.scores.gather(1, routing.expert_ids))


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_ties_go_to_the_lower_id(device: torch.device, groups: dict[str, int]) -> None:
    x = torch.randint(0, 2, (50, 96), device=device).double()  # short rows are sorted stably by any algorithm
    routing = route(x, 5, scoring_func="sigmoid", **groups)
    assert routing.scores is not None
    assert routing.expert_ids.tolist() == reference.chosen_experts(routing.scores, 5, **groups)
    equal = route(torch.zeros(3, 12, device=device), 4, **groups)
    assert equal.expert_ids.tolist() == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize("equal", [[], [3, 90], [0, 1, 2], [95]], ids=str)
@pytest.mark.parametrize("value", [2.0, -2.0, float("nan"), float("-inf")])
@pytest.mark.parametrize("k", [1, 5, 95, 96])
def test_the_k_largest_are_the_first_of_a_stable_sort(
    device: torch.device, k: int, value: float, equal: list[int]
) -> None:
    choice = torch.rand(50, 96, device=device)
    choice[7, equal] = value
    assert torch.equal(top_k(choice, k), choice.sort(dim=-1, descending=True, stable=True).indices[:, :k])
    assert top_k(choice[:0], k).shape == (0, k)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_raw_weights_are_affinities_and_softmax_sums_below_one(device: torch.device, scoring_func: str) -> None:
    x = logits(device)
    raw = route(x, 5, scoring_func=scoring_func)
    affinity = x.softmax(-1) if scoring_func == "softmax" else x.sigmoid()
    assert torch.equal(raw.weights, affinity.gather(1, raw.expert_ids))
    if scoring_func == "softmax":
        assert (raw.weights.sum(-1) < 1).all()
    scaled = route(x, 5, scoring_func=scoring_func, routed_scaling_factor=2.5)
    torch.testing.assert_close(scaled.weights, 2.5 * raw.weights)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
def test_renormalised_weights_sum_to_the_scaling_factor(device: torch.device, scoring_func: str) -> None:
    weights = route(
        logits(device), 5, scoring_func=scoring_func, norm_topk_prob=True, routed_scaling_factor=2.5
    ).weights
    torch.testing.assert_close(weights.sum(-1), torch.full_like(weights[:, 0], 2.5), rtol=0, atol=1e-14)


def test_renormalising_affinities_that_underflow_gives_no_nan(device: torch.device) -> None:
    routing = route(torch.full((2, 12), -200.0, device=device), 5, scoring_func="sigmoid", norm_topk_prob=True)
    assert routing.weights.isfinite().all()
    assert routing.score_sums is not None
    assert routing.score_sums.isfinite().all()


def test_bias_changes_the_choice_but_not_the_weights(device: torch.device) -> None:
    x, bias = logits(device), torch.zeros(12, device=device)
    bias[7] = 10
    plain, biased = route(x, 3, scoring_func="sigmoid"), route(x, 3, scoring_func="sigmoid", expert_bias=bias)
    assert (biased.expert_ids[:, 0] == 7).all()
    assert not (plain.expert_ids == 7).any(1).all()
    torch.testing.assert_close(biased.weights, x.sigmoid().gather(1, biased.expert_ids))
    everyone = route(x, 3, scoring_func="sigmoid", expert_bias=torch.full((12,), 3.0, device=device))
    assert torch.equal(everyone.expert_ids, plain.expert_ids)
    assert torch.equal(everyone.weights, plain.weights)


def test_bias_can_be_so_negative_that_groups_still_limit_the_choice(device: torch.device) -> None:
    # an excluded group masked to 0 instead of minus infinity would win against negative biased scores
    routing = route(
        logits(device), 4, scoring_func="sigmoid", expert_bias=torch.full((12,), -5.0, device=device), **GROUPS["v3"]
    )
    assert routing.scores is not None
    reached = (routing.expert_ids // 4).unique(dim=1)
    assert all(len(set(row)) <= 2 for row in reached.tolist())


def test_bf16_logits_are_routed_in_float32(device: torch.device) -> None:
    x = logits(device).bfloat16()
    low, high = route(x, 5), route(x.float(), 5)
    assert low.scores is not None
    assert high.scores is not None
    assert low.weights.dtype == low.scores.dtype == torch.float32
    assert torch.equal(low.weights, high.weights)
    assert torch.equal(low.expert_ids, high.expert_ids)


def test_weights_carry_the_reference_gradient(device: torch.device) -> None:
    x = logits(device).requires_grad_()
    probe = torch.randn(13, 5, dtype=torch.float64, device=device)
    routing = route(x, 5, norm_topk_prob=True, routed_scaling_factor=3.0)
    (gradient,) = torch.autograd.grad((routing.weights * probe).sum(), x)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for t, ids in enumerate(routing.expert_ids.tolist()):
        exps = [x[t, i].exp() for i in ids]
        total = total + sum(3.0 * e / sum(exps) * probe[t, n] for n, e in enumerate(exps))
    (expected,) = torch.autograd.grad(total, x)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize(("experts", "k"), [(1, 1), (12, 5), (16, 16), (37, 3), (160, 8)])
@pytest.mark.parametrize("used", [(0,), (1,), (2,), (3,), (0, 1, 2, 3)], ids=str)
def test_working_precision_gives_the_exact_routing_and_gradients(
    device: torch.device, scoring_func: str, norm_topk_prob: bool, experts: int, k: int, used: tuple[int, ...]
) -> None:
    exact = 3 * logits(device, tokens=3 * 70, experts=experts)
    bias = torch.randn(experts, device=device)
    found, gradients = [], []
    for x in (exact.float().requires_grad_(), exact.float().double().requires_grad_()):
        r = route(
            *(x, k),
            scoring_func=scoring_func,
            norm_topk_prob=norm_topk_prob,
            routed_scaling_factor=2.5,
            expert_bias=bias,
            sequences=3,
        )
        outputs = r.scores, r.weights, r.score_sums, r.squared_lse_sums
        found.append(r)
        torch.manual_seed(1)
        probes = [torch.randn(out.shape, dtype=torch.float64, device=device).to(x.dtype) for out in outputs]
        total = sum((outputs[n] * probes[n]).sum() for n in used)
        gradients.append(torch.autograd.grad(total, x)[0])
    for ours, theirs in zip(*found, strict=True):
        if ours.is_floating_point():
            torch.testing.assert_close(ours.double(), theirs, rtol=3e-6, atol=1e-7)  # measured worst: 8e-7
        else:
            assert torch.equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    scale = gradients[1].abs().max().clamp(min=1)
    assert (gradients[0].double() - gradients[1]).abs().max() <= 5e-6 * scale  # measured worst: 1e-6


def test_logits_out_of_range_are_routed_as_exactly(device: torch.device) -> None:
    x = torch.zeros(6, 20, device=device)
    x[0, :5], x[1, 7], x[2], x[3, 4], x[4, 2:4] = -torch.inf, 1e15, -1e15, torch.nan, 200
    for scoring_func in ("softmax", "sigmoid"):
        ours = route(x, 3, scoring_func=scoring_func, sequences=6)
        theirs = route(x.double(), 3, scoring_func=scoring_func, sequences=6)
        assert torch.equal(ours.expert_ids, theirs.expert_ids)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=3e-6, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("padded", [False, True])
def test_sums_per_sequence_equal_counting_by_hand(device: torch.device, groups: dict[str, int], padded: bool) -> None:
    x, n_group = logits(device, tokens=15), groups.get("n_group", 1)
    mask = torch.tensor([[1] * 5, [1, 1, 0, 0, 0], [0] * 5], device=device).bool().flatten() if padded else None
    r = route(x, 4, scoring_func="sigmoid", sequences=3, mask=mask, **groups)
    assert r.score_sums is not None
    assert r.squared_lse_sums is not None
    whole = route(x, 4, scoring_func="sigmoid", **groups)
    for s in range(3):
        real = [t for t in range(5 * s, 5 * s + 5) if mask is None or mask[t]]
        ids = whole.expert_ids[real]
        assert r.units[s] == len(real)
        assert r.tokens_per_expert[s].tolist() == [int((ids == e).sum()) for e in range(12)]
        reached = [int((ids // (12 // n_group) == g).any(1).sum()) for g in range(n_group)]
        assert r.tokens_per_group[s].tolist() == reached
        shares = x[real].sigmoid() / x[real].sigmoid().sum(-1, keepdim=True)
        torch.testing.assert_close(r.score_sums[s], shares.sum(0), rtol=0, atol=1e-12)
        torch.testing.assert_close(
            r.squared_lse_sums[s], x[real].exp().sum(-1).log().square().sum(), rtol=0, atol=1e-12
        )
    if mask is not None:
        assert (r.expert_ids[~mask] == DROPPED).all()
        assert (r.weights[~mask] == 0).all()


@pytest.mark.parametrize(("sequences", "length"), [(1, 0), (0, 5), (1, 1), (3, 0)])
@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
def test_no_token_and_one_token_are_routed(
    device: torch.device, sequences: int, length: int, groups: dict[str, int]
) -> None:
    mask = torch.ones(sequences * length, dtype=torch.bool, device=device)
    x = logits(device, tokens=sequences * length)
    r = route(x, 4, sequences=sequences, mask=mask, **groups)
    assert r.expert_ids.shape == (sequences * length, 4)
    assert r.tokens_per_expert.shape == (sequences, 12)
    assert r.tokens_per_expert.sum() == 4 * sequences * length
    assert r.units.tolist() == [length] * sequences
    hashed = route_by_hash(
        torch.zeros(sequences * length, dtype=torch.int64, device=device),
        torch.zeros(1, 1, dtype=torch.int64, device=device),
        12,
        sequences=sequences,
    )
    assert hashed.tokens_per_expert.sum() == sequences * length


def test_k_equal_to_experts_chooses_everyone_and_weights_sum_to_one(device: torch.device) -> None:
    routing = route(logits(device), 12)
    assert (routing.expert_ids.sort(1).values == torch.arange(12, device=device)).all()
    torch.testing.assert_close(routing.weights.sum(1), torch.ones(13, dtype=torch.float64, device=device))


# without the experts of highest score


@pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_choice_without_the_top_experts_equals_the_reference(
    device: torch.device, scoring_func: str, groups: dict[str, int], biased: bool, ties: bool
) -> None:
    x = torch.randint(0, 2, (40, 12), device=device).double() if ties else logits(device, tokens=40)
    bias = torch.randn(12, device=device) if biased else None
    for skipped in range(4):  # 2 of 4 groups of 3 hold 6 experts, so 3 can always be chosen of what is left
        routing = route(x, 3, scoring_func=scoring_func, expert_bias=bias, skip_top=skipped, **groups)
        assert routing.scores is not None
        expected = reference.chosen_experts(routing.scores, 3, bias, **groups, skip_top=skipped)
        assert routing.expert_ids.tolist() == expected
        assert torch.equal(routing.weights, routing.scores.gather(1, routing.expert_ids))


def test_without_its_first_n_a_token_has_the_next_k_at_their_raw_affinities(device: torch.device) -> None:
    x = logits(device)
    whole, rest = route(x, 12), route(x, 5, skip_top=4)
    assert torch.equal(rest.expert_ids, whole.expert_ids[:, 4:9])
    assert torch.equal(rest.weights, whole.weights[:, 4:9])
    assert torch.equal(rest.scores, whole.scores)
    assert torch.equal(rest.score_sums, whole.score_sums)
    assert rest.tokens_per_expert.sum() == 13 * 5


def test_a_softmax_over_the_rest_divides_by_what_the_rest_had(device: torch.device) -> None:
    x = logits(device)
    raw, anew = route(x, 5, skip_top=3), route(x, 5, skip_top=3, softmax_over_rest=True)
    assert torch.equal(anew.expert_ids, raw.expert_ids)
    left = 1 - route(x, 3).weights.sum(-1, keepdim=True)
    torch.testing.assert_close(anew.weights, raw.weights / left, rtol=0, atol=1e-14)
    everyone = route(x, 9, skip_top=3, softmax_over_rest=True)
    torch.testing.assert_close(everyone.weights.sum(1), torch.ones(13, dtype=torch.float64, device=device))


# capacity


def _chosen(ids: list[list[int]], weights: list[list[float]], experts: int, device: torch.device) -> Routing:
    tokens = torch.tensor(ids, device=device)
    counts = torch.tensor([[sum(row.count(e) for row in ids) for e in range(experts)]], device=device)
    units = torch.tensor([len(ids)], device=device)
    return Routing(tokens, torch.tensor(weights, device=device), None, counts, units[:, None], None, None, units)


def test_position_policy_keeps_first_tokens_and_first_choices_before_second_ones(device: torch.device) -> None:
    routing = _chosen([[0, 1], [1, 0], [0, 2]], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], 3, device)
    limited = limit_capacity(routing, 2, "position")
    # expert 0: first choices of tokens 0 and 2 come before the second choice of token 1
    assert limited.expert_ids.tolist() == [[0, 1], [1, DROPPED], [0, 2]]
    torch.testing.assert_close(limited.weights, torch.tensor([[0.1, 0.2], [0.3, 0.0], [0.5, 0.6]], device=device))
    one = limit_capacity(routing, 1, "position")
    assert one.expert_ids.tolist() == [[0, DROPPED], [1, DROPPED], [DROPPED, 2]]


def test_score_policy_keeps_the_highest_weights(device: torch.device) -> None:
    routing = _chosen([[0, 1], [1, 0], [0, 2]], [[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]], 3, device)
    limited = limit_capacity(routing, 2, "score")
    assert limited.expert_ids.tolist() == [[DROPPED, 1], [1, 0], [0, 2]]
    assert limit_capacity(routing, 1, "score").expert_ids.tolist() == [[DROPPED, DROPPED], [1, DROPPED], [0, 2]]


@pytest.mark.parametrize("policy", ["position", "score"])
def test_capacity_of_the_largest_load_drops_nothing_and_one_less_drops(device: torch.device, policy: str) -> None:
    routing = route(logits(device), 5)
    most = int(routing.tokens_per_expert.max())
    limited = limit_capacity(routing, most, policy)
    assert torch.equal(limited.expert_ids, routing.expert_ids)
    assert torch.equal(limited.weights, routing.weights)
    assert (limit_capacity(routing, most - 1, policy).expert_ids == DROPPED).any()
    assert (limit_capacity(routing, 0, policy).expert_ids == DROPPED).all()


@pytest.mark.parametrize("policy", ["position", "score"])
def test_padding_takes_no_capacity_and_demand_is_still_counted(device: torch.device, policy: str) -> None:
    x, mask = logits(device), torch.arange(13, device=device) >= 6
    masked = limit_capacity(route(x, 5, mask=mask), 3, policy)
    alone = limit_capacity(route(x[6:], 5), 3, policy)
    assert torch.equal(masked.expert_ids[6:], alone.expert_ids)
    assert torch.equal(masked.weights[6:], alone.weights)
    assert torch.equal(masked.tokens_per_expert, alone.tokens_per_expert)
    assert masked.tokens_per_expert.sum() == 7 * 5


# hash


def test_hash_is_a_function_of_the_token_id_with_weights_of_one_over_k(device: torch.device) -> None:
    table = random_hash_table(50, 8, 3, seed=1).to(device)
    ids = torch.tensor([7, 3, 7, 49, 7], device=device)
    r = route_by_hash(ids, table, 8, mask=torch.tensor([1, 1, 1, 1, 0], device=device).bool())
    assert torch.equal(r.expert_ids[:4], table[ids[:4]])
    assert torch.equal(r.expert_ids[0], r.expert_ids[2])
    assert (r.expert_ids[4] == DROPPED).all()
    torch.testing.assert_close(r.weights[:4], torch.full((4, 3), 1 / 3, device=device))
    assert r.tokens_per_expert.sum() == 12
    assert r.scores is None
    assert r.score_sums is None


def test_random_hash_gives_distinct_experts_reproducibly_and_differs_between_seeds() -> None:
    table = random_hash_table(50, 8, 3, seed=1)
    assert torch.equal(table, random_hash_table(50, 8, 3, seed=1))
    assert not torch.equal(table, random_hash_table(50, 8, 3, seed=2))
    assert all(len(set(row)) == 3 for row in table.tolist())
    assert set(table.flatten().tolist()) == set(range(8))


@pytest.mark.parametrize("k", [1, 3])
def test_balanced_hash_spreads_load_within_the_largest_single_count(k: int) -> None:
    counts = (1000 / torch.arange(1, 101)).long() * (torch.arange(100) % 7 > 0)  # Zipf, and tokens never seen
    table = balanced_hash_table(counts, 8, k)
    load = torch.zeros(8, dtype=torch.int64).index_add_(0, table.flatten(), counts.repeat_interleave(k))
    assert load.sum() == k * counts.sum()
    assert load.max() - load.min() <= counts.max()
    assert all(len(set(row)) == k for row in table.tolist())
    random = random_hash_table(100, 8, k, seed=0)
    naive = torch.zeros(8, dtype=torch.int64).index_add_(0, random.flatten(), counts.repeat_interleave(k))
    assert load.max() < naive.max()


def test_balanced_hash_spreads_tokens_that_were_never_seen() -> None:
    table = balanced_hash_table(torch.zeros(80, dtype=torch.int64), 8, 1)
    assert table.flatten().bincount(minlength=8).tolist() == [10] * 8


def noisy(k: int, seed: int = 3) -> tuple[Routing, Tensor, Tensor, Tensor]:
    """Returns the routing of 9 units, and the logits, the noisy logits and the noise's deviations behind it."""
    logits = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    std = (torch.rand(9, 7, dtype=torch.float64) + 0.1).requires_grad_()
    torch.manual_seed(seed)
    routing = route_noisy(logits, k, std)
    torch.manual_seed(seed)
    return routing, logits, logits + torch.randn_like(logits) * std, std


@pytest.mark.parametrize("k", [1, 3, 7])
def test_a_noisy_gate_takes_the_largest_noisy_logits_with_their_softmax(k: int) -> None:
    routing, _, drawn, _ = noisy(k)
    expected, ids = drawn.topk(k)
    assert routing.expert_ids.tolist() == ids.tolist()
    torch.testing.assert_close(routing.weights, expected.softmax(-1))


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_noisy_gates_scores_and_their_gradients_equal_the_reference(k: int) -> None:
    routing, logits, drawn, std = noisy(k)
    expected = reference.probability_of_choice(logits, drawn, std, k)
    torch.testing.assert_close(routing.scores, expected)
    weight = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad((s * weight).sum(), (logits, std)) for s in (routing.scores, expected))
    torch.testing.assert_close(ours, theirs)


def test_a_noisy_gate_without_noise_is_its_logits_and_scores_say_who_was_chosen() -> None:
    logits = torch.randn(6, 5)
    routing = route_noisy(logits, 2, sequences=2, mask=torch.tensor([True, True, False, True, True, True]))
    chosen = torch.zeros(6, 5).scatter(1, logits.topk(2).indices, 1)
    chosen[2] = 0  # padding
    torch.testing.assert_close(routing.scores, chosen)
    assert routing.tokens_per_expert.tolist() == chosen.unflatten(0, (2, 3)).sum(1).tolist()
    assert routing.units.tolist() == [2, 3]
    assert routing.weights[2].tolist() == [0, 0]


def test_equal_logits_are_told_apart_by_noise_alone() -> None:
    torch.manual_seed(0)
    routing = route_noisy(torch.zeros(4000, 8), 2, torch.ones(4000, 8))
    torch.testing.assert_close(routing.tokens_per_expert / 4000, torch.full((1, 8), 0.25), rtol=0, atol=0.03)


def test_tokens_of_a_routed_sequence_go_where_it_goes() -> None:
    by_sequence = route_noisy(torch.randn(3, 5), 2)
    mask = torch.arange(12) != 7
    routing = of_tokens(by_sequence, 4, mask)
    for token in range(12):
        expected = by_sequence.expert_ids[token // 4].tolist() if mask[token] else [DROPPED, DROPPED]
        assert routing.expert_ids[token].tolist() == expected
    assert routing.units.tolist() == [4, 3, 4]

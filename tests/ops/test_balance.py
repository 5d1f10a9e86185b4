"""Balance losses: their value where it is known, the reference elsewhere, and what must not count."""

import pytest
import torch
from torch import Tensor

from moekit.ops import balance, reference
from moekit.ops.balance import LoadSums, measure
from moekit.ops.routing import Routing, route, route_noisy

TIGHT = {"rtol": 0, "atol": 1e-12}


def logits(device: torch.device, tokens: int = 12, experts: int = 8) -> Tensor:
    return torch.randn(tokens, experts, dtype=torch.float64, device=device)


def uniform(device: torch.device, scale: float = 40.0) -> Routing:
    """Returns the routing of 8 tokens to 2 of 8 experts in 4 groups, every expert twice, every token in two groups."""
    x = torch.zeros(8, 8, dtype=torch.float64, device=device)
    for t in range(8):
        x[t, t] = x[t, (t + 2) % 8] = scale
    return route(x, 2, n_group=4, topk_group=4)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_every_loss_is_one_at_perfect_balance(device: torch.device, per_sequence: bool) -> None:
    routing = uniform(device)
    measured = measure(routing, per_sequence)
    torch.testing.assert_close(measured.load, torch.ones(1, 8, dtype=torch.float64, device=device))
    one = torch.ones((), dtype=torch.float64, device=device)
    torch.testing.assert_close(balance.expert_loss(measured), one, **TIGHT)
    torch.testing.assert_close(balance.device_loss(measured, 4), one, **TIGHT)
    torch.testing.assert_close(balance.communication_loss(measured, 2), one, **TIGHT)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_collapse_onto_k_of_n_experts_costs_n_over_k(device: torch.device, k: int) -> None:
    x = torch.zeros(5, 8, dtype=torch.float64, device=device)
    x[:, :k] = 60
    loss = balance.expert_loss(measure(route(x, k), per_sequence=True))
    torch.testing.assert_close(loss, torch.full_like(loss, 8 / k), **TIGHT)


def test_z_loss_equals_its_formula_and_ignores_padding(device: torch.device) -> None:
    x, mask = logits(device), torch.arange(12, device=device) < 7
    expected = torch.stack([row.exp().sum().log() ** 2 for row in x])
    torch.testing.assert_close(balance.z_loss(route(x, 2, sequences=3)), expected.mean(), **TIGHT)
    torch.testing.assert_close(balance.z_loss(route(x, 2, sequences=3, mask=mask)), expected[:7].mean(), **TIGHT)


@pytest.mark.parametrize("scoring_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("per_sequence", [False, True])
def test_expert_loss_and_its_gradient_equal_the_reference(
    device: torch.device, scoring_func: str, per_sequence: bool
) -> None:
    x = logits(device).requires_grad_()
    routing = route(x, 3, scoring_func=scoring_func, sequences=3)
    loss = balance.expert_loss(measure(routing, per_sequence))
    (gradient,) = torch.autograd.grad(loss, x)

    y = x.detach().cpu().requires_grad_()
    scores = y.softmax(-1) if scoring_func == "softmax" else y.sigmoid()
    chosen = reference.chosen_experts(scores.detach(), 3)
    parts = [range(0, 4), range(4, 8), range(8, 12)] if per_sequence else [range(12)]
    losses = [reference.expert_balance_loss(scores[list(p)], [chosen[t] for t in p]) for p in parts]
    expected = torch.stack(losses).mean()
    (expected_gradient,) = torch.autograd.grad(expected, y)
    torch.testing.assert_close(loss.detach().cpu(), expected.detach(), **TIGHT)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, **TIGHT)
    assert gradient.abs().max() > 1e-4


@pytest.mark.parametrize("name", ["device", "communication"])
def test_group_losses_and_their_gradients_equal_the_reference(device: torch.device, name: str) -> None:
    x = logits(device).requires_grad_()
    routing = route(x, 3, n_group=4, topk_group=2)
    measured = measure(routing, per_sequence=False)
    y = x.detach().cpu().requires_grad_()
    scores = y.softmax(-1)
    chosen = reference.chosen_experts(scores.detach(), 3, n_group=4, topk_group=2)
    if name == "device":
        loss, expected = balance.device_loss(measured, 4), reference.device_balance_loss(scores, chosen, 4)
    else:
        loss = balance.communication_loss(measured, 2)
        expected = reference.communication_balance_loss(scores, chosen, 4, 2)
    (gradient,), (expected_gradient,) = torch.autograd.grad(loss, x), torch.autograd.grad(expected, y)
    torch.testing.assert_close(loss.detach().cpu(), expected.detach(), **TIGHT)
    torch.testing.assert_close(gradient.cpu(), expected_gradient, **TIGHT)


@pytest.mark.parametrize("per_sequence", [False, True])
def test_padding_never_counts_in_any_loss(device: torch.device, per_sequence: bool) -> None:
    real, lengths = [logits(device, tokens=n) for n in (5, 2, 3)], (5, 2, 3)
    padded = logits(device, tokens=20)
    mask = torch.zeros(20, dtype=torch.bool, device=device)
    for s, x in enumerate(real):
        padded[5 * s : 5 * s + lengths[s]] = x
        mask[5 * s : 5 * s + lengths[s]] = True  # the fourth sequence is all padding
    options = {"scoring_func": "sigmoid", "n_group": 4, "topk_group": 2}

    def losses(routing: Routing) -> Tensor:
        measured = measure(routing, per_sequence)
        return torch.stack(
            (
                balance.expert_loss(measured),
                balance.device_loss(measured, 4),
                balance.communication_loss(measured, 2),
            )
        )

    together = losses(route(padded, 3, sequences=4, mask=mask, **options))
    if per_sequence:
        expected = torch.stack([losses(route(x, 3, **options)) for x in real]).mean(0)
    else:
        expected = losses(route(torch.cat(real), 3, **options))
    torch.testing.assert_close(together, expected, **TIGHT)
    padded[~mask] = 100 * padded[~mask]
    torch.testing.assert_close(losses(route(padded, 3, sequences=4, mask=mask, **options)), expected, **TIGHT)


def test_a_batch_of_padding_costs_nothing_and_is_no_nan(device: torch.device) -> None:
    x = logits(device).requires_grad_()
    mask = torch.zeros(12, dtype=torch.bool, device=device)
    for per_sequence in (False, True):
        routing = route(x, 3, sequences=3, n_group=4, topk_group=2, mask=mask)
        measured = measure(routing, per_sequence)
        total = balance.expert_loss(measured) + balance.device_loss(measured, 4) + balance.z_loss(routing)
        total = total + balance.communication_loss(measured, 2)
        (gradient,) = torch.autograd.grad(total, x)
        assert total == 0
        assert (gradient == 0).all()


def test_the_second_micro_batch_sees_the_load_of_both(device: torch.device) -> None:
    first, second = logits(device), logits(device, tokens=6)
    one, two = route(first, 3), route(second, 3, sequences=2)
    prior = LoadSums(one.tokens_per_expert.sum(0), one.units.sum())
    measured = measure(two, per_sequence=False, prior=prior)
    both = measure(route(torch.cat((first, second)), 3), per_sequence=False)
    torch.testing.assert_close(measured.load, both.load, **TIGHT)
    torch.testing.assert_close(measured.affinity, measure(two, per_sequence=False).affinity, **TIGHT)
    nothing = LoadSums(torch.zeros_like(prior.tokens_per_expert), torch.zeros_like(prior.units))
    torch.testing.assert_close(
        balance.expert_loss(measure(two, False, nothing)), balance.expert_loss(measure(two, False)), **TIGHT
    )


def test_sigmoid_affinities_are_normalised_per_token(device: torch.device) -> None:
    measured = measure(route(logits(device), 3, scoring_func="sigmoid", sequences=3), per_sequence=True)
    torch.testing.assert_close(measured.affinity.sum(-1), torch.ones(3, dtype=torch.float64, device=device))


def test_device_loss_with_one_expert_per_device_is_the_expert_loss(device: torch.device) -> None:
    measured = measure(route(logits(device), 3, sequences=3), per_sequence=True)
    torch.testing.assert_close(balance.device_loss(measured, 8), balance.expert_loss(measured), **TIGHT)


def test_device_loss_with_one_device_is_constant(device: torch.device) -> None:
    x = logits(device).requires_grad_()
    loss = balance.device_loss(measure(route(x, 3), per_sequence=False), 1)
    torch.testing.assert_close(loss, torch.ones_like(loss), **TIGHT)
    assert torch.autograd.grad(loss, x)[0].abs().max() < 1e-15


def test_load_carries_no_gradient_and_affinity_does(device: torch.device) -> None:
    measured = measure(route(logits(device).requires_grad_(), 3), per_sequence=False)
    assert not measured.load.requires_grad
    assert measured.affinity.requires_grad


def test_descending_the_expert_loss_evens_the_load(device: torch.device) -> None:
    x = logits(device, tokens=256) + torch.linspace(0, 2, 8, device=device)
    shift = torch.zeros(8, dtype=torch.float64, device=device, requires_grad=True)
    before = measure(route(x, 2), per_sequence=False).load
    for _ in range(60):
        (gradient,) = torch.autograd.grad(balance.expert_loss(measure(route(x + shift, 2), False)), shift)
        shift.data -= gradient
    after = measure(route(x + shift.detach(), 2), per_sequence=False).load
    assert after.std() < before.std() / 3  # measured: 0.79 to 0.00


def test_paper_form_times_k_equals_transformers_for_one_layer(device: torch.device) -> None:
    modeling = pytest.importorskip("transformers.models.qwen2_moe.modeling_qwen2_moe")
    x, mask = logits(device).float(), (torch.arange(12, device=device) % 4 < 3)
    ours = 3 * balance.expert_loss(measure(route(x, 3), per_sequence=False))
    torch.testing.assert_close(ours, modeling.load_balancing_loss_func((x,), 8, 3), rtol=1e-6, atol=0)
    ours = 3 * balance.expert_loss(measure(route(x, 3, mask=mask, sequences=3), per_sequence=False))
    theirs = modeling.load_balancing_loss_func((x,), 8, 3, attention_mask=mask.view(3, 4))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def test_bias_rises_where_under_loaded_falls_where_over_loaded_and_rests_at_the_mean(device: torch.device) -> None:
    bias = torch.tensor([0.5, 0.0, -0.25, 0.1], device=device)
    load = torch.tensor([4, 1, 7, 4], device=device)
    moved = balance.updated_bias(bias, load, 0.125)
    torch.testing.assert_close(moved - bias, torch.tensor([0.0, 0.125, -0.125, 0.0], device=device))
    assert moved.dtype == torch.float32
    large = torch.tensor([2**40, 2**40 + 1], device=device)  # one token in 10^12 is still seen
    assert (
        balance.updated_bias(torch.zeros(2, device=device), large, 1.0) == torch.tensor([1.0, -1.0], device=device)
    ).all()


def test_importance_and_load_are_zero_at_balance_and_largest_at_collapse() -> None:
    even = route_noisy(torch.eye(6) * 9, 1)
    collapsed = route_noisy(torch.tensor([[9.0, 0, 0, 0, 0, 0]]).repeat(6, 1), 1)
    for loss in (balance.importance_loss, balance.load_loss):
        assert float(loss(even)) < 1e-6
        torch.testing.assert_close(float(loss(collapsed)), 6.0)  # n / (n - 1) times n - 1, the variance over n - 1


def test_importance_and_load_equal_sums_over_units_and_padding_does_not_count() -> None:
    logits = torch.randn(9, 5, dtype=torch.float64)
    std = torch.rand(9, 5, dtype=torch.float64) + 0.2
    mask = torch.arange(9) < 7
    torch.manual_seed(1)
    routing = route_noisy(logits, 2, std, mask=mask)
    torch.manual_seed(1)
    drawn = logits + torch.randn_like(logits) * std
    importance = torch.zeros(5, dtype=torch.float64)
    for unit in range(7):
        for weight, expert in zip(drawn[unit].topk(2).values.softmax(-1), drawn[unit].topk(2).indices, strict=True):
            importance[expert] += weight
    load = reference.probability_of_choice(logits, drawn, std, 2)[:7].sum(0)
    for found, sums in ((balance.importance_loss(routing), importance), (balance.load_loss(routing), load)):
        torch.testing.assert_close(found, sums.var() / sums.mean() ** 2)


def test_one_expert_is_always_balanced() -> None:
    routing = route_noisy(torch.randn(4, 1), 1)
    assert float(balance.importance_loss(routing)) == float(balance.load_loss(routing)) == 0

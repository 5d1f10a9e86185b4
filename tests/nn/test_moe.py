"""The DeepSeekMoE layer: every way to route against the reference, and the identities that need none."""

import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.config import MoEConfig
from moekit.errors import ConfigError, UnsupportedError
from moekit.nn.ffn import SwiGLU
from moekit.nn.moe import MoE
from moekit.nn.router import Probe, RouterContext
from moekit.ops import reference
from moekit.ops.routing import DROPPED

DIM = 5
TIGHT = {"rtol": 0, "atol": 1e-11}
V3 = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "routed_scaling_factor": 2.5}
CASES: dict[str, dict[str, Any]] = {
    "softmax raw": {},
    "softmax renormalised and scaled": {"norm_topk_prob": True, "routed_scaling_factor": 1.7},
    "softmax scaled, no shared": {"routed_scaling_factor": 16.0, "n_shared_experts": 0},
    "sigmoid raw": {"scoring_func": "sigmoid"},
    "sigmoid renormalised": {"scoring_func": "sigmoid", "norm_topk_prob": True},
    "groups of V2": {"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2},
    "bias": V3,
    "bias with softmax": {"topk_method": "noaux_tc"},
    "groups of V3 with bias": {**V3, "n_group": 3, "topk_group": 2},
    "k is all": {"num_experts_per_tok": 9},
    "switch": {"num_experts_per_tok": 1, "n_shared_experts": 0},
    "an expert is empty": {"topk_method": "noaux_tc", "num_experts_per_tok": 2},
}
UNALTERED = Probe()
every_case = pytest.mark.parametrize("case", CASES)


def build(device: torch.device, dtype: torch.dtype = torch.float64, **settings: Any) -> MoE:
    base = {"n_routed_experts": 9, "n_shared_experts": 2, "num_experts_per_tok": 4, "moe_intermediate_size": 3}
    moe = MoE(MoEConfig.model_validate({**base, **settings}), DIM, vocab_size=11, layer=0).to(device, dtype)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return moe


def of_case(name: str, device: torch.device, dtype: torch.dtype = torch.float64) -> MoE:
    moe = build(device, dtype, **CASES[name])
    if moe.router.expert_bias is not None:
        moe.router.expert_bias.normal_(std=0.3)
        if name == "an expert is empty":
            moe.router.expert_bias[4] = -10
    return moe


def run(moe: MoE, x: Tensor, mask: Tensor | None = None, probe: Probe | None = None) -> Any:
    ids = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device).flatten()
    return moe(x, RouterContext(ids, len(x), None if mask is None else mask.flatten(), probe))


def slow(moe: MoE, x: Tensor, probe: Probe = UNALTERED) -> tuple[Tensor, list[Tensor]]:
    """Returns the reference on the CPU in float64, and its leaves in the order of `leaves`."""
    config, shared = moe.config, moe.shared_experts
    tensors = [t.detach().double().cpu().requires_grad_() for t in leaves(moe, x)]
    y, router, gate_up, down = tensors[:4]
    bias = moe.router.expert_bias
    out = reference.moe(
        y.flatten(0, 1),
        router,
        gate_up,
        down,
        torch.cat(tensors[4:6]) if shared is not None and probe.shared else None,
        tensors[6] if shared is not None and probe.shared else None,
        probe.num_experts_per_tok or config.num_experts_per_tok,
        config.scoring_func,
        config.norm_topk_prob,
        config.routed_scaling_factor,
        None if bias is None else bias.cpu(),
        config.n_group,
        config.topk_group,
        2 if config.topk_method == "noaux_tc" else 1,
        probe.skip_top,
        probe.softmax_over_rest,
    )
    return out.view(x.shape), tensors


def leaves(moe: MoE, x: Tensor) -> list[Tensor]:
    tensors = [x, moe.router.weight, moe.experts.gate_up_proj, moe.experts.down_proj]
    if moe.shared_experts is not None:
        tensors += [getattr(moe.shared_experts, name).weight for name in ("gate_proj", "up_proj", "down_proj")]
    return tensors


def compare(moe: MoE, x: Tensor, probe: Probe = UNALTERED) -> list[tuple[Tensor, Tensor]]:
    """Returns (ours, reference) for the output and every gradient."""
    y = run(moe, x, probe=probe).y
    expected, tensors = slow(moe, x, probe)
    back = torch.randn_like(y)
    ours = torch.autograd.grad(y, leaves(moe, x), back, materialize_grads=True)
    theirs = torch.autograd.grad(expected, tensors, back.double().cpu(), materialize_grads=True)
    pairs = zip((y.detach(), *ours), (expected.detach(), *theirs), strict=True)
    return [(a.double().cpu(), b) for a, b in pairs]


@every_case
@pytest.mark.parametrize("shape", [(2, 7), (1, 1)], ids=["2x7", "one token"])
def test_layer_equals_the_reference_with_every_gradient(
    device: torch.device, case: str, shape: tuple[int, int]
) -> None:
    moe = of_case(case, device)
    x = torch.randn(*shape, DIM, dtype=torch.float64, device=device, requires_grad=True)
    for ours, expected in compare(moe, x):
        torch.testing.assert_close(ours, expected, **TIGHT)
    counts = run(moe, x).routing.tokens_per_expert
    assert counts.sum() == x[..., 0].numel() * moe.config.num_experts_per_tok
    if case == "an expert is empty":
        assert (counts[:, 4] == 0).all()


@every_case
@pytest.mark.parametrize("shape", [(1, 0), (0, 3)], ids=["no token", "no sequence"])
def test_without_tokens_every_parameter_still_gets_a_zero_gradient(
    device: torch.device, case: str, shape: tuple[int, int]
) -> None:
    # a rank that has nothing to do must not leave the others waiting for its gradients
    moe = of_case(case, device)
    x = torch.randn(*shape, DIM, dtype=torch.float64, device=device, requires_grad=True)
    y = run(moe, x).y
    assert y.shape == x.shape
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(y.sum(), leaves(moe, x)))


@every_case
@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)],  # measured over the cases and ten seeds: 3e-6 and 3e-2
    ids=["float32", "bfloat16"],
)
def test_working_precisions_stay_within_rounding_of_the_reference(
    device: torch.device, case: str, dtype: torch.dtype, bound: float
) -> None:
    moe = of_case(case, device, dtype)
    x = torch.randn(2, 7, DIM, dtype=dtype, device=device, requires_grad=True)
    pairs = compare(moe, x)
    assert all((a - b).abs().max() < bound * b.abs().max().clamp(min=1e-6) for a, b in pairs if b.abs().max() > 0)


def test_autocast_computes_in_bf16_and_gives_float32_gradients(device: torch.device) -> None:
    moe = of_case("softmax raw", device, torch.float32)
    x = torch.randn(2, 7, DIM, device=device, requires_grad=True)
    with torch.autocast(device.type, torch.bfloat16):
        y, routing = run(moe, x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(routing.expert_ids, run(moe, x).routing.expert_ids)
    gradients = torch.autograd.grad(y.float().sum(), leaves(moe, x))
    assert all(gradient.dtype == torch.float32 for gradient in gradients)
    exact = torch.autograd.grad(run(moe, x).y.sum(), leaves(moe, x))
    assert all((a - b).abs().max() < 6e-2 * b.abs().max() for a, b in zip(gradients, exact, strict=True))


def test_non_contiguous_input_changes_nothing(device: torch.device) -> None:
    moe = of_case("groups of V3 with bias", device)
    x = torch.randn(7, 2, DIM, dtype=torch.float64, device=device).transpose(0, 1)
    torch.testing.assert_close(run(moe, x).y, run(moe, x.contiguous()).y, **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_are_equal_to_the_bit(device: torch.device, dtype: torch.dtype) -> None:
    moe = of_case("groups of V3 with bias", device, dtype)
    x = torch.randn(2, 30, DIM, dtype=dtype, device=device, requires_grad=True)

    def once() -> tuple[Tensor, ...]:
        y = run(moe, x).y
        return (y, *torch.autograd.grad(y.float().square().sum(), leaves(moe, x)))

    assert all(torch.equal(a, b) for a, b in zip(once(), once(), strict=True))


# limits


def dense(moe: MoE, x: Tensor, expert: int) -> Tensor:
    return reference.swiglu(x, moe.experts.gate_up_proj[expert], moe.experts.down_proj[expert])


def test_one_expert_equals_its_ffn(device: torch.device) -> None:
    moe = build(device, n_routed_experts=1, num_experts_per_tok=1, n_shared_experts=0)
    x = torch.randn(2, 3, DIM, dtype=torch.float64, device=device)
    torch.testing.assert_close(run(moe, x).y, dense(moe, x, 0), **TIGHT)


@pytest.mark.parametrize("k", [1, 2])
def test_without_shared_experts_it_is_switch_and_gshard(device: torch.device, k: int) -> None:
    moe = build(device, num_experts_per_tok=k, n_shared_experts=0)
    x = torch.randn(1, 6, DIM, dtype=torch.float64, device=device)
    s = (x @ moe.router.weight.T).softmax(-1)
    kept = s * (s >= s.topk(k).values[..., -1:])  # g = s if s is among the K largest, else 0
    expected = sum(kept[..., e, None] * dense(moe, x, e) for e in range(9))
    torch.testing.assert_close(run(moe, x).y, expected, **TIGHT)


@pytest.mark.parametrize("m", [1, 2, 6])
def test_an_ffn_cut_into_m_slices_that_are_all_chosen_with_weight_one_is_the_dense_ffn(
    device: torch.device, m: int
) -> None:
    ffn = SwiGLU(DIM, 12).to(device, torch.float64)
    moe = build(
        device,
        n_routed_experts=m,
        num_experts_per_tok=m,
        n_shared_experts=0,
        moe_intermediate_size=12 // m,
        routed_scaling_factor=float(m),
    )
    with torch.no_grad():
        moe.router.weight.zero_()  # every affinity is 1/m
        slices = [w.weight.unflatten(0, (m, -1)) for w in (ffn.gate_proj, ffn.up_proj)]
        moe.experts.gate_up_proj.copy_(torch.cat(slices, dim=1))
        moe.experts.down_proj.copy_(ffn.down_proj.weight.unflatten(1, (m, -1)).transpose(0, 1))
    x = torch.randn(2, 3, DIM, dtype=torch.float64, device=device)
    torch.testing.assert_close(run(moe, x).y, ffn(x), **TIGHT)


def test_sixteen_shared_experts_and_routed_ones_of_weight_zero_are_a_dense_ffn_sixteen_times_as_wide(
    device: torch.device,
) -> None:
    moe = build(device, n_shared_experts=16)
    torch.nn.init.zeros_(moe.experts.down_proj)
    ffn = SwiGLU(DIM, 16 * 3).to(device, torch.float64)
    assert moe.shared_experts is not None
    ffn.load_state_dict(moe.shared_experts.state_dict())
    x = torch.randn(2, 3, DIM, dtype=torch.float64, device=device)
    torch.testing.assert_close(run(moe, x).y, ffn(x), **TIGHT)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_merged_shared_experts_equal_the_sum_of_single_ones(device: torch.device, count: int) -> None:
    moe = build(device, n_shared_experts=count)
    torch.nn.init.zeros_(moe.experts.down_proj)
    shared = moe.shared_experts
    assert shared is not None
    x = torch.randn(2, 3, DIM, dtype=torch.float64, device=device)
    total = torch.zeros_like(x)
    for i in range(count):
        part = slice(3 * i, 3 * i + 3)
        gate_up = torch.cat((shared.gate_proj.weight[part], shared.up_proj.weight[part]))
        total = total + reference.swiglu(x, gate_up, shared.down_proj.weight[:, part])
    torch.testing.assert_close(run(moe, x).y, total, **TIGHT)


@pytest.mark.parametrize("width", [None, 4])
def test_a_shared_gate_weighs_the_shared_experts_by_its_sigmoid_and_nothing_else(
    device: torch.device, width: int | None
) -> None:
    gated = build(device, shared_expert_gate=True, shared_expert_intermediate_size=width)
    plain = build(device, shared_expert_intermediate_size=width)
    state = gated.state_dict()
    gate = state.pop("shared_expert_gate.weight")
    plain.load_state_dict(state)
    assert gated.shared_experts is not None
    assert gated.shared_experts.up_proj.weight.shape[0] == 2 * (width or 3)
    x = torch.randn(2, 7, DIM, dtype=torch.float64, device=device)
    shared, y = plain.shared_experts(x), run(plain, x).y
    torch.testing.assert_close(run(gated, x).y, y - shared + torch.sigmoid(x @ gate.T) * shared, **TIGHT)


def test_permuting_experts_together_with_their_router_rows_changes_nothing(device: torch.device) -> None:
    moe, other = of_case("bias", device), of_case("bias", device)
    order = torch.randperm(9, device=device)
    state = moe.state_dict()
    moved = ("router.weight", "router.expert_bias", "experts.gate_up_proj", "experts.down_proj")
    other.load_state_dict({name: t[order] if name in moved else t for name, t in state.items()})
    x = torch.randn(2, 7, DIM, dtype=torch.float64, device=device)
    a, b = run(moe, x), run(other, x)
    torch.testing.assert_close(a.y, b.y, **TIGHT)
    assert torch.equal(a.routing.tokens_per_expert[:, order], b.routing.tokens_per_expert)


def test_permuting_tokens_permutes_the_output(device: torch.device) -> None:
    moe, order = of_case("groups of V3 with bias", device), torch.randperm(14, device=device)
    x = torch.randn(1, 14, DIM, dtype=torch.float64, device=device)
    torch.testing.assert_close(run(moe, x[:, order]).y, run(moe, x).y[:, order], **TIGHT)


# padding and capacity


def test_padding_gets_the_shared_expert_only_and_changes_no_real_token(device: torch.device) -> None:
    moe = of_case("softmax raw", device)
    x = torch.randn(2, 7, DIM, dtype=torch.float64, device=device)
    mask = torch.arange(7, device=device) < torch.tensor([[7], [3]], device=device)
    assert moe.shared_experts is not None
    y, routing = run(moe, x, mask=mask)
    expected = torch.where(mask.unsqueeze(-1), run(moe, x).y, moe.shared_experts(x))
    torch.testing.assert_close(y, expected, **TIGHT)
    assert routing.tokens_per_expert.sum(1).tolist() == [28, 12]


@pytest.mark.parametrize("policy", ["position", "score"])
def test_enough_capacity_equals_dropless_exactly(device: torch.device, policy: str) -> None:
    moe = build(device, capacity_factor=9 / 4, drop_policy=policy).train()  # capacity is the number of tokens
    x = torch.randn(2, 7, DIM, dtype=torch.float64, device=device, requires_grad=True)
    for ours, expected in compare(moe, x):
        torch.testing.assert_close(ours, expected, **TIGHT)
    assert torch.equal(run(moe, x).y, run(moe.eval(), x).y)


@pytest.mark.parametrize("policy", ["position", "score"])
def test_over_capacity_choices_are_dropped_in_training_and_never_at_evaluation(
    device: torch.device, policy: str
) -> None:
    moe = build(device, capacity_factor=0.5, drop_policy=policy)
    x = torch.randn(2, 7, DIM, dtype=torch.float64, device=device, requires_grad=True)
    full = run(moe.eval(), x)
    assert not (full.routing.expert_ids == DROPPED).any()
    y, routing = run(moe.train(), x)
    capacity = math.ceil(0.5 * 4 * 14 / 9)
    kept = [int((routing.expert_ids == e).sum()) for e in range(9)]
    assert kept == [min(int(n), capacity) for n in full.routing.tokens_per_expert.sum(0)]
    assert torch.equal(routing.tokens_per_expert, full.routing.tokens_per_expert)  # the demand
    assert moe.shared_experts is not None
    tokens, expected = x.flatten(0, 1), moe.shared_experts(x).flatten(0, 1)
    for t, ids in enumerate(routing.expert_ids.tolist()):
        for n, e in enumerate(ids):
            if e != DROPPED:
                expected = expected + F.one_hot(torch.tensor(t), 14).to(x).unsqueeze(1) * (
                    full.routing.weights[t, n] * dense(moe, tokens[t], e)
                )
    torch.testing.assert_close(y.flatten(0, 1), expected, **TIGHT)
    ours, theirs = (torch.autograd.grad(z.square().sum(), leaves(moe, x), retain_graph=True) for z in (y, expected))
    torch.testing.assert_close(ours, theirs, **TIGHT)


def test_a_token_dropped_by_all_its_experts_gets_only_the_shared_one(device: torch.device) -> None:
    moe = build(device, num_experts_per_tok=1, capacity_factor=9 / 14).train()  # one token per expert
    x = torch.randn(1, 1, DIM, dtype=torch.float64, device=device).expand(1, 14, DIM)
    y, routing = run(moe, x)
    assert routing.expert_ids[1:].tolist() == [[DROPPED]] * 13
    assert moe.shared_experts is not None
    torch.testing.assert_close(y[:, 1:], moe.shared_experts(x)[:, 1:], **TIGHT)
    assert not torch.allclose(y[:, 0], moe.shared_experts(x)[:, 0])


def test_padding_takes_no_capacity(device: torch.device) -> None:
    moe = build(device, capacity_factor=1.0).train()
    x = torch.randn(1, 14, DIM, dtype=torch.float64, device=device)
    mask = (torch.arange(14, device=device) < 6).unsqueeze(0)
    torch.testing.assert_close(run(moe, x, mask=mask).y[:, :6], run(moe, x[:, :6]).y, **TIGHT)


# balance terms


def test_each_balance_term_is_its_factor_times_its_loss_and_absent_without_one(device: torch.device) -> None:
    groups = {"n_group": 3, "topk_group": 2, "topk_method": "group_limited_greedy", "num_experts_per_tok": 2}
    factors = {
        "aux_loss_alpha": 0.003,
        "device_aux_loss_alpha": 0.05,
        "comm_aux_loss_alpha": 0.02,
        "z_loss_alpha": 0.001,
    }
    moe = build(device, seq_aux=False, **groups, **factors)
    x = torch.randn(2, 9, DIM, dtype=torch.float64, device=device)
    logits = (x.flatten(0, 1) @ moe.router.weight.T).detach().cpu()
    scores = logits.softmax(-1)
    chosen = reference.chosen_experts(scores, 2, n_group=3, topk_group=2)
    losses = moe.balance_losses(run(moe, x).routing, None)
    expected = {
        "expert_balance": 0.003 * reference.expert_balance_loss(scores, chosen),
        "device_balance": 0.05 * reference.device_balance_loss(scores, chosen, 3),
        "communication_balance": 0.02 * reference.communication_balance_loss(scores, chosen, 3, 2),
        "router_z": 0.001 * logits.logsumexp(-1).square().mean(),
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss.detach().cpu(), expected[name], **TIGHT)
    for name, key in zip(factors, expected, strict=True):
        one = build(device, seq_aux=name == "z_loss_alpha", **groups, **{name: 0.5})
        assert one.balance_losses(run(one, x).routing, None).keys() == {key}


# probes

PROBES = {
    "one skipped": Probe(skip_top=1),
    "three skipped, two chosen": Probe(skip_top=3, num_experts_per_tok=2),
    "softmax over the rest": Probe(skip_top=2, softmax_over_rest=True),
    "one chosen": Probe(num_experts_per_tok=1),
    "more chosen than the model says": Probe(num_experts_per_tok=6),
    "no shared experts": Probe(shared=False),
    "a routed one for each shared": Probe(num_experts_per_tok=6, shared=False),
    "all at once": Probe(1, True, 5, shared=False),
}


@every_case
@pytest.mark.parametrize("probe", PROBES.values(), ids=PROBES.keys())
def test_a_probed_layer_equals_the_reference_with_every_gradient_or_says_why_not(
    device: torch.device, case: str, probe: Probe
) -> None:
    moe = of_case(case, device)
    x = torch.randn(2, 7, DIM, dtype=torch.float64, device=device, requires_grad=True)
    if refused := probe.refusal(moe.config):
        with pytest.raises(type(refused), match=re.escape(str(refused))):
            run(moe, x, probe=probe)
        return
    for ours, expected in compare(moe, x, probe):
        torch.testing.assert_close(ours, expected, **TIGHT)


def test_most_probes_of_most_layers_are_carried_out() -> None:
    done = [
        of_case(case, torch.device("cpu")).config for case in CASES for probe in PROBES.values()
        if probe.refusal(of_case(case, torch.device("cpu")).config) is None
    ]  # fmt: skip
    assert len(done) >= 0.6 * len(CASES) * len(PROBES)


def test_the_probe_that_alters_nothing_is_no_probe_to_the_bit(device: torch.device) -> None:
    moe, x = of_case("groups of V3 with bias", device, torch.float32), torch.randn(2, 7, DIM, device=device)
    plain, probed = run(moe, x), run(moe, x, probe=Probe())
    assert torch.equal(plain.y, probed.y)
    assert all(torch.equal(a, b) for a, b in zip(plain.routing, probed.routing, strict=True))


def test_without_shared_experts_their_gate_is_gone_too(device: torch.device) -> None:
    gated = build(device, shared_expert_gate=True)
    x = torch.randn(1, 5, DIM, dtype=torch.float64, device=device)
    tokens, shared = x.flatten(0, 1), gated.shared_experts(x.flatten(0, 1))
    lost = run(gated, x).y - run(gated, x, probe=Probe(shared=False)).y
    torch.testing.assert_close(lost[0], gated.shared_expert_gate(tokens).sigmoid() * shared, **TIGHT)


def test_padding_is_routed_nowhere_under_a_probe(device: torch.device) -> None:
    moe, mask = build(device), torch.tensor([[1, 1, 0]], device=device).bool()
    x = torch.randn(1, 3, DIM, dtype=torch.float64, device=device)
    routing = run(moe, x, mask, Probe(skip_top=2, num_experts_per_tok=3)).routing
    assert routing.expert_ids.shape == (3, 3)
    assert (routing.expert_ids[2] == DROPPED).all()
    assert routing.tokens_per_expert.sum() == 2 * 3


@pytest.mark.parametrize(
    ("settings", "probe", "kind", "message"),
    [
        (
            {},
            Probe(skip_top=6),
            ConfigError,
            "num_experts_per_tok is 4 but 3 of the 9 routed experts are left; probe.s",
        ),
        (
            {},
            Probe(num_experts_per_tok=10),
            ConfigError,
            "is 10 but 9 of the 9 routed experts are left; probe.skip_top",
        ),
        (CASES["groups of V2"], Probe(3), ConfigError, "is 4 but 3 of the 6 routed experts of topk_group 2 are left"),
        ({}, Probe(skip_top=-1), ConfigError, "probe.skip_top is -1 and num_experts_per_tok 4; allowed from 0 and"),
        ({}, Probe(num_experts_per_tok=0), ConfigError, "probe.skip_top is 0 and num_experts_per_tok 0; allowed fr"),
        ({"n_shared_experts": 0}, Probe(shared=False), ConfigError, "n_shared_experts is 0: there is nothing to take"),
        ({"topk_method": "hash"}, Probe(skip_top=1), UnsupportedError, "topk_method is hash: a table has no scores"),
        ({"topk_method": "hash"}, Probe(num_experts_per_tok=2), UnsupportedError, "topk_method is hash"),
        ({}, Probe(softmax_over_rest=True), ConfigError, "takes effect only with skip_top above 0"),
        ({"norm_topk_prob": True}, Probe(1, True), ConfigError, "norm_topk_prob false and scoring_func softmax"),
        ({"scoring_func": "sigmoid"}, Probe(1, True), ConfigError, "norm_topk_prob false and scoring_func softmax"),
    ],
)
def test_a_probe_that_cannot_be_carried_out_is_an_error_naming_the_numbers(
    device: torch.device, settings: dict[str, Any], probe: Probe, kind: type[Exception], message: str
) -> None:
    moe = build(device, **settings)
    with pytest.raises(kind, match=message):
        run(moe, torch.zeros(1, 2, DIM, dtype=torch.float64, device=device), probe=probe)


def test_hash_routing_can_lose_its_shared_experts(device: torch.device) -> None:
    moe, x = build(device, topk_method="hash"), torch.randn(1, 2, DIM, dtype=torch.float64, device=device)
    moe.router.reset()
    lost = run(moe, x).y - run(moe, x, probe=Probe(shared=False)).y
    torch.testing.assert_close(lost[0], moe.shared_experts(x[0]), **TIGHT)

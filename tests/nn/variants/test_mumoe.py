"""The muMoE layer: the merged network that it is, its gate, its start, and what its experts learn."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moekit.config import ModelConfig, MuMoEConfig
from moekit.nn.cache import KVCache
from moekit.nn.decoder import decoder
from moekit.nn.model import Model
from moekit.nn.router import RouterContext
from moekit.nn.variants.mumoe import Factorised, MuMoE
from moekit.ops import reference
from moekit.ops.factorised import joint
from moekit.ops.merge import merged_linear

Make = Callable[..., ModelConfig]
TIGHT = {"rtol": 0, "atol": 1e-12}  # measured: 1.4e-14
KINDS: dict[str, dict[str, Any]] = {
    "cp": {"factorization": "cp"},
    "tr": {"factorization": "tr", "expert_rank": 3},
    "cp, two levels": {"factorization": "cp", "second_level_experts": 3},
    "tr, two levels": {"factorization": "tr", "second_level_experts": 3, "expert_rank": 2},
}
DIM, WIDTH, TOKENS = 10, 14, 9
every_kind = pytest.mark.parametrize("ffn", KINDS.values(), ids=KINDS)


def settings(**ffn: Any) -> MuMoEConfig:
    return MuMoEConfig.model_validate({"intermediate_size": WIDTH, "n_routed_experts": 12, "rank": 8, **ffn})


def layer(device: torch.device, dtype: torch.dtype = torch.float64, **ffn: Any) -> MuMoE:
    """Returns a layer whose experts differ and whose gate tells tokens apart."""
    made = MuMoE(settings(**ffn), DIM)
    for weight in made.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return made.to(device, dtype)


def run(made: MuMoE, x: Tensor, mask: Tensor | None = None) -> Tensor:
    ids = torch.zeros(x.shape[:2].numel(), dtype=torch.int64, device=x.device)
    return made(x, RouterContext(ids, len(x), mask)).y


def matrices(made: MuMoE, name: str) -> tuple[Tensor, Tensor]:
    """Returns the experts' weights and biases."""
    built = made.experts[name].materialise()
    return built[..., :-1].contiguous(), built[..., -1]


@every_kind
def test_the_layer_is_the_feed_forward_network_merged_for_each_token(device: torch.device, ffn: dict[str, Any]) -> None:
    made = layer(device, **ffn)
    x = torch.randn(3, 3, DIM, dtype=torch.float64, device=device, requires_grad=True)
    mix = joint(made.gate(x.flatten(0, 1)))
    torch.testing.assert_close(mix.sum(1), torch.ones(TOKENS, dtype=torch.float64, device=device), **TIGHT)
    hidden = F.gelu(merged_linear(x.view(TOKENS, 1, DIM), mix, *matrices(made, "up_proj")))
    merged = merged_linear(hidden, mix, *matrices(made, "down_proj")).view(3, 3, DIM)
    y = run(made, x)
    torch.testing.assert_close(y, merged, **TIGHT)
    wanted = [x, *made.parameters()]
    d_y = torch.randn_like(x)
    pairs = zip(*(torch.autograd.grad(out, wanted, d_y) for out in (y, merged)), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, **TIGHT)
    each = torch.stack([F.gelu(x @ w.T + b) for w, b in zip(*matrices(made, "up_proj"), strict=True)])
    each = torch.stack([h @ w.T + b for h, w, b in zip(each, *matrices(made, "down_proj"), strict=True)])
    mixed = torch.einsum("tn,ntd->td", mix, each.flatten(1, 2)).view_as(y)
    assert (mixed - y).norm() > 0.1 * y.norm()  # mixing outputs is another function; measured: 0.18 to 1.8


@every_kind
def test_factorised_experts_equal_the_materialised_ones(device: torch.device, ffn: dict[str, Any]) -> None:
    made = layer(device, **ffn)
    x = torch.randn(TOKENS, DIM, dtype=torch.float64, device=device)
    gates = list(made.gate(x))
    for experts, width in ((made.experts["up_proj"], DIM), (made.experts["down_proj"], WIDTH)):
        built = experts.materialise()
        inputs = torch.randn(TOKENS, width, dtype=torch.float64, device=device)
        assert built.shape == (12, len(experts.output), width + 1)
        torch.testing.assert_close(experts(inputs, gates), reference.mixed_experts(inputs, gates, built), **TIGHT)


@every_kind
def test_a_fresh_gate_is_uniform_and_every_part_of_it_learns(device: torch.device, ffn: dict[str, Any]) -> None:
    made = MuMoE(settings(**ffn), DIM).to(device)
    made.reset_parameters()
    x = torch.randn(1, 64, DIM, device=device)
    for gate in made.gate(x[0]):
        assert len(gate.unique()) == 1
    run(made, x).square().sum().backward()
    for name, parameter in made.named_parameters():
        if "router" in name:
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1, name  # measured: at least 23


@pytest.mark.parametrize("factorization", ["cp", "tr"])
def test_the_papers_second_level_would_never_learn(device: torch.device, factorization: str) -> None:
    made = MuMoE(settings(factorization=factorization, second_level_experts=4), DIM).to(device)
    made.reset_parameters()
    with torch.no_grad():
        for experts in made.experts.values():
            experts.levels[1].copy_(experts.levels[1].sign())  # ones, or identity matrices
    optimizer = torch.optim.Adam(made.parameters(), 1e-2)
    x = torch.randn(1, 64, DIM, device=device)
    target = torch.randn_like(x)
    for _ in range(5):
        (run(made, x) - target).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert made.router[0].abs().max() > 0.01
    assert not made.router[1].any()  # four equal shares: nothing is rounded


@every_kind
def test_experts_start_as_copies_of_one_map_but_for_noise(device: torch.device, ffn: dict[str, Any]) -> None:
    torch.manual_seed(3)
    second = {"second_level_experts": 30} if "second_level_experts" in ffn else {}
    config = settings(**{**ffn, **second, "n_routed_experts": 900, "rank": 200})
    made = Factorised(config, 30, 50, 200)
    made.reset()
    ring = config.expert_rank
    for number, level in enumerate(made.levels):
        own = level if config.factorization == "cp" else level.view(-1, ring, ring).diagonal(dim1=1, dim2=2)
        assert own.mean().item() == pytest.approx(1, abs=0.1)
        assert own.std().item() == pytest.approx(0.1 if number else 1, rel=0.2)
        if config.factorization == "tr":
            assert level.count_nonzero() == own.numel()
    for factor, fan in ((made.input, 30), (made.output, made.output.shape[1])):
        assert factor.abs().max().item() == pytest.approx(fan**-0.5, rel=0.01)
        assert factor.std().item() == pytest.approx((3 * fan) ** -0.5, rel=0.03)


@every_kind
def test_no_token_changes_what_was_written_before_it(
    device: torch.device, tiny_config: Make, ffn: dict[str, Any]
) -> None:
    model = Model(tiny_config(ffn={"kind": "mumoe", "n_routed_experts": 12, **ffn})).to(device)
    for block in model.layers:
        for weight in block.mlp.router:
            torch.nn.init.normal_(weight)
    ids = torch.randint(61, (2, 12), device=device)
    other = ids.clone()
    other[:, 7] = (other[:, 7] + 1) % 61
    with torch.no_grad():
        for mode in (True, False):
            model.train(mode)
            before, after = model(ids).logits, model(other).logits
            assert torch.equal(before[:, :7], after[:, :7])
            assert not torch.equal(before[:, 7:], after[:, 7:])


def test_two_experts_under_layer_norm_are_a_hard_choice(device: torch.device) -> None:
    """Two normalised logits are 1 and -1, whatever they were, and entmax-1.5 leaves nothing to one that is 2 behind."""
    x = torch.randn(TOKENS, DIM, dtype=torch.float64, device=device)
    (gate,) = layer(device, n_routed_experts=2).gate(x)
    assert gate.amax(1).min() > 0.999
    (gate,) = layer(device, n_routed_experts=3).gate(x)
    assert gate.amax(1).min() < 0.9


def test_in_the_layer_itself_a_token_touches_no_other_and_with_batch_statistics_it_does(device: torch.device) -> None:
    x = torch.randn(1, TOKENS, DIM, dtype=torch.float64, device=device)
    other = x.clone()
    other[0, 5] += 1
    for norm, touched in (("layer", 1), ("batch", TOKENS)):
        made = layer(device, gate_norm=norm).train()
        changed = (run(made, x) != run(made, other)).any(-1)
        assert int(changed.sum()) == touched


def test_batch_statistics_are_torchs_over_real_tokens(device: torch.device) -> None:
    made, mask = layer(device, gate_norm="batch"), torch.arange(TOKENS, device=device) < 6
    assert made.statistics is not None
    (ours,), theirs = made.statistics, torch.nn.BatchNorm1d(12, affine=False).to(device, torch.float64)
    for _ in range(3):
        logits = torch.randn(TOKENS, 12, dtype=torch.float64, device=device)
        torch.testing.assert_close(ours.train()(logits, mask)[:6], theirs.train()(logits[:6]), **TIGHT)
        torch.testing.assert_close(ours.train()(logits, None), theirs.train()(logits), **TIGHT)
    torch.testing.assert_close(ours.eval()(logits, mask), theirs.eval()(logits), **TIGHT)
    before = ours.mean.clone()
    assert ours.train()(logits, ~mask & mask).isfinite().all()
    assert torch.equal(ours.mean, before)


@pytest.mark.parametrize("ffn", [*KINDS.values(), {"gate_norm": "batch"}], ids=[*KINDS, "batch"])
def test_recomputing_activations_changes_no_bit(device: torch.device, tiny_config: Make, ffn: dict[str, Any]) -> None:
    ids, ends = torch.randint(61, (2, 12), device=device), []
    for recompute in (False, True):
        torch.manual_seed(0)
        model = (
            Model(tiny_config(ffn={"kind": "mumoe", "n_routed_experts": 12, **ffn}, causal="gate_norm" not in ffn))
            .to(device)
            .train()
        )
        model.recompute = recompute
        out = model(ids, targets=ids)
        assert out.loss is not None
        out.loss.backward()
        ends.append([p.grad for p in model.parameters()] + list(model.buffers()))
    for plain, recomputed in zip(*ends, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("ffn", [*KINDS.values(), {"gate_norm": "batch"}], ids=[*KINDS, "batch"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token_are_fine(device: torch.device, ffn: dict[str, Any], tokens: int) -> None:
    made = layer(device, **ffn).train()
    x = torch.randn(1, tokens, DIM, dtype=torch.float64, device=device, requires_grad=True)
    y = run(made, x)
    y.sum().backward()
    assert y.shape == (1, tokens, DIM)
    assert y.isfinite().all()


@every_kind
def test_bfloat16_stays_close_and_the_gate_float32(device: torch.device, ffn: dict[str, Any]) -> None:
    made = layer(device, torch.float32, **ffn)
    x = torch.randn(2, 40, DIM, device=device)
    with torch.no_grad():
        exact, gates = run(made, x), made.gate(x.flatten(0, 1))
        with torch.autocast(device.type, torch.bfloat16):
            autocast, same = run(made, x), made.gate(x.flatten(0, 1))
        low = made.to(torch.bfloat16)
        outputs = [autocast, run(low, x.bfloat16())]
        assert low.gate(x.flatten(0, 1).bfloat16())[0].dtype == torch.float32
    assert all(map(torch.equal, gates, same))
    for y, bound in zip(outputs, (0.03, 0.06), strict=True):  # measured: 0.011 and 0.02 on five seeds
        assert y.dtype == torch.bfloat16
        assert ((y.float() - exact).norm() / exact.norm()).item() < bound


def test_a_normed_input_is_one_without_mean_and_of_one_size(device: torch.device) -> None:
    made = layer(device, input_norm=True)
    with torch.no_grad():
        made.router[0].fill_(0)
        x = torch.randn(1, TOKENS, DIM, dtype=torch.float64, device=device) * 40
        torch.testing.assert_close(run(made, 3 * x + 7), run(made, x), rtol=0, atol=1e-5)
        plain = MuMoE(settings(), DIM).to(device, torch.float64)
        plain.load_state_dict(made.state_dict())
        torch.testing.assert_close(run(plain, F.layer_norm(x, (DIM,))), run(made, x), **TIGHT)


@every_kind
def test_generation_over_a_cache_equals_one_pass(device: torch.device, tiny_config: Make, ffn: dict[str, Any]) -> None:
    model = Model(tiny_config(ffn={"kind": "mumoe", "n_routed_experts": 12, **ffn})).to(device, torch.float64).eval()
    ids = torch.randint(61, (2, 7), device=device)
    cache = KVCache(model.config, 2, 7, device=device, dtype=torch.float64)
    with torch.no_grad():
        steps = torch.cat([model(ids[:, t : t + 1], cache=cache).logits for t in range(7)], dim=1)
        torch.testing.assert_close(steps, model(ids).logits, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ffn", [{"kind": "mumoe"}, {"kind": "dense", "hidden_act": "gelu"}])
def test_there_is_no_native_step_for_it(tiny_config: Make, ffn: dict[str, Any]) -> None:
    model = Model(tiny_config(ffn=ffn)).eval()
    assert decoder(model, KVCache(model.config, 1, 8)) is None


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_experts_take_a_cluster_each_and_taking_one_away_hurts_its_own(seed: int) -> None:
    """Eight clusters at the corners of a cube, a linear map for each."""
    torch.manual_seed(seed)
    clusters, dim = 8, 6
    centres = F.pad(3 * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3))), (0, dim - 3))
    cluster = torch.arange(512) % clusters
    x = centres[cluster] + 0.5 * torch.randn(512, dim)
    y = torch.einsum("toi,ti->to", (torch.randn(clusters, dim, dim) / dim**0.5)[cluster], x)
    with_one = F.pad(x, (0, 1), value=1.0)
    linear = (with_one @ torch.linalg.lstsq(with_one, y).solution - y).square().mean()

    made = MuMoE(settings(n_routed_experts=clusters, intermediate_size=dim, rank=64), dim)
    made.reset_parameters()
    experts = made.experts["up_proj"]
    optimizer = torch.optim.Adam([*made.router, *experts.parameters()], 2e-2)
    for _ in range(300):
        loss = (experts(x, made.gate(x)) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1 * linear  # measured: 0.015 to 0.021 of it, seeds 0 to 3

    with torch.no_grad():
        (gate,) = made.gate(x)
        means = torch.stack([gate[cluster == c].mean(0) for c in range(clusters)])
        expert, own = means.amax(0).argmax(), means.amax(1).argmax()  # the surest choice of all
        without = gate.index_fill(1, expert, 0)
        rise = sum(sign * (experts(x, [one]) - y).square().mean(1) for sign, one in ((1, without), (-1, gate)))
        others = [rise[cluster == c].mean() for c in range(clusters) if c != own]
        assert rise[cluster == own].mean() > 5 * torch.stack(others).mean()  # measured: 49 to 233 times

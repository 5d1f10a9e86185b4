"""MEO: equal to the vanilla MoE of each linear map, blind to padding and to what comes later, and trainable."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moekit
from moekit.config import ModelConfig
from moekit.errors import ConfigError, UnsupportedError
from moekit.formats.verify import verify
from moekit.nn.cache import KVCache
from moekit.nn.model import Model
from moekit.nn.variants.meo import MEO, TokenBlock

Make = Callable[..., ModelConfig]
CAUSAL: list[dict[str, Any]] = [
    {"level": "task", "description_ids": [3, 1, 4]},
    {"level": "prefix", "segment_size": 5},
    {"level": "segment", "segment_size": 5},
    {"level": "token", "mode": "dispatch"},
    {"level": "task", "mode": "dispatch", "description_ids": [3, 1, 4]},
]
POOLED: list[dict[str, Any]] = [
    {"level": "sequence"},
    {"level": "token"},
    {"level": "sequence", "mode": "dispatch"},
]
TIGHT = {"rtol": 0, "atol": 1e-11}


def build(make: Make, device: torch.device, *, causal: bool, **ffn: Any) -> Model:
    """Returns a model whose gates have an opinion, whose biases and token blocks are not zero."""
    sizes = {"kind": "meo", "intermediate_size": 26, "n_routed_experts": 7, "num_experts_per_tok": 3}
    torch.manual_seed(4)
    model = Model(make(causal=causal, ffn=sizes | ffn)).to(device, torch.float64)
    for layer in layers(model):
        for linear in (layer.up_proj, layer.down_proj):
            nn.init.normal_(linear.gate.weight)
            nn.init.normal_(linear.bias)
            if linear.token_block is not None:
                nn.init.normal_(linear.token_block.up.weight)
    return model


def layers(model: Model) -> list[MEO]:
    return [module for module in model.modules() if isinstance(module, MEO)]


def tokens(device: torch.device, batch: int = 3, length: int = 17) -> Tensor:
    torch.manual_seed(7)
    return torch.randint(0, 61, (batch, length), device=device)


def gradients(model: Model, ids: Tensor, **options: Any) -> dict[str, Tensor]:
    out = model(ids, targets=ids, **options)
    (out.loss + sum(out.aux.values())).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("level", [{"level": "sequence"}, {"level": "task", "description_ids": [3, 1, 4]}])
def test_merging_equals_dispatching_where_tokens_share_a_gate_in_values_and_all_gradients(
    tiny_config: Make, device: torch.device, level: dict[str, Any]
) -> None:
    merge, vanilla = (build(tiny_config, device, causal=False, mode=mode, **level) for mode in ("merge", "dispatch"))
    vanilla.load_state_dict(merge.state_dict())
    ids = tokens(device)
    real = torch.arange(17, device=device) < torch.tensor([[17], [9], [1]], device=device)
    torch.testing.assert_close(
        merge.eval()(ids, padding_mask=real).logits[real], vanilla.eval()(ids, padding_mask=real).logits[real], **TIGHT
    )
    found = []
    for model in (merge, vanilla):
        torch.manual_seed(1)  # the same noise
        found.append(gradients(model.train(), ids, padding_mask=real))
    assert found[0].keys() == found[1].keys() == dict(merge.named_parameters()).keys()
    torch.testing.assert_close(*found, **TIGHT)


@pytest.mark.parametrize("ffn", CAUSAL, ids=str)
def test_a_causal_model_does_not_see_what_comes_later(
    tiny_config: Make, device: torch.device, ffn: dict[str, Any]
) -> None:
    model, ids = build(tiny_config, device, causal=True, **ffn).eval(), tokens(device)
    before = model(ids).logits
    for place in range(1, 17):
        changed = ids.clone()
        changed[:, place] = (ids[:, place] + 1) % 61
        after = model(changed).logits
        torch.testing.assert_close(after[:, :place], before[:, :place], **TIGHT)
        assert not torch.allclose(after[:, place], before[:, place])


@pytest.mark.parametrize("ffn", POOLED, ids=str)
def test_a_gate_that_pools_the_future_is_refused_of_a_causal_model_and_does_see_it(
    tiny_config: Make, device: torch.device, ffn: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"causal is true but ffn.level is .* use task, prefix or segment"):
        build(tiny_config, device, causal=True, **ffn)
    model, ids = build(tiny_config, device, causal=False, **ffn).eval(), tokens(device)
    (layer, *_), x = layers(model), torch.randn(2, 6, 18, dtype=torch.float64, device=device)
    units = moekit.nn.router.RouterContext(ids[:2, :6].flatten(), 2)
    changed = x.clone()
    changed[:, 5] += 1
    assert not torch.allclose(layer(x, units).y[:, 0], layer(changed, units).y[:, 0])


@pytest.mark.parametrize("ffn", [*CAUSAL, *POOLED], ids=str)
def test_padding_changes_nothing(tiny_config: Make, device: torch.device, ffn: dict[str, Any]) -> None:
    model = build(tiny_config, device, causal=ffn in CAUSAL, **ffn).eval()
    ids, lengths = tokens(device), (17, 9, 3)
    real = torch.arange(17, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    together = model(ids, padding_mask=real).logits
    other = model(ids.masked_fill(~real, 5), padding_mask=real).logits
    torch.testing.assert_close(together[real], other[real], **TIGHT)
    if model.config.causal:  # attention of both directions is tested with the encoders
        for row, length in enumerate(lengths):
            torch.testing.assert_close(
                together[row : row + 1, :length], model(ids[row : row + 1, :length]).logits, **TIGHT
            )


@pytest.mark.parametrize("ffn", CAUSAL, ids=str)
def test_tokens_that_come_in_pieces_are_routed_as_the_whole(
    tiny_config: Make, device: torch.device, ffn: dict[str, Any]
) -> None:
    model, ids = build(tiny_config, device, causal=True, **ffn).eval(), tokens(device)
    cache, lengths = KVCache(model.config, 3, 17, device, torch.float64), torch.tensor([8, 3, 6], device=device)
    with torch.no_grad():
        whole = model(ids).logits
        real = torch.arange(8, device=device) < lengths.unsqueeze(1)
        first = model(ids[:, :8], cache=cache, padding_mask=real).logits
        torch.testing.assert_close(first[real], whole[:, :8][real], **TIGHT)
        for step in range(9):
            at = (lengths + step).unsqueeze(1)
            one = model(ids.gather(1, at), cache=cache).logits
            torch.testing.assert_close(one, whole.gather(1, at.unsqueeze(-1).expand(-1, -1, 61)), **TIGHT)
        cache = KVCache(model.config, 3, 12, device, torch.float64)
        pieces = [model(ids[:, :4], cache=cache).logits, model(ids[:, 4:11], cache=cache).logits]
        cache.resize(17)
        cache.select(torch.tensor([2, 0], device=device))
        pieces = [piece[[2, 0]] for piece in pieces] + [model(ids[[2, 0], 11:], cache=cache).logits]
        torch.testing.assert_close(torch.cat(pieces, 1), whole[[2, 0]], **TIGHT)


def test_routing_cannot_forget(tiny_config: Make, device: torch.device) -> None:
    model = build(tiny_config, device, causal=True, level="segment", segment_size=5).eval()
    cache = KVCache(model.config, 3, 17, device, torch.float64)
    model(tokens(device), cache=cache)
    with pytest.raises(UnsupportedError, match="routes by what it has read"):
        cache.drop(1)


def test_before_the_first_segment_is_read_the_mean_expert_computes(tiny_config: Make, device: torch.device) -> None:
    model = build(tiny_config, device, causal=True, level="segment", segment_size=5).eval()
    (layer, *_), x = layers(model), torch.randn(1, 5, 18, dtype=torch.float64, device=device)
    up, down = layer.up_proj, layer.down_proj
    hidden = nn.functional.gelu(x @ up.weight.mean(0).T + up.bias.mean(0))
    expected = hidden @ down.weight.mean(0).T + down.bias.mean(0)
    y, routings = layer(x, moekit.nn.router.RouterContext(tokens(device, 1, 5).flatten(), 1))
    torch.testing.assert_close(y, expected, **TIGHT)
    assert [len(routing.weights) for routing in routings] == [0, 0]


def test_a_segment_is_routed_by_the_mean_of_the_one_before_and_the_rest_by_that_of_the_prefix(
    tiny_config: Make, device: torch.device
) -> None:
    x = torch.randn(2, 13, 18, dtype=torch.float64, device=device)
    for level, read in (("segment", [0, 1]), ("prefix", [0, 0])):
        model = build(tiny_config, device, causal=True, level=level, segment_size=5).eval()
        up = layers(model)[0].up_proj
        y, _ = up(x, moekit.nn.router.RouterContext(tokens(device, 2, 13).flatten(), 2))
        for row in range(2):
            for segment, source in enumerate(read, start=1):
                logits = x[row, source * 5 : source * 5 + 5].mean(0) @ up.gate.weight.T
                best = logits.topk(3)
                weights = best.values.softmax(-1)
                merged = sum(w * up.weight[e] for w, e in zip(weights, best.indices, strict=True))
                bias = sum(w * up.bias[e] for w, e in zip(weights, best.indices, strict=True))
                part = slice(segment * 5, segment * 5 + 5)
                torch.testing.assert_close(y[row, part], x[row, part] @ merged.T + bias, **TIGHT)


def test_gates_begin_at_zero_and_token_blocks_as_the_identity(tiny_config: Make, device: torch.device) -> None:
    ffn = {"kind": "meo", "intermediate_size": 26, "n_routed_experts": 7, "num_experts_per_tok": 3, "level": "token"}
    model = Model(tiny_config(causal=False, ffn=ffn)).to(device)
    for layer in layers(model):
        for linear in (layer.up_proj, layer.down_proj):
            assert not linear.gate.weight.any()
            assert not linear.gate.noise.any()
            assert not linear.bias.any()
            assert linear.token_block.down.weight.any()
            x = torch.randn(4, linear.weight.shape[2], device=device)
            assert torch.equal(linear.token_block(x), torch.zeros_like(x))


def test_a_token_block_looks_at_one_token(device: torch.device) -> None:
    block = TokenBlock(18, 4).to(device)
    nn.init.normal_(block.up.weight)
    x = torch.randn(3, 5, 18, device=device)
    hidden = torch.relu(x @ block.down.weight.T + block.down.bias)
    assert hidden.shape[-1] == 18 // 4
    torch.testing.assert_close(block(x), hidden @ block.up.weight.T + block.up.bias)
    torch.testing.assert_close(block(x)[1, 2], block(x[1, 2]))


def test_noise_is_drawn_while_training_only_and_balance_has_a_gradient_through_it(
    tiny_config: Make, device: torch.device
) -> None:
    model, ids = build(tiny_config, device, causal=False, level="sequence"), tokens(device)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).hidden, model(ids).hidden)
    sum(model(ids).aux.values()).backward()
    for layer in layers(model):
        assert layer.up_proj.gate.noise.grad.any()


def test_the_balance_loss_is_importance_and_load_of_every_gate(tiny_config: Make, device: torch.device) -> None:
    model, ids = build(tiny_config, device, causal=False, level="sequence", aux_loss_alpha=0.5).eval(), tokens(device)
    out = model(ids, targets=ids, return_routing=True)
    assert len(out.routing) == 4
    expected = 0.0
    for routing in out.routing:
        importance, load = torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
        for unit in range(3):
            for weight, expert in zip(routing.weights[unit], routing.expert_ids[unit].tolist(), strict=True):
                importance[expert] += float(weight.detach())
                load[expert] += 1
        expected += sum(float(sums.var() / sums.mean() ** 2) for sums in (importance, load))
    torch.testing.assert_close(float(out.aux["importance_and_load"].detach()), 0.5 * expected)


def test_a_task_is_asked_for_and_the_one_given_goes_before_the_models_own(
    tiny_config: Make, device: torch.device
) -> None:
    ids = tokens(device)
    without = build(tiny_config, device, causal=True, level="task").eval()
    with pytest.raises(ConfigError, match="no description was given"):
        without(ids)
    own = build(tiny_config, device, causal=True, level="task", description_ids=[3, 1, 4]).eval()
    own.load_state_dict(without.state_dict())
    given = torch.tensor([[3, 1, 4, -100]], device=device).expand(3, -1)
    torch.testing.assert_close(without(ids, task_ids=given).logits, own(ids).logits)
    other = own(ids, task_ids=torch.tensor([[9], [3], [9]], device=device)).logits
    assert not torch.allclose(other, own(ids).logits)
    with pytest.raises(ConfigError, match="no layer routes by task"):
        build(tiny_config, device, causal=True, level="segment", segment_size=5)(ids, task_ids=given)


@pytest.mark.parametrize("ffn", [*CAUSAL, *POOLED], ids=str)
def test_a_saved_model_computes_the_same_and_verifies(tiny_config: Make, tmp_path: Path, ffn: dict[str, Any]) -> None:
    cpu = torch.device("cpu")
    model, ids = build(tiny_config, cpu, causal=ffn in CAUSAL, **ffn).float().eval(), tokens(cpu)
    moekit.save(model, tmp_path / "model")
    checks = {check["name"]: check for check in verify(tmp_path / "model")["checks"]}
    assert all(check["held"] for name, check in checks.items() if "drawn" not in name), checks
    assert torch.equal(moekit.load(tmp_path / "model").eval()(ids).logits, model(ids).logits)


def test_recomputing_blocks_draws_the_same_noise(tiny_config: Make, device: torch.device) -> None:
    found = []
    for recompute in (False, True):
        model = build(tiny_config, device, causal=False, level="token").train()
        model.recompute = recompute
        torch.manual_seed(2)
        found.append(gradients(model, tokens(device)))
    torch.testing.assert_close(*found, **TIGHT)

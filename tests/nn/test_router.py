"""The routers: float32 in any model, a bias that only updates move, hash tables that only the id decides."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moekit.config import ModelConfig, MoEConfig
from moekit.errors import ConfigError
from moekit.nn.model import Model
from moekit.nn.router import HashRouter, Router, RouterContext
from moekit.ops.routing import Routing, route

Make = Callable[..., ModelConfig]


def learned(device: torch.device, **settings: object) -> Router:
    config = MoEConfig.model_validate(
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 4, **settings}
    )
    router = Router(config, 16).to(device)
    torch.nn.init.normal_(router.weight)
    return router


def run(router: Router, x: Tensor) -> Routing:
    routing: Routing = router(x, RouterContext(torch.zeros(len(x), dtype=torch.int64, device=x.device), 1))
    return routing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routing_is_float32_under_autocast_and_in_bf16_models(device: torch.device, dtype: torch.dtype) -> None:
    router, x = learned(device).to(dtype), torch.randn(50, 16, device=device, dtype=dtype)
    expected = route(x.float() @ router.weight.float().T, 3)
    with torch.autocast(device.type, torch.bfloat16):
        autocast = run(router, x)
    for routing in (run(router, x), autocast):
        assert routing.weights.dtype == torch.float32
        torch.testing.assert_close(routing.weights, expected.weights, rtol=2e-6, atol=1e-7)  # sums in another order
        assert torch.equal(routing.expert_ids, expected.expert_ids)


def test_bias_stays_float32_and_exact_when_the_model_changes_its_dtype(device: torch.device) -> None:
    router = learned(device, topk_method="noaux_tc")
    assert router.expert_bias is not None
    router.expert_bias.fill_(0.1234567)
    kept = router.expert_bias.clone()
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        router.to(dtype)
        assert router.weight.dtype == dtype
        assert router.expert_bias.dtype == torch.float32
        assert torch.equal(router.expert_bias, kept)
    assert router.to("meta").expert_bias is router.expert_bias  # moving still works, and keeps the buffer registered
    assert router.expert_bias.is_meta
    assert "expert_bias" in router.state_dict()


def test_the_bias_decides_who_is_chosen_in_the_module_too(device: torch.device) -> None:
    router = learned(device, topk_method="noaux_tc", scoring_func="sigmoid")
    assert router.expert_bias is not None
    x = torch.randn(20, 16, device=device)
    router.expert_bias[5] = 10
    routing = run(router, x)
    assert (routing.expert_ids[:, 0] == 5).all()
    torch.testing.assert_close(routing.weights[:, 0], (x @ router.weight[5]).sigmoid())
    assert not router.expert_bias.requires_grad


def test_bias_moves_once_per_update_and_not_in_forward_backward_or_recomputation(
    device: torch.device, tiny_config: Make
) -> None:
    ffn = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "bias_update_speed": 0.01, "aux_loss_alpha": 0.1}
    ids = torch.randint(0, 61, (3, 8), device=device)
    biases = []
    for recompute in (False, True):
        torch.manual_seed(1)
        model = Model(tiny_config(ffn=ffn)).to(device).train()
        model.recompute = recompute
        loads = [torch.zeros(7, dtype=torch.int64, device=device) for _ in model.moe_layers]
        for micro_batch in ids.split([1, 2]):
            out = model(micro_batch, labels=micro_batch, return_routing=True)
            assert out.loss is not None
            assert out.routing is not None
            (out.loss + sum(out.aux.values())).backward()
            loads = [load + r.tokens_per_expert.sum(0) for load, r in zip(loads, out.routing, strict=True)]
        assert all(load.sum() == 3 * 8 * 3 for load in loads)
        routers = [layer.router for layer in model.moe_layers]
        assert all((router.expert_bias == 0).all() for router in routers)
        model.update_expert_bias(loads)
        for router, load in zip(routers, loads, strict=True):
            expected = 0.01 * torch.sign(load.double().mean() - load).float()
            torch.testing.assert_close(router.expert_bias, expected)
        biases.append(torch.stack([router.expert_bias for router in routers]))
    assert torch.equal(*biases)


def test_layers_without_a_bias_are_passed_over(device: torch.device, tiny_config: Make) -> None:
    model = Model(tiny_config()).to(device)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.update_expert_bias([torch.arange(7, device=device)] * 2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# hash


def test_hash_depends_on_the_id_alone_and_differs_per_layer_reproducibly(
    device: torch.device, tiny_config: Make
) -> None:
    config = tiny_config(ffn={"topk_method": "hash", "num_experts_per_tok": 1})
    model, again = Model(config).to(device), Model(config).to(device)
    tables = [layer.router.table for layer in model.moe_layers]
    assert not torch.equal(*tables)
    assert all(torch.equal(a, b.router.table) for a, b in zip(tables, again.moe_layers, strict=True))
    ids = torch.tensor([[4, 9, 4, 4, 60]], device=device)
    routing = model(ids, return_routing=True).routing
    assert routing is not None
    for table, layer in zip(tables, routing, strict=True):
        assert torch.equal(layer.expert_ids, table[ids[0]])
        assert (layer.weights == 1).all()
    router = model.moe_layers[0].router
    a, b = (router(torch.randn(5, 18, device=device), RouterContext(ids[0], 1)) for _ in range(2))
    assert torch.equal(a.expert_ids, b.expert_ids)


def test_balanced_hash_without_counts_is_a_clear_error_and_works_with_them(
    device: torch.device, tiny_config: Make
) -> None:
    config = tiny_config(ffn={"topk_method": "hash", "hash_method": "balanced", "num_experts_per_tok": 1})
    model = Model(config).to(device)
    ids = torch.randint(0, 61, (1, 5), device=device)
    with pytest.raises(ConfigError, match="no token counts were given"):
        model(ids)
    with pytest.raises(ConfigError, match="token_counts has 60 entries but vocab_size is 61"):
        model.balance_hash(torch.ones(60, dtype=torch.int64))
    counts = torch.arange(61) ** 2
    model.balance_hash(counts)
    table = model.moe_layers[0].router.table.cpu().flatten()
    load = torch.zeros(7, dtype=torch.int64).index_add_(0, table, counts)
    assert load.max() - load.min() <= counts.max()
    loaded = Model(config).to(device)
    loaded.load_state_dict(model.state_dict())
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_table_made_without_storage_is_not_taken_for_a_filled_one() -> None:
    config = MoEConfig(n_routed_experts=4, num_experts_per_tok=1, moe_intermediate_size=4, topk_method="hash")
    with torch.device("meta"):
        router = HashRouter(config, 9, layer=0)
        router.reset()
    router.to_empty(device="cpu").table.fill_(-1)
    with pytest.raises(ConfigError):
        router(torch.zeros(1, 2), RouterContext(torch.zeros(1, dtype=torch.int64), 1))

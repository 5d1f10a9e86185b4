"""A layer in one call of our kernels: what its modules give one by one, with every gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekit.config import MHAConfig, MLAConfig, ModelConfig
from moekit.errors import ConfigError
from moekit.nn.attention import Attention, Context
from moekit.nn.cache import KVCache
from moekit.nn.ffn import SwiGLU
from moekit.nn.mla import MLA
from moekit.nn.rope import rotation
from moekit.nn.weights import QuantizedWeight
from moekit.ops import dispatch, layer
from moekit.ops.attention import Seen
from moekit.ops.attention import seen as visible
from moekit.ops.experts import mixed_experts
from moekit.ops.kernels import build
from moekit.ops.kernels import linear as kernels
from moekit.ops.quantize import quantize

DIM, BATCH, LENGTH = 48, 2, 37
MLA_SIZES: dict[str, Any] = {"kv_lora_rank": 40, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "multi-head": lambda: Attention(MHAConfig(num_attention_heads=4, num_key_value_heads=4, head_dim=12), DIM, 0, 1e-6),
    "grouped-query": lambda: Attention(
        MHAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16), DIM, 0, 1e-6
    ),
    "latent": lambda: MLA(MLAConfig(num_attention_heads=3, **MLA_SIZES), DIM, 0, 1e-5),
    "latent, compressed queries": lambda: MLA(
        MLAConfig(num_attention_heads=3, q_lora_rank=24, **MLA_SIZES), DIM, 0, 1e-5
    ),
    "swiglu": lambda: SwiGLU(DIM, 70),
}
SEEN = {
    "causal": Seen(),
    "documents": Seen(document_ids=torch.tensor([[0] * 20 + [1] * 17, [3] * 5 + [1] * 32])),
    "all": Seen(causal=False),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets our kernels take float32 on any machine."""
    if build.native().library is None:
        pytest.skip("there are no native kernels")
    monkeypatch.setattr(kernels, "native", lambda: build.native()._replace(wide_amd=True))


def made(name: str, dtype: str) -> nn.Module:
    if dtype != "float32" and not (build.native().bfloat16 and not build.native().amx):
        pytest.skip("torch multiplies bfloat16 on this machine")
    module = LAYERS[name]()
    for key, parameter in module.named_parameters():
        nn.init.normal_(parameter, mean=1 if "norm" in key else 0, std=0.2)
    return module.to(DTYPES[dtype])


def run(module: Any, x: Tensor, seen: Seen, dtype: str, cache: KVCache | None = None) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        if isinstance(module, SwiGLU):
            y: Tensor = module(x)
            return y
        dim = module.config.qk_rope_head_dim if isinstance(module, MLA) else module.config.head_dim
        positions = torch.arange(x.shape[1]).expand(x.shape[:2])
        if cache is not None:
            positions = cache.positions(*x.shape[:2])
            seen = visible(positions, cache.longest + x.shape[1])
        y = module(x, Context(rotation(module.config.rope, dim, positions), positions, seen, cache))
        return y


def apart(module: nn.Module) -> nn.Module:
    """Returns the module with a hook that nobody may pass over, so that each part of it is called."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            part.register_forward_hook(lambda *_: None)
    return module


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []

    def counting(name: str) -> Callable[..., Tensor]:
        before = getattr(layer, name)
        return lambda *arguments, **more: (calls.append(name), before(*arguments, **more))[1]  # type: ignore[func-returns-value]

    monkeypatch.setattr("moekit.nn.attention.attention_layer", counting("attention_layer"))
    monkeypatch.setattr("moekit.nn.mla.attention_layer", counting("attention_layer"))
    monkeypatch.setattr("moekit.nn.ffn.feed_forward", counting("feed_forward"))
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sees", SEEN)
@pytest.mark.parametrize("name", LAYERS)
def test_it_is_its_modules_one_by_one(name: str, sees: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = made(name, dtype), counted(monkeypatch)
    x, dy = torch.randn(BATCH, LENGTH, DIM).to(DTYPES[dtype]), torch.randn(BATCH, LENGTH, DIM)
    bound = 2e-5 if dtype == "float32" else 4e-2
    found: list[dict[str, Any]] = []
    with torch.no_grad():
        alone = run(module, x, SEEN[sees], dtype)
    for turn in range(2):
        module.zero_grad()
        inputs = x.clone().requires_grad_()
        y = run(module if turn == 0 else apart(module), inputs, SEEN[sees], dtype)
        y.backward(dy.to(y.dtype))
        found.append({"y": y.detach(), "x": inputs.grad} | {key: p.grad for key, p in module.named_parameters()})
    assert len(calls) == 2
    assert torch.equal(alone, found[0]["y"])
    for key, ours in found[0].items():
        theirs = found[1][key]
        assert ours.dtype == theirs.dtype, key
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max(), key


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(name: str) -> None:
    module, x, grads = made(name, "float32"), torch.randn(BATCH, LENGTH, DIM), []
    names = [key for key, _ in module.named_parameters()]
    for frozen in ((), names[::2], names[1::2], names):
        module.zero_grad()
        for key, parameter in module.named_parameters():
            parameter.requires_grad_(key not in frozen)
        inputs = x.clone().requires_grad_(frozen != ())
        run(module, inputs, Seen(), "float32").square().sum().backward()
        grads.append({key: p.grad for key, p in module.named_parameters()})
        assert all((grads[-1][key] is None) == (key in frozen) for key in names)
    for key in names:
        for other in grads[1:]:
            assert other[key] is None or torch.equal(other[key], grads[0][key])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LAYERS)
def test_threads_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, x, found = made(name, "float32"), torch.randn(BATCH, LENGTH, DIM), []
    for threads in (1, 2, 3, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        module.zero_grad()
        y = run(module, x, Seen(), "float32")
        y.square().sum().backward()
        found.append([y, *(p.grad for p in module.parameters())])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("codes", ["int8", "int4"])
@pytest.mark.parametrize("name", LAYERS)
def test_codes_are_read_as_they_lie(name: str, codes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = made(name, "float32"), counted(monkeypatch)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            coded = quantize(part.weight.detach(), codes)
            del part.weight
            part.weight = QuantizedWeight(coded)  # type: ignore[assignment]
    x = torch.randn(BATCH, LENGTH, DIM)
    with torch.no_grad():
        ours = run(module, x, Seen(), "float32")
        theirs = run(apart(module), x, Seen(), "float32")
    assert len(calls) == 1
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16], ids=["float32 kept", "bfloat16 kept"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "swiglu"])
def test_the_first_tokens_go_into_the_cache(
    name: str, dtype: str, kept: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the next, which see them, go on from there."""
    module, calls = made(name, dtype), counted(monkeypatch)
    assert isinstance(module, Attention | MLA)
    ffn = {"kind": "dense", "intermediate_size": 4}
    config = ModelConfig(vocab_size=5, hidden_size=DIM, num_hidden_layers=1, attention=module.config, ffn=ffn)
    x, found = torch.randn(BATCH, LENGTH + 3, DIM).to(DTYPES[dtype]), []
    alone = run(module, x[:, :LENGTH], Seen(), dtype)
    for turn in range(2):
        cache = KVCache(config, BATCH, LENGTH + 9, dtype=kept)
        cache.layer(0).fill_(7)
        parts = []
        with torch.no_grad():
            for part in x.split([LENGTH, 3], dim=1):
                parts.append(run(module if turn == 0 else apart(module), part, Seen(), dtype, cache))
                cache.advance(torch.full((BATCH,), part.shape[1]), part.shape[1])
        found.append((*parts, cache.layer(0)))
    assert calls == ["attention_layer"] * 2  # without a cache, and the first tokens with one
    assert torch.equal(found[0][0], alone)
    assert (found[0][2][:, LENGTH + 3 :] == 7).all()
    bound = 2e-5 if dtype == "float32" and kept == torch.float32 else 4e-2
    for ours, theirs in zip(*found, strict=True):
        assert (ours.float() - theirs.float()).abs().max() <= bound * theirs.float().abs().max()


@pytest.mark.parametrize(("batch", "length", "kv_heads"), [(1, LENGTH, 4), (BATCH, LENGTH - 1, 4), (BATCH, LENGTH, 2)])
def test_a_cache_of_another_shape_is_refused_and_not_written(batch: int, length: int, kv_heads: int) -> None:
    module = made("multi-head", "float32")
    assert isinstance(module, Attention)
    attention = module.config.model_copy(update={"num_key_value_heads": kv_heads})
    ffn = {"kind": "dense", "intermediate_size": 4}
    config = ModelConfig(vocab_size=5, hidden_size=DIM, num_hidden_layers=1, attention=attention, ffn=ffn)
    cache = KVCache(config, batch, length)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    context = Context(rotation(module.config.rope, 12, positions), positions, Seen(), cache)
    with torch.no_grad(), pytest.raises(ConfigError, match="cache of a layer is"):
        module(torch.randn(BATCH, LENGTH, DIM), context)
    assert not cache.layer(0).any()


def test_gradients_never_go_through_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    module, calls = made("multi-head", "float32"), counted(monkeypatch)
    assert isinstance(module, Attention)
    ffn = {"kind": "dense", "intermediate_size": 4}
    config = ModelConfig(vocab_size=5, hidden_size=DIM, num_hidden_layers=1, attention=module.config, ffn=ffn)
    x = torch.randn(BATCH, LENGTH, DIM, requires_grad=True)
    run(module, x, Seen(), "float32", KVCache(config, BATCH, LENGTH)).sum().backward()
    assert not calls
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_what_is_added_to_the_experts_is_added_and_has_its_gradient() -> None:
    tokens, experts, k, ff = 50, 6, 2, 20
    ids = torch.randint(experts, (tokens, k))
    ids[3, 1] = -1  # dropped
    plan = dispatch.plan(ids, experts)
    x, plus = torch.randn(tokens, DIM).requires_grad_(), torch.randn(tokens, DIM).requires_grad_()
    weights = torch.rand(tokens, k).requires_grad_()
    gate_up, down = torch.randn(experts, 2 * ff, DIM).requires_grad_(), torch.randn(experts, DIM, ff).requires_grad_()
    inputs, dy, found = (x, weights, gate_up, down, plus), torch.randn(tokens, DIM), []
    for backend in ("native", "reference"):
        y = mixed_experts(x, weights, plan, gate_up, down, backend, plus)
        found.append([y, *torch.autograd.grad(y, inputs, dy)])
    assert torch.equal(found[0][-1], dy)
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)

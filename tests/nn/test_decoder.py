"""The native decoding step equals the model's own forward, whatever the model of the kinds that it knows."""

import copy
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F

import moekit
from moekit.config import ModelConfig
from moekit.errors import ConfigError
from moekit.nn.cache import KVCache
from moekit.nn.decoder import decoder
from moekit.nn.linear import Linear
from moekit.nn.model import Model
from moekit.nn.quantized import dequantize_, matrices, quantize_
from moekit.nn.router import Router
from moekit.ops import reference
from moekit.ops.decode import unavailable
from moekit.ops.kernels.build import native

if reason := unavailable([], []):
    pytest.skip(reason, allow_module_level=True)

YARN = {"factor": 4, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.8}
V3: dict[str, Any] = {
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "bias_update_speed": 0.01,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
WIDE = {"num_attention_heads": 6, "kv_lora_rank": 37, "qk_nope_head_dim": 19, "qk_rope_head_dim": 6, "v_head_dim": 21}
"""More than one vector of everything and more heads than are taken at once, nothing a whole number of either."""
KINDS: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "dense, tied": {"ffn": {"kind": "dense"}, "tie_word_embeddings": True},
    "a dense layer first": {"ffn": {"first_k_dense_replace": 1, "intermediate_size": 22}},
    "no shared expert, renormalised": {"ffn": {"n_shared_experts": 0, "norm_topk_prob": True}},
    "one group of two": {"ffn": {"n_routed_experts": 8, "topk_method": "group_limited_greedy", "n_group": 2}},
    "V3's router": {"ffn": {**V3, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}},
    "YaRN": {"attention": {"rope": {"yarn": YARN}}},
    "Llama 3's rope": {"attention": {"rope": {"llama3": {"factor": 4, "original_max_position_embeddings": 16}}}},
    "every expert": {"ffn": {"num_experts_per_tok": 7}},
    "a wide shared expert, a dense layer last": {
        "ffn": {"shared_expert_intermediate_size": 26, "mlp_only_layers": [1], "intermediate_size": 22}
    },
    "biases of queries, keys and values": {"attention": {"attention_bias": "qkv"}},
    "all biases, heads normalised": {"attention": {"attention_bias": "all", "qk_norm": "head"}},
    "all heads normalised as one": {"attention": {"attention_bias": "qkv", "qk_norm": "full"}},
    "a gate of the shared experts, a dense layer": {
        "ffn": {"shared_expert_gate": True, "first_k_dense_replace": 1, "intermediate_size": 22}
    },
    "latent": {"attention": {"kind": "mla"}},
    "latent, biases": {"attention": {"kind": "mla", "attention_bias": True}},
    "latent, biases, compressed queries": {"attention": {"kind": "mla", "attention_bias": True, "q_lora_rank": 7}},
    "latent, compressed queries": {"attention": {"kind": "mla", "q_lora_rank": 7}},
    "latent, its own epsilon": {"attention": {"kind": "mla", "q_lora_rank": 7, "latent_norm_eps": 0.3}},
    "latent, YaRN": {"attention": {"kind": "mla", "q_lora_rank": 7, "rope": {"yarn": YARN}}},
    "latent, wide, tied": {"attention": {"kind": "mla", **WIDE}, "tie_word_embeddings": True},
}


def steps(
    model: Model, native: bool, batch: int = 3, new: int = 5, prepare: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """Returns the logits of `new` steps after prompts of different lengths; `prepare` is called before the steps."""
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, model.config.vocab_size, (batch, 4), generator=generator)
    lengths = torch.arange(batch) % 4 + 1
    cache = KVCache(model.config, batch, 4 + new, dtype=model.embed_tokens.weight.dtype)
    out = []
    with torch.no_grad():
        model(prompt, cache=cache, padding_mask=torch.arange(4) < lengths.unsqueeze(1))
        step = decoder(model, cache)
        assert step is not None
        prepare()
        for _ in range(new):
            ids = torch.randint(0, model.config.vocab_size, (batch,), generator=generator)
            if native:
                out.append(step.step(ids, cache.lengths))
                cache.advance(torch.ones_like(cache.lengths), 1)
            else:
                out.append(model(ids.unsqueeze(1), cache=cache).logits[:, 0])
    return torch.stack(out)


@pytest.mark.parametrize("batch", [1, 3, 9])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_a_native_step_equals_the_models(
    tiny_config: Callable[..., ModelConfig], kind: dict[str, Any], batch: int
) -> None:
    model = Model(tiny_config(**kind)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") or "norm" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    for layer in model.moe_layers:
        if layer.router.expert_bias is not None:
            layer.router.expert_bias.uniform_(-0.1, 0.1)
    slow, fast = (steps(model, native, batch, new=20) for native in (False, True))  # more keys than a vector has lanes
    assert (fast - slow).abs().max() < 1e-5 * slow.abs().max()  # measured 1e-6


GROUPS: dict[str, dict[str, Any]] = {
    "grouped queries": {"head_dim": 8},
    "latent": {"kind": "mla", "num_attention_heads": 4, "v_head_dim": 8},
    "latent, compressed queries": {"kind": "mla", "num_attention_heads": 4, "v_head_dim": 8, "q_lora_rank": 32},
}


def rounding(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every matrix that codes may hold read rounded activations, in the slow formulas."""

    def swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        gate, up = (reference.rounded(x) @ gate_up.T).chunk(2, dim=-1)
        return reference.rounded(F.silu(gate) * up) @ down.T

    monkeypatch.setattr(reference, "swiglu", swiglu)
    model.set_experts_backend("reference")
    for _, module, _ in matrices(model):
        if isinstance(module, Linear):
            module.register_forward_pre_hook(lambda _, inputs: (reference.rounded(inputs[0]),))


@pytest.mark.parametrize("attention", GROUPS.values(), ids=GROUPS.keys())
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 224])
def test_codes_give_what_their_numbers_give(
    tiny_config: Callable[..., ModelConfig],
    monkeypatch: pytest.MonkeyPatch,
    kind: Literal["int8", "int4"],
    dtype: torch.dtype,
    width: int,
    attention: dict[str, Any],
) -> None:
    """Widths are whole groups here, also more and fewer of them than are multiplied at once; others the model steps."""
    config = tiny_config(hidden_size=32, attention=attention, ffn={"moe_intermediate_size": width})
    model = Model(config).to(dtype).eval()
    quantize_(model, kind)
    fast = steps(model, native=True)
    dequantize_(model, torch.float32)
    plain = steps(model.float().eval(), native=False)
    # the mean: in bfloat16 a near tie of the router may fall the other way
    assert (fast - plain).abs().mean() < 0.07 * plain.abs().mean()  # measured 0.021 to 0.046
    if dtype == torch.float32:
        slow = steps(model, native=False, prepare=lambda: rounding(model, monkeypatch)) if native().rounds else plain
        # the median: by another order of sums a near tie of a rounding may fall the other way, which later steps see
        assert (fast - slow).abs().median() < 1e-5 * slow.abs().mean()  # measured 1e-6
        assert (fast - slow).abs().mean() < 3e-3 * slow.abs().mean()  # measured 1e-6, with a tie 4e-4
    odd = Model(tiny_config(attention={"kind": attention.get("kind", "mha")})).eval()
    quantize_(odd, kind)
    assert decoder(odd, KVCache(odd.config, 1, 8)) is None


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_is_not_finite_is_not_rounded_away(
    tiny_config: Callable[..., ModelConfig], kind: Literal["int8", "int4"], value: float
) -> None:
    model = Model(tiny_config(hidden_size=32, attention={"head_dim": 8}, ffn={"moe_intermediate_size": 64})).eval()
    quantize_(model, kind)
    found = steps(model, native=True, prepare=lambda: model.norm.weight.data[3:4].fill_(value))
    assert not found.isfinite().any()


@pytest.mark.parametrize("attention", [{}, {"kind": "mla"}, {"kind": "mla", "q_lora_rank": 7}])
@pytest.mark.parametrize(("hidden_size", "width"), [(12, 5), (76, 45), (64, 96)])
def test_in_bfloat16_it_is_no_further_from_float32_than_the_model_is(
    tiny_config: Callable[..., ModelConfig], hidden_size: int, width: int, attention: dict[str, Any]
) -> None:
    model = Model(
        tiny_config(hidden_size=hidden_size, attention=attention, ffn={"moe_intermediate_size": width})
    ).eval()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    exact = steps(model, native=False)
    model.bfloat16()
    slow, fast = ((steps(model, native).float() - exact).abs().mean() for native in (False, True))
    assert fast < 1.2 * slow  # measured 0.09 to 0.97


@pytest.mark.parametrize("attention", ["mha", "mla"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_gives_the_same_text_with_and_without(
    tiny_config: Callable[..., ModelConfig], temperature: float, attention: str
) -> None:
    model = Model(tiny_config(attention={"kind": attention})).eval()
    ids = torch.randint(0, model.config.vocab_size, (2, 5))
    fast = moekit.generate(model, ids, 12, temperature, seed=3)
    model.set_experts_backend("torch")
    assert torch.equal(fast, moekit.generate(model, ids, 12, temperature, seed=3))


@pytest.mark.parametrize(
    "kind",
    [
        {"ffn": {"topk_method": "hash", "hash_method": "random"}},
    ],
)
def test_other_models_take_the_step_themselves(tiny_config: Callable[..., ModelConfig], kind: dict[str, Any]) -> None:
    model = Model(tiny_config(**kind)).eval()
    assert decoder(model, KVCache(model.config, 1, 8)) is None


class Doubled(Linear):
    """What stands in a matrix's place, as an adapter does."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


@pytest.mark.parametrize("path", ["self_attn.o_proj", "self_attn.kv_b_proj", "mlp.shared_experts.up_proj"])
def test_what_is_hooked_or_replaced_is_called(tiny_config: Callable[..., ModelConfig], path: str) -> None:
    model = Model(tiny_config(attention={"kind": "mla"})).eval()
    ids, cache = torch.randint(0, model.config.vocab_size, (1, 9)), KVCache(model.config, 1, 16)
    parent, _, name = path.rpartition(".")
    of = model.layers[1].get_submodule(parent)
    hook = getattr(of, name).register_forward_hook(lambda *_: None)
    assert decoder(model, cache) is None
    hook.remove()
    assert decoder(model, cache) is not None
    other = Doubled(getattr(of, name).in_features, getattr(of, name).out_features)
    setattr(of, name, other)
    assert decoder(model, cache) is None
    text = moekit.generate(model, ids, 5, temperature=0.0)[0]
    with torch.no_grad():
        parts = [model(part, cache=cache).logits for part in text[None].split([9, 1, 1, 1, 1, 1], dim=1)]
        whole = model(text[None]).logits
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-5 * whole.abs().max()
    assert torch.equal(whole[0, 8:-1].argmax(-1), text[9:])


def biased(of: torch.nn.Module, name: str) -> None:
    """Replaces a matrix by one with a bias that no setting knows of."""
    before = getattr(of, name)
    setattr(of, name, other := Linear(before.in_features, before.out_features, bias=True))
    torch.nn.init.normal_(other.weight, std=0.3)
    torch.nn.init.normal_(other.bias)


def fewer_heads(attention: Any) -> None:
    """Takes a head of keys with its queries out of what is laid out by heads, as pruning does."""
    for name in ("q_proj", "o_proj"):
        weight = getattr(attention, name).weight
        weight.data = weight.data[: len(weight) // 2] if name == "q_proj" else weight.data[:, : weight.shape[1] // 2]


REPLACED: dict[str, tuple[dict[str, Any], Callable[[Any, Any], Any]]] = {
    "a bias of latent queries": ({"kind": "mla"}, lambda _, block: biased(block.self_attn, "q_proj")),
    "a bias of compressed queries": (
        {"kind": "mla", "q_lora_rank": 7},
        lambda _, block: biased(block.self_attn, "q_b_proj"),
    ),
    "a bias of latent keys": ({"kind": "mla"}, lambda _, block: biased(block.self_attn, "kv_b_proj")),
    "a bias of a gate": ({}, lambda _, block: biased(block.mlp.shared_experts, "gate_proj")),
    "a bias of a last matrix": ({}, lambda _, block: biased(block.mlp.shared_experts, "down_proj")),
    "a bias of the head": ({}, lambda model, _: biased(model, "lm_head")),
    "a norm's epsilon": ({}, lambda _, block: setattr(block.input_layernorm, "eps", 0.5)),
    "the last norm's epsilon": ({}, lambda model, _: setattr(model.norm, "eps", 0.5)),
    "a latent norm's epsilon": (
        {"kind": "mla", "q_lora_rank": 7},
        lambda _, block: setattr(block.self_attn.q_a_layernorm, "eps", 0.5),
    ),
    "attention's scale": ({}, lambda _, block: setattr(block.self_attn, "scale", 1.0)),
    "a router's settings": (
        {},
        lambda _, block: setattr(
            block.mlp.router, "config", block.mlp.config.model_copy(update={"routed_scaling_factor": 3.0})
        ),
    ),
    "fewer heads": ({"num_key_value_heads": 1}, lambda _, block: fewer_heads(block.self_attn)),
    "a longer head": (
        {},
        lambda model, _: setattr(model, "lm_head", Linear(model.config.hidden_size, model.config.vocab_size + 5)),
    ),
    "a bound of the embedding": ({}, lambda model, _: setattr(model.embed_tokens, "max_norm", 0.3)),
}


@pytest.mark.parametrize("what", REPLACED)
def test_what_no_setting_knows_of_takes_part(tiny_config: Callable[..., ModelConfig], what: str) -> None:
    """A part of the same class that has something of its own: a prompt and steps behind it are what modules give."""
    attention, change = REPLACED[what]
    model = Model(tiny_config(attention=attention)).eval()
    change(model, model.layers[1])
    ids, cache, found = torch.randint(0, model.config.vocab_size, (1, 9)), KVCache(model.config, 1, 16), []
    with torch.no_grad():
        for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:7], ids[:, 7:]):
            step = decoder(model, cache) if part.shape[1] == 1 else None
            if step is None:
                found.append(model(part, cache=cache).logits)
            else:
                found.append(step.step(part[:, 0], cache.lengths).unsqueeze(1))
                cache.advance(torch.ones_like(cache.lengths), 1)
        for module in model.modules():  # whoever has a hook is called
            module.register_forward_hook(lambda *_: None)
        whole = model(ids).logits
    assert (torch.cat(found, dim=1) - whole).abs().max() < 1e-5 * whole.abs().max()


@pytest.mark.parametrize(
    "attention",
    [
        {},
        {"attention_bias": "all", "qk_norm": "head"},
        {"attention_bias": "qkv", "qk_norm": "full"},
        {"kind": "mla", **WIDE},
        {"kind": "mla", "q_lora_rank": 7, "attention_bias": True},
    ],
)
def test_threads_share_the_work_whether_few_or_more_than_heads(
    tiny_config: Callable[..., ModelConfig], attention: dict[str, Any]
) -> None:
    model, found = Model(tiny_config(attention=attention)).eval(), []
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(steps(model, native=True))
    finally:
        torch.set_num_threads(1)
    for other in found[1:]:
        assert (other - found[0]).abs().max() < 1e-5 * found[0].abs().max()


def test_float64_is_not_for_it(tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config()).double().eval()
    assert decoder(model, KVCache(model.config, 1, 8, dtype=torch.float64)) is None


def test_blocks_in_another_order_keep_their_places_in_the_cache(tiny_config: Callable[..., ModelConfig]) -> None:
    """The cache is written by each block's number, which need not be where it stands."""
    model, ids = Model(tiny_config(num_hidden_layers=3)), torch.tensor([[3, 1, 4, 1, 5]])
    for change in (lambda: model.layers.insert(0, model.layers.pop(2)), lambda: model.layers.pop(1)):
        change()
        model.set_experts_backend("reference")
        wanted = moekit.generate(model, ids, max_new_tokens=12)
        model.set_experts_backend("auto")
        assert torch.equal(moekit.generate(model, ids, max_new_tokens=12), wanted)
        assert decoder(model, KVCache(model.config, 1, 20)) is None


def test_two_blocks_of_one_place_in_the_cache_are_refused(tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config())
    model.layers.append(copy.deepcopy(model.layers[1]))
    with pytest.raises(ConfigError, match=r"self_attn.layer are \[0, 1, 1\] and the cache has 2 layers"):
        moekit.generate(model, torch.tensor([[3, 1]]), max_new_tokens=2)
    assert model(torch.tensor([[3, 1]])).logits.shape == (1, 2, 61)
    model.layers[2].self_attn.layer = 2
    with pytest.raises(ConfigError, match=r"give config\.num_hidden_layers their number"):
        moekit.generate(model, torch.tensor([[3, 1]]), max_new_tokens=2)


def test_an_expert_whose_bias_is_nan_is_chosen_as_torch_does(tiny_config: Callable[..., ModelConfig]) -> None:
    model, ids = Model(tiny_config(ffn=V3)).eval(), torch.tensor([[3, 1, 4]])
    for router in (module for module in model.modules() if isinstance(module, Router)):
        router.expert_bias[3] = torch.nan
    cache = KVCache(model.config, 1, 8)
    with torch.no_grad():
        model(ids, cache=cache)
        step = decoder(model, cache)
        assert step is not None
        wanted = model(torch.cat((ids, torch.tensor([[1]])), 1)).logits[0, -1]
    torch.testing.assert_close(step.step(torch.tensor([1]), cache.lengths)[0], wanted, rtol=1e-4, atol=1e-4)

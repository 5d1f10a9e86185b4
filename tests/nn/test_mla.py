"""Multi-head latent attention: expanded against the equations, absorbed against expanded."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moekit.config import MLAConfig, ModelConfig, RopeConfig, YarnConfig
from moekit.nn.attention import Context
from moekit.nn.cache import KVCache
from moekit.nn.linear import Linear
from moekit.nn.mla import MLA
from moekit.nn.rope import Rotation, inverse_frequencies, magnitude
from moekit.ops import reference
from moekit.ops.attention import Seen, seen

TIGHT = {"rtol": 0, "atol": 1e-11}
YARN = YarnConfig(factor=8.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707)
SETTINGS: dict[str, dict[str, Any]] = {
    "full queries": {},
    "compressed queries": {"q_lora_rank": 7},
    "compressed queries and yarn": {"q_lora_rank": 7, "rope": RopeConfig(yarn=YARN)},
    "biases": {"attention_bias": True},
    "biases, compressed queries, another epsilon": {"attention_bias": True, "q_lora_rank": 7, "latent_norm_eps": 0.1},
}


def build(settings: dict[str, Any], device: torch.device) -> MLA:
    config = MLAConfig(
        num_attention_heads=3, kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, **settings
    )
    mla = MLA(config, 10, layer=0, eps=1e-6).to(device, torch.float64)
    for parameter in mla.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return mla


def context(mla: MLA, length: int, device: torch.device) -> Context:
    positions = torch.arange(length, device=device).unsqueeze(0)
    frequencies = torch.tensor(inverse_frequencies(mla.config.rope, 4), dtype=torch.float64, device=device)
    angles = positions.double().unsqueeze(-1) * frequencies
    return Context(Rotation(angles.cos(), angles.sin()), positions, Seen(), None)


def slow(mla: MLA, x: Tensor) -> Tensor:
    """Returns Eq. 9-19 of DeepSeek-V2, token by token and head by head."""
    c, rope = mla.config, mla.config.rope

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + (c.latent_norm_eps or 1e-6)).sqrt() * weight

    def project(linear: Linear, x: Tensor) -> Tensor:
        return x @ linear.weight.T + (0 if linear.bias is None else linear.bias)

    frequencies = inverse_frequencies(rope, c.qk_rope_head_dim)
    queries, keys, values = [], [], []
    for t, h in enumerate(x):
        if c.q_lora_rank is None:
            q = project(mla.q_proj, h)
        else:
            q = mla.q_b_proj.weight @ norm(project(mla.q_a_proj, h), mla.q_a_layernorm.weight)
        down = project(mla.kv_a_proj_with_mqa, h)
        latent, k_rope = norm(down[: c.kv_lora_rank], mla.kv_a_layernorm.weight), down[c.kv_lora_rank :]
        up = (mla.kv_b_proj.weight @ latent).unflatten(0, (c.num_attention_heads, -1))
        turned = reference.rotate(k_rope, t, frequencies, True)
        n = c.qk_nope_head_dim
        queries.append(
            torch.stack(
                [torch.cat((p[:n], reference.rotate(p[n:], t, frequencies, True))) for p in q.unflatten(0, (3, -1))]
            )
        )
        keys.append(torch.stack([torch.cat((head[:n], turned)) for head in up]))
        values.append(up[:, n:])
    scale = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5
    if rope.yarn is not None:
        scale *= magnitude(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2
    y = reference.attention(torch.stack(queries), torch.stack(keys), torch.stack(values), scale)
    return project(mla.o_proj, y.flatten(1))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
def test_expanded_attention_equals_the_equations_with_every_gradient(
    device: torch.device, settings: dict[str, Any]
) -> None:
    mla = build(settings, device)
    x = torch.randn(1, 6, 10, dtype=torch.float64, device=device, requires_grad=True)
    y, expected = mla(x, context(mla, 6, device)), slow(mla, x[0]).unsqueeze(0)
    torch.testing.assert_close(y, expected, **TIGHT)
    probe, leaves = torch.randn_like(y), (x, *mla.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(y, leaves, probe), torch.autograd.grad(expected, leaves, probe), **TIGHT
    )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
@pytest.mark.parametrize("expands", [False, True], ids=["absorbed", "expanded"])
@pytest.mark.parametrize("chunks", [[6], [1, 1, 1, 1, 1, 1], [3, 1, 2]])
def test_attention_on_kept_latents_equals_that_without_a_cache(
    device: torch.device, settings: dict[str, Any], chunks: list[int], expands: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mla = build(settings, device)
    monkeypatch.setattr(MLA, "_expands", lambda *_: expands)
    x = torch.randn(1, 6, 10, dtype=torch.float64, device=device)
    whole = context(mla, 6, device)
    expected = mla(x, whole)
    config = ModelConfig(
        vocab_size=5,
        hidden_size=10,
        num_hidden_layers=1,
        attention=mla.config,
        ffn={"kind": "dense", "intermediate_size": 4},
    )
    cache, start, parts = KVCache(config, 1, 6, device, torch.float64), 0, []
    for size in chunks:
        span = slice(start, start + size)
        turn = Rotation(whole.rotation.cos[:, span], whole.rotation.sin[:, span])
        positions = cache.positions(1, size)
        parts.append(mla(x[:, span], Context(turn, positions, seen(positions, start + size), cache)))
        cache.advance(torch.full_like(cache.lengths, size), size)
        start += size
    torch.testing.assert_close(torch.cat(parts, 1), expected, **TIGHT)
    # d_c + d_h^R numbers a token and layer, nothing else
    assert [layer.shape for layer in cache._layers] == [(1, 6, 8 + 4)]


def test_keys_are_expanded_where_that_is_fewer_operations() -> None:
    sizes = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
    mla = MLA(MLAConfig(num_attention_heads=1, **sizes), 16, 0, 1e-6)
    for length, keys in [(1, 2), (1, 4096), (100, 4096), (200, 4096), (16, 16), (16, 20), (16, 4096)]:
        expanded = keys * 512 * (128 + 128) + length * keys * (128 + 64 + 128)
        absorbed = length * 512 * (128 + 128) + length * keys * (512 + 64 + 512)
        assert mla._expands(1, keys, length) == (expanded < absorbed), (length, keys)
    assert mla._expands(60, 4096 + 200, 200)
    assert not mla._expands(70, 4096 + 200, 200)  # too many numbers at once


def test_only_the_down_projections_and_the_output_have_biases(device: torch.device) -> None:
    mla = build({"attention_bias": True, "q_lora_rank": 7}, device)
    biased = {name.removesuffix(".bias") for name, _ in mla.named_parameters() if name.endswith(".bias")}
    assert biased == {"q_a_proj", "kv_a_proj_with_mqa", "o_proj"}

"""Attention against the query-by-query reference, output and every gradient."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moekit.config import MHAConfig
from moekit.nn.attention import Attention, Context
from moekit.nn.rope import Rotation, inverse_frequencies
from moekit.ops import reference
from moekit.ops.attention import Seen, attention_mask

TIGHT = {"rtol": 0, "atol": 1e-11}
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biases of Qwen2": {"attention_bias": "qkv"},
    "norms of Qwen3 and all biases": {"attention_bias": "all", "qk_norm": "head"},
    "norms of OLMoE": {"qk_norm": "full"},
}
DOCUMENTS = [[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 1]]


def build(config: MHAConfig, device: torch.device) -> Attention:
    attention = Attention(config, 10, layer=0, eps=1e-6).to(device, torch.float64)
    for parameter in attention.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return attention


def slow(attention: Attention, x: Tensor, allowed: list[Tensor | None]) -> Tensor:
    config, outputs = attention.config, []
    frequencies = inverse_frequencies(config.rope, config.head_dim)
    for sequence, mask in zip(x, allowed, strict=True):

        def normed(x: Tensor, weight: Tensor) -> Tensor:
            return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

        def heads(name: str, sequence: Tensor = sequence) -> Tensor:
            project, norm = getattr(attention, f"{name}_proj"), getattr(attention, f"{name}_norm", None)
            rows = sequence @ project.weight.T + (0 if project.bias is None else project.bias)
            if config.qk_norm == "full" and norm is not None:
                rows = normed(rows, norm.weight)
            rows = rows.unflatten(-1, (-1, config.head_dim))
            if config.qk_norm == "head" and norm is not None:
                rows = normed(rows, norm.weight)
            if name == "v":
                return rows
            return torch.stack(
                [torch.stack([reference.rotate(h, t, frequencies, False) for h in row]) for t, row in enumerate(rows)]
            )

        y = reference.attention(heads("q"), heads("k"), heads("v"), config.head_dim**-0.5, mask).flatten(1)
        project = attention.o_proj
        outputs.append(y @ project.weight.T + (0 if project.bias is None else project.bias))
    return torch.stack(outputs)


@pytest.mark.parametrize("settings", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("documents", [False, True])
def test_attention_equals_the_reference_with_every_gradient(
    device: torch.device, kv_heads: int, documents: bool, settings: dict[str, Any]
) -> None:
    config = MHAConfig(num_attention_heads=4, num_key_value_heads=kv_heads, head_dim=6, **settings)
    attention = build(config, device)
    x = torch.randn(2, 7, 10, dtype=torch.float64, device=device, requires_grad=True)
    positions = torch.arange(7, device=device).expand(2, 7)
    angles = positions.double().unsqueeze(-1) * torch.tensor(
        inverse_frequencies(config.rope, 6), dtype=torch.float64, device=device
    )
    ids = torch.tensor(DOCUMENTS, device=device)
    visible = Seen(mask=attention_mask(positions, 7, ids)) if documents else Seen()
    allowed: list[Tensor | None] = [row[:, None] == row[None, :] for row in ids] if documents else [None, None]

    y = attention(x, Context(Rotation(angles.cos(), angles.sin()), positions, visible, None))
    expected = slow(attention, x, allowed)
    torch.testing.assert_close(y, expected, **TIGHT)
    probe, leaves = torch.randn_like(y), (x, *attention.parameters())
    ours, theirs = torch.autograd.grad(y, leaves, probe), torch.autograd.grad(expected, leaves, probe)
    torch.testing.assert_close(ours, theirs, **TIGHT)


def test_grouped_heads_equal_full_heads_with_repeated_keys_and_values(
    device: torch.device,
) -> None:
    grouped = build(MHAConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=6), device)
    full = build(MHAConfig(num_attention_heads=4, num_key_value_heads=4, head_dim=6), device)
    full.load_state_dict(
        {
            name: weight.unflatten(0, (2, 6)).repeat_interleave(2, 0).flatten(0, 1) if name[0] in "kv" else weight
            for name, weight in grouped.state_dict().items()
        }
    )
    x = torch.randn(1, 5, 10, dtype=torch.float64, device=device)
    positions = torch.arange(5, device=device).unsqueeze(0)
    angles = positions.unsqueeze(-1) * torch.ones(3, dtype=torch.float64, device=device)
    context = Context(Rotation(angles.cos(), angles.sin()), positions, Seen(), None)
    torch.testing.assert_close(grouped(x, context), full(x, context), **TIGHT)

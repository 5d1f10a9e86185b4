"""Generation with the cache equals the plain forward pass, whatever the chunks and the lengths."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moekit.config import ModelConfig
from moekit.errors import ConfigError
from moekit.nn.cache import KVCache
from moekit.nn.model import Model

YARN = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 0.5}
ATTENTION: dict[str, dict[str, Any]] = {
    "gqa": {"kind": "mha"},
    "mha with yarn": {"kind": "mha", "num_key_value_heads": 4, "rope": {"yarn": YARN}},
    "mha with biases and norms": {"kind": "mha", "attention_bias": "all", "qk_norm": "full"},
    "mla": {"kind": "mla"},
    "mla with biases": {"kind": "mla", "attention_bias": True, "latent_norm_eps": 0.01},
    "mla with compressed queries and yarn": {"kind": "mla", "q_lora_rank": 7, "rope": {"yarn": YARN}},
}
every_attention = pytest.mark.parametrize("attention", ATTENTION.values(), ids=ATTENTION.keys())


def build(tiny_config: Callable[..., ModelConfig], attention: dict[str, Any], device: torch.device) -> Model:
    model = Model(tiny_config(attention=attention)).to(device, torch.float64).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    return model


def close(ours: Tensor | None, expected: Tensor | None) -> None:
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-10)


@every_attention
@pytest.mark.parametrize("chunks", [[1] * 9, [4, 1, 3, 1], [9]], ids=["token by token", "chunks", "at once"])
@torch.no_grad()
def test_cached_logits_equal_uncached(
    device: torch.device, tiny_config: Callable[..., ModelConfig], attention: dict[str, Any], chunks: list[int]
) -> None:
    model = build(tiny_config, attention, device)
    ids = torch.randint(0, 61, (2, 9), device=device)
    cache = KVCache(model.config, 2, 9, device, torch.float64)
    parts = [model(part, cache=cache).logits for part in ids.split(chunks, dim=1)]
    close(torch.cat(parts, dim=1), model(ids).logits)
    assert cache.lengths.tolist() == [9, 9]


@every_attention
@torch.no_grad()
def test_sequences_of_different_lengths_share_a_batch(
    device: torch.device, tiny_config: Callable[..., ModelConfig], attention: dict[str, Any]
) -> None:
    model, lengths = build(tiny_config, attention, device), [5, 2, 7]
    ids = torch.randint(0, 61, (3, 11), device=device)
    cache = KVCache(model.config, 3, 20, device, torch.float64)
    mask = torch.arange(7, device=device) < torch.tensor(lengths, device=device).unsqueeze(1)
    prompt = model(ids[:, :7].where(mask, 60), cache=cache, padding_mask=mask).logits
    alone = [model(row[: n + 4].unsqueeze(0)).logits for row, n in zip(ids, lengths, strict=True)]
    for s, n in enumerate(lengths):
        close(prompt[s, :n], alone[s][0, :n])
    assert cache.lengths.tolist() == lengths
    for step in range(4):
        new = torch.stack([ids[s, n + step] for s, n in enumerate(lengths)]).unsqueeze(1)
        logits = model(new, cache=cache).logits
        for s, n in enumerate(lengths):
            close(logits[s, 0], alone[s][0, n + step])
    assert cache.lengths.tolist() == [n + 4 for n in lengths]


@every_attention
@torch.no_grad()
def test_a_sequence_may_pause_while_others_go_on(
    device: torch.device, tiny_config: Callable[..., ModelConfig], attention: dict[str, Any]
) -> None:
    model = build(tiny_config, attention, device)
    ids = torch.randint(0, 61, (2, 8), device=device)
    cache = KVCache(model.config, 2, 12, device, torch.float64)
    model(ids[:, :3], cache=cache)
    for t in (3, 4):  # the second sequence gets only padding
        mask = torch.tensor([[True], [False]], device=device)
        model(ids[:, t : t + 1], cache=cache, padding_mask=mask)
    new = torch.stack((ids[0, 5:7], ids[1, 3:5]))
    logits = model(new, cache=cache).logits
    expected = model(ids).logits
    close(logits[0], expected[0, 5:7])
    close(logits[1], expected[1, 3:5])


@torch.no_grad()
def test_cache_that_is_too_short_and_context_that_is_too_long_are_refused(
    device: torch.device, tiny_config: Callable[..., ModelConfig]
) -> None:
    model = Model(tiny_config(max_position_embeddings=8)).to(device).eval()
    ids = torch.zeros(1, 6, dtype=torch.int64, device=device)
    cache = KVCache(model.config, 1, 7, device)
    model(ids, cache=cache)
    with pytest.raises(ConfigError, match="holds 7 tokens per sequence but 8 are asked for"):
        model(ids[:, :2], cache=cache)
    with pytest.raises(ConfigError, match="has 9 tokens but max_position_embeddings is 8"):
        model(ids[:, :3], cache=cache)
    assert cache.lengths.tolist() == [6]
    model(ids[:, :1], cache=cache)


def test_documents_with_a_cache_are_refused(device: torch.device, tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config()).to(device)
    ids = torch.zeros(1, 3, dtype=torch.int64, device=device)
    with pytest.raises(ConfigError, match="document_ids cannot be used with a cache"):
        model(ids, cache=KVCache(model.config, 1, 8, device), document_ids=ids)


@pytest.mark.parametrize("attention", [{"kind": "mha"}, {"kind": "mla"}], ids=["gqa", "mla"])
def test_buffers_take_the_bytes_that_the_configuration_counts(
    device: torch.device, tiny_config: Callable[..., ModelConfig], attention: dict[str, Any]
) -> None:
    config = tiny_config(attention=attention)
    cache = KVCache(config, 3, 5, device, torch.bfloat16)
    held = sum(layer.numel() * layer.element_size() for layer in cache._layers)
    assert held == 3 * 5 * config.kv_cache_bytes_per_token()


@every_attention
@torch.no_grad()
def test_a_cache_that_was_made_longer_shortened_and_reordered_goes_on_right(
    device: torch.device, tiny_config: Callable[..., ModelConfig], attention: dict[str, Any]
) -> None:
    model = build(tiny_config, attention, device)
    ids = torch.randint(0, 61, (2, 9), device=device)
    cache = KVCache(model.config, 2, 6, device, torch.float64)
    model(ids[:, :6], cache=cache)
    cache.resize(12)
    cache.resize(10)
    assert [(layer.shape[:2], layer.is_contiguous()) for layer in cache._layers] == [((2, 10), True)] * 2
    cache.drop(2)
    rows = torch.tensor([1, 0, 1], device=device)
    cache.select(rows)
    close(model(ids[rows, 4:], cache=cache).logits, model(ids[rows]).logits[:, 4:])
    assert cache.lengths.tolist() == [9, 9, 9]


def test_more_than_is_held_can_be_dropped(tiny_config: Callable[..., ModelConfig]) -> None:
    model, cache, ids = Model(tiny_config()), KVCache(tiny_config(), 1, 20), torch.arange(9).unsqueeze(0)
    with torch.no_grad():
        wanted = model(ids).logits
        model(ids, cache=cache)
        cache.drop(50)
        assert cache.longest == 0
        torch.testing.assert_close(model(ids, cache=cache).logits, wanted)

"""An encoder, `causal: false`: what a token sees, and what such a model cannot be asked for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekit.config import ModelConfig
from moekit.errors import UnsupportedError
from moekit.evaluate.windows import Window, score_windows
from moekit.formats.checkpoint import load, save
from moekit.formats.gguf.architecture import keys
from moekit.generate import generate
from moekit.inspect.losses import window_losses
from moekit.nn.cache import KVCache
from moekit.nn.model import Model

Configs = Callable[..., ModelConfig]
DENSE = {"kind": "dense", "hidden_act": "gelu"}


def made(config: ModelConfig, device: torch.device) -> Model:
    return Model(config).to(device, torch.float64).eval()


@pytest.mark.parametrize("ffn", [DENSE, {}])
@pytest.mark.parametrize("attention", ["mha", "mla"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_token_sees_those_behind_it_only_in_an_encoder(
    tiny_config: Configs, device: torch.device, attention: str, ffn: dict[str, str], causal: bool
) -> None:
    model = made(tiny_config(attention={"kind": attention}, ffn=ffn, causal=causal), device)
    ids = torch.randint(0, 61, (2, 9), device=device)
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 1) % 61
    moved = (model(ids).hidden - model(other).hidden).abs().amax((0, 2)) > 1e-9
    assert moved.tolist() == [not causal] * 6 + [True] * 3


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_padding_changes_nothing(tiny_config: Configs, device: torch.device, attention: str) -> None:
    model = made(tiny_config(attention={"kind": attention}, causal=False), device)
    ids = torch.randint(0, 61, (3, 9), device=device)
    real = torch.arange(9, device=device) < torch.tensor([[9], [5], [0]], device=device)
    alone = model(ids[1:2, :5])
    for filler in (0, 7):
        found = model(ids.where(real, filler), padding_mask=real, targets=ids)
        torch.testing.assert_close(found.hidden[1, :5], alone.hidden[0])
        assert bool(found.hidden.isfinite().all())
        assert int(found.token_loss.tokens) == 14


@pytest.mark.parametrize(("batch", "length"), [(0, 3), (2, 0)])
@pytest.mark.parametrize("documents", [False, True])
def test_nothing_at_all_gives_nothing(
    tiny_config: Configs, device: torch.device, batch: int, length: int, documents: bool
) -> None:
    ids = torch.zeros(batch, length, dtype=torch.long, device=device)
    model = made(tiny_config(causal=False), device)
    found = model(ids, document_ids=ids if documents else None, padding_mask=ids == 0).hidden
    assert found.shape == (batch, length, model.config.hidden_size)


def test_attention_stays_inside_a_document(tiny_config: Configs, device: torch.device) -> None:
    model = made(tiny_config(causal=False), device)
    ids = torch.randint(0, 61, (1, 9), device=device)
    documents = torch.tensor([[0] * 4 + [1] * 3 + [-1] * 2], device=device)
    found = model(ids, document_ids=documents, padding_mask=documents >= 0).hidden
    other = ids.clone()
    other[0, 5] = (other[0, 5] + 1) % 61
    moved = (model(other, document_ids=documents, padding_mask=documents >= 0).hidden - found).abs().amax((0, 2)) > 1e-9
    assert moved.tolist()[:7] == [False] * 4 + [True] * 3
    torch.testing.assert_close(found[:, :4], model(ids[:, :4]).hidden)


def test_gradients_come_from_both_sides(tiny_config: Configs, device: torch.device) -> None:
    model = made(tiny_config(ffn=DENSE, causal=False), device)
    ids = torch.arange(7, device=device).unsqueeze(0)
    targets = torch.full_like(ids, -100)
    targets[0, 3] = 5
    model(ids, targets=targets).loss.backward()
    assert model.embed_tokens.weight.grad is not None
    assert bool((model.embed_tokens.weight.grad[:7].abs().amax(1) > 0).all())


def test_what_predicts_the_next_token_is_refused_in_one_line(tiny_config: Configs) -> None:
    model = Model(tiny_config(causal=False))
    ids = torch.randint(0, 61, (1, 5))
    asked = {
        "generation": lambda: generate(model, ids, 2),
        "a cache": lambda: model(ids, cache=KVCache(model.config, 1, 8)),
        "a loss on `labels`": lambda: model(ids, labels=ids),
        "the likelihood of a text": lambda: score_windows(model, [Window([1, 2, 3], 2)], 1),
        "the loss of a text": lambda: window_losses(model, (ids.numpy(),) * 3, []),
    }
    for what, ask in asked.items():
        with pytest.raises(UnsupportedError, match=f"^{what}.* needs a model that predicts the next token"):
            ask()


def test_no_other_layout_takes_an_encoder(tiny_config: Configs, tmp_path: Path) -> None:
    dense = {"kind": "dense", "intermediate_size": 26}
    model = Model(tiny_config(attention={"num_key_value_heads": 4}, ffn=dense, causal=False, hidden_size=24))
    with pytest.raises(UnsupportedError, match="layout llama cannot say causal False"):
        save(model, tmp_path / "llama", layout="llama")
    with pytest.raises(UnsupportedError, match="causal is False but the export to GGUF knows no key for it"):
        keys(model.config)
    save(model, tmp_path / "model")
    assert load(tmp_path / "model").config == model.config

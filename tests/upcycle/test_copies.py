"""Copies of a trained model: every tensor accounted for, the same function, one-line errors for what cannot be."""

from collections.abc import Callable

import pytest
import torch

from moekit.config import ModelConfig
from moekit.errors import ConfigError
from moekit.formats.names import pieces
from moekit.nn.model import Model
from moekit.upcycle import copies

Configs = Callable[..., ModelConfig]
DENSE = {"kind": "dense", "hidden_act": "gelu"}


def keys(model: Model) -> set[str]:
    return {piece.key for name, tensor in model.state_dict().items() for piece in pieces(name, tuple(tensor.shape))}


@pytest.mark.parametrize("ffn", [DENSE, {}, {"topk_method": "noaux_tc"}])
@pytest.mark.parametrize("tied", [True, False])
def test_the_same_settings_give_the_same_model(tiny_config: Configs, ffn: dict[str, str], tied: bool) -> None:
    config = tiny_config(ffn=ffn, tie_word_embeddings=tied)
    source = Model(config)
    model, report = copies.apply(source, config.model_copy(update={"initializer_range": 0.1}))
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in model.state_dict().items())
    assert report["created"] == report["dropped"] == {}
    assert report["used"].keys() == keys(source) - ({"lm_head.weight"} if tied else set())
    assert all(used == {"source": key} for key, used in report["used"].items())
    model.embed_tokens.weight.data.zero_()
    assert bool(source.embed_tokens.weight.any())


def test_what_copies_cannot_make_is_one_line(tiny_config: Configs) -> None:
    source = Model(tiny_config(ffn=DENSE))
    wrong = {
        "model.ffn.kind is moe but that to start from is dense; copies make meo": tiny_config(),
        "model.hidden_size is 24 but 18 in the model to start from": tiny_config(ffn=DENSE, hidden_size=24),
        "model.ffn.intermediate_size is 30 but 26": tiny_config(ffn={**DENSE, "intermediate_size": 30}),
        "model.ffn.hidden_act is silu but gelu": tiny_config(ffn={"kind": "dense"}),
        "model.causal is False but True": tiny_config(ffn=DENSE, causal=False),
        "model.attention.head_dim is 4 but 6": tiny_config(attention={"head_dim": 4}, ffn=DENSE),
    }
    for message, config in wrong.items():
        with pytest.raises(ConfigError, match=message):
            copies.apply(source, config)

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


MEO = {"kind": "meo", "intermediate_size": 26, "n_routed_experts": 4, "num_experts_per_tok": 2}
LEVELS = [("merge", level) for level in ("sequence", "token", "task")]
LEVELS += [("dispatch", level) for level in ("sequence", "token", "task")]


@pytest.mark.parametrize(("mode", "level"), LEVELS)
def test_experts_that_begin_as_copies_compute_what_the_dense_model_did(
    tiny_config: Configs, mode: str, level: str
) -> None:
    source = Model(tiny_config(ffn=DENSE, causal=False)).eval()
    told = {"description_ids": (1, 2, 3)} if level == "task" else {}
    model, report = copies.apply(source, tiny_config(ffn={**MEO, "mode": mode, "level": level, **told}, causal=False))
    ids = torch.randint(0, 61, (2, 9))
    torch.testing.assert_close(model.eval()(ids).logits, source(ids).logits)
    assert report["used"].keys() | report["created"].keys() == keys(model)
    assert report["used"]["model.layers.1.mlp.up_proj.weight"] == {"source": "model.layers.1.mlp.up_proj.weight"}
    assert all("gate" in key or "token_block" in key or "task" in key for key in report["created"])
    assert report["dropped"] == {}
    up = model.layers[0].mlp.up_proj.weight
    assert up.shape[0] == 4
    assert bool((up == source.layers[0].mlp.up_proj.weight).all())


def test_lorys_experts_begin_as_copies_of_a_swiglu_network(tiny_config: Configs) -> None:
    lory = {"kind": "lory", "intermediate_size": 26, "n_routed_experts": 3, "segment_size": 4}
    source = Model(tiny_config(ffn={"kind": "dense"})).eval()
    model, report = copies.apply(source, tiny_config(ffn=lory))
    ids = torch.randint(0, 61, (2, 9))
    torch.testing.assert_close(model.eval()(ids).logits, source(ids).logits)
    assert report["used"].keys() | report["created"].keys() == keys(model)
    for half in ("gate_proj", "up_proj", "down_proj"):
        key = f"model.layers.0.mlp.experts.2.{half}.weight"
        assert report["used"][key] == {"source": f"model.layers.0.mlp.{half}.weight"}


def test_what_copies_cannot_make_is_one_line(tiny_config: Configs) -> None:
    source = Model(tiny_config(ffn=DENSE))
    swiglu = tiny_config(ffn={"kind": "lory", "intermediate_size": 26, "n_routed_experts": 3})
    wrong = {
        "model.ffn.kind is lory but that to start from is dense; copies make meo of dense with hidden_act gelu": swiglu,
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

"""Similarity: copies are 1 by every measure, shuffled copies by all but the plain cosine, strangers by none."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from moekit.config import ModelConfig
from moekit.inspect import similarity as module
from moekit.inspect.similarity import MEASURES, by_outputs, by_weights, hidden_states, similarity
from moekit.nn.model import Model
from moekit.nn.quantized import quantize_

from .conftest import random_windows

WINDOWS = random_windows([9, 12, 5], ["a", "b", "a"])


@pytest.fixture
def model(tiny_config: Callable[..., ModelConfig]) -> Model:
    """Expert 1 is a copy of expert 0, expert 2 the same with its hidden units shuffled."""
    model = Model(tiny_config(ffn={"moe_intermediate_size": 40})).eval()
    order = torch.randperm(40)
    with torch.no_grad():
        for layer in model.moe_layers:
            gate_up, down = layer.experts.gate_up_proj, layer.experts.down_proj
            gate_up[1], down[1] = gate_up[0], down[0]
            gate_up[2], down[2] = gate_up[0][torch.cat((order, order + 40))], down[0][:, order]
    return model


def test_a_copy_and_a_shuffled_copy_are_alike_and_strangers_are_not(model: Model) -> None:
    for layer, x in zip(model.moe_layers, hidden_states(model, WINDOWS), strict=True):
        plain, gram = by_weights(layer.experts)
        outputs = by_outputs(layer.experts, x)
        for found in (plain, gram, outputs):
            assert found[0, 1].item() == pytest.approx(1, abs=1e-5)
            assert torch.allclose(found.diagonal(), torch.ones(7), atol=1e-5)
            assert found[0, 3:].abs().max() < 0.5
        for found in (gram, outputs):
            assert found[0, 2].item() == pytest.approx(1, abs=1e-5)
        assert abs(plain[0, 2]) < 0.3


def test_measures_by_weights_equal_the_formulas_over_whole_matrices(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    experts = model.moe_layers[0].experts
    gate_up, down = experts.gate_up_proj.detach().double(), experts.down_proj.detach().double()
    flat = torch.cat((gate_up.flatten(1), down.flatten(1)), dim=1)
    flat = flat / flat.norm(dim=1, keepdim=True)
    grams = []
    for products in (gate_up.transpose(1, 2) @ gate_up, down @ down.transpose(1, 2)):
        without = products - products.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(18)
        whole = without.flatten(1) / without.flatten(1).norm(dim=1, keepdim=True)
        grams.append(whole @ whole.T)
    for block in (2**24, 7 * 18 * 3):  # all at once, and three rows at a time
        monkeypatch.setattr(module, "BLOCK", block)
        plain, gram = by_weights(experts)
        assert torch.allclose(plain.double(), flat @ flat.T, atol=1e-5)
        assert torch.allclose(gram.double(), (grams[0] + grams[1]) / 2, atol=1e-5)


def test_a_projection_keeps_copies_alike_and_strangers_apart(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIRECTIONS", 8)
    _, gram = by_weights(model.moe_layers[0].experts)
    assert torch.allclose(gram[:3, :3], torch.ones(3, 3), atol=1e-4)
    assert gram[0, 3:].abs().max() < 0.6


def test_outputs_are_compared_token_by_token(model: Model) -> None:
    layer, x = model.moe_layers[0], hidden_states(model, WINDOWS)[0]
    ones = []
    with torch.no_grad():
        for expert in range(7):
            counts = torch.zeros(7, dtype=torch.int64)
            counts[expert] = len(x)
            ones.append(layer.experts(x, counts))
        found = by_outputs(layer.experts, x)
    for first, second in ((0, 3), (4, 6)):
        expected = torch.nn.functional.cosine_similarity(ones[first], ones[second]).mean()
        assert found[first, second].item() == pytest.approx(expected.item(), abs=1e-5)


def test_hidden_states_are_what_the_layers_read(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    handle = model.moe_layers[1].register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
    with torch.no_grad():
        for window in WINDOWS:
            model(torch.from_numpy(window.tokens)[None])
    handle.remove()
    assert torch.equal(hidden_states(model, WINDOWS)[1], torch.cat(seen))
    monkeypatch.setattr(module, "TOKENS", 4)
    assert torch.equal(hidden_states(model, WINDOWS)[1], torch.cat(seen)[[0, 8, 16, 25]])
    assert not any(layer._forward_pre_hooks for layer in model.moe_layers)


def test_tables_name_the_most_alike_pairs(model: Model) -> None:
    found = similarity(model, WINDOWS)
    assert list(found.pictures) == [MEASURES[name] for name in ("outputs", "weights", "router")]
    columns = found.tables["pairs"].columns
    assert columns == ("layer", "first", "second", "outputs", "weights", "router", "weights_as_they_stand")
    assert {row[1:3] for row in found.tables["pairs"].rows if row[0] == 1 and row[3] > 0.999} == {
        (0, 1),
        (0, 2),
        (1, 2),
    }


def test_hash_routers_have_no_rows_and_codes_are_read(tiny_config: Callable[..., ModelConfig]) -> None:
    model = Model(tiny_config(ffn={"topk_method": "hash"})).eval()
    whole = similarity(model, WINDOWS)
    assert MEASURES["router"] not in whole.pictures
    quantize_(model, "int8")
    rows = [
        dict(zip(t.columns, t.rows[0], strict=True))
        for t in (whole.tables["layers"], similarity(model, WINDOWS).tables["layers"])
    ]
    for name in ("weights.mean", "outputs.highest"):
        assert np.isclose(rows[0][name], rows[1][name], atol=0.02)

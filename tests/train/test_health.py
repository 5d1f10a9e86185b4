"""Load health from small known loads."""

import math
from collections.abc import Callable

import pytest
import torch

from moekit.config import ModelConfig
from moekit.nn.model import Model
from moekit.ops.routing import route
from moekit.train.health import Load, add_routing, load_entropy, measure, no_load


def load(*layers: list[int]) -> Load:
    tokens = torch.tensor(layers)
    return Load(tokens, tokens.sum(1), torch.zeros(len(layers), dtype=torch.float64))


def test_known_loads_have_known_health() -> None:
    found = measure(load([5, 5, 5, 5], [20, 0, 0, 0], [8, 8, 4, 0]))
    assert found["max_violation"] == pytest.approx([0, 3, 0.6])
    entropy = -(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2)) / math.log(4)
    assert found["entropy"] == [1, 0, round(entropy, 4)]
    assert found["dead"] == [0, 3, 1]
    assert found["router_z"] == [0, 0, 0]


def test_entropy_of_one_expert_or_of_nothing_is_full() -> None:
    assert load_entropy(torch.tensor([7.0])) == 1
    assert load_entropy(torch.zeros(4)) == 1


def test_a_load_adds_up_what_routings_say(tiny_config: Callable[..., ModelConfig], device: torch.device) -> None:
    model = Model(tiny_config()).to(device)
    made = no_load(model.config, device)
    counts = torch.zeros(2, 7, dtype=torch.int64)
    for _ in range(3):
        routing = model(torch.randint(0, 61, (2, 9), device=device), return_routing=True).routing
        add_routing(made, routing)
        for layer, one in enumerate(routing):
            counts[layer] += torch.bincount(one.expert_ids.flatten().cpu(), minlength=7)
    assert torch.equal(made.tokens_per_expert.cpu(), counts)
    assert made.units.tolist() == [54, 54]


def test_router_z_is_the_root_mean_square_of_the_log_sum_exp() -> None:
    logits = torch.randn(12, 5)
    made = load([0] * 5)
    add_routing(made, [route(logits[:6], 2)])
    add_routing(made, [route(logits[6:], 2)])
    expected = float(logits.logsumexp(-1).square().mean().sqrt())
    assert measure(made)["router_z"] == [pytest.approx(expected, abs=1e-4)]


def test_a_model_without_moe_layers_has_no_health(tiny_config: Callable[..., ModelConfig]) -> None:
    nothing = no_load(tiny_config(ffn={"kind": "dense"}), torch.device("cpu"))
    add_routing(nothing, [])
    assert nothing.tokens_per_expert.tolist() == []
    assert measure(nothing) == {}

"""Load health from small known loads."""

import math
from collections.abc import Callable

import pytest
import torch

from moekit.config import ModelConfig
from moekit.nn.model import Model
from moekit.ops.routing import route
from moekit.train.health import DeadExperts, LoadWindow, as_json, load_entropy


def window(*layers: list[int]) -> LoadWindow:
    made = LoadWindow(len(layers), len(layers[0]))
    made.tokens_per_expert = torch.tensor(layers)
    made.units = made.tokens_per_expert.sum(1)
    return made


def test_known_loads_have_known_health() -> None:
    found = window([5, 5, 5, 5], [20, 0, 0, 0], [8, 8, 4, 0]).health()
    assert found.max_violation == pytest.approx([0, 3, 0.6])
    entropy = -(2 * 0.4 * math.log(0.4) + 0.2 * math.log(0.2)) / math.log(4)
    assert found.entropy == pytest.approx([1, 0, entropy])
    assert found.dead == [0, 3, 1]
    assert found.router_z == [0, 0, 0]


def test_entropy_of_one_expert_or_of_nothing_is_full() -> None:
    assert load_entropy(torch.tensor([7.0])) == 1
    assert load_entropy(torch.zeros(4)) == 1


def test_a_window_adds_up_what_routings_say(tiny_config: Callable[..., ModelConfig], device: torch.device) -> None:
    model = Model(tiny_config()).to(device)
    batches = [torch.randint(0, 61, (2, 9), device=device) for _ in range(3)]
    made, halves = LoadWindow(2, 7), LoadWindow(2, 7)
    counts = torch.zeros(2, 7, dtype=torch.int64)
    for ids in batches:
        routing = model(ids, return_routing=True).routing
        made.add(routing)
        part = LoadWindow(2, 7)
        part.add(routing)
        halves.add_window(part)
        for layer, one in enumerate(routing):
            counts[layer] += torch.bincount(one.expert_ids.flatten().cpu(), minlength=7)
    assert torch.equal(made.tokens_per_expert.cpu(), counts)
    assert made.units.tolist() == [54, 54]
    for name, value in made.state().items():
        assert torch.equal(value, halves.state()[name])


def test_router_z_is_the_root_mean_square_of_the_log_sum_exp() -> None:
    logits = torch.randn(12, 5)
    made = LoadWindow(1, 5)
    made.add([route(logits[:6], 2)])
    made.add([route(logits[6:], 2)])
    assert made.health().router_z[0] == pytest.approx(float(logits.logsumexp(-1).square().mean().sqrt()), rel=1e-6)


def test_a_window_without_moe_layers_takes_nothing() -> None:
    made = LoadWindow(0, 1)
    made.add([])
    assert made.health() == ([], [], [], [])


def test_a_window_is_taken_up_where_it_was_written_down() -> None:
    a, b = window([1, 2], [3, 4]), LoadWindow(2, 2)
    b.load_state({name: value.clone() for name, value in a.state().items()})
    assert b.health() == a.health()


def test_sums_are_given_per_layer_on_the_windows_device(device: torch.device) -> None:
    found = window([1, 2], [3, 4]).to(device).sums()
    assert [(s.tokens_per_expert.tolist(), int(s.units)) for s in found] == [([1, 2], 3), ([3, 4], 7)]
    assert found[0].tokens_per_expert.device.type == device.type


def test_an_expert_is_called_dead_once_and_again_after_it_lived() -> None:
    dead = DeadExperts(1, 3, after=2)
    loads = [[1, 0, 0], [1, 0, 1], [1, 0, 0], [1, 0, 0], [1, 1, 0], [1, 0, 0], [1, 0, 0]]
    told = [dead.update(torch.tensor([load])) for load in loads]
    assert told == [{}, {0: [1]}, {}, {0: [2]}, {}, {}, {0: [1]}]
    assert dead.idle.tolist() == [[0, 2, 5]]


def test_json_has_four_decimals() -> None:
    assert as_json(window([1, 2, 3]).health())["entropy"] == [round(window([1, 2, 3]).health().entropy[0], 4)]

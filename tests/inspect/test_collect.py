"""One pass: every count equals a recount token by token, whatever the batch size, in memory that does not grow."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from moekit.config import ModelConfig
from moekit.errors import CheckpointError, ConfigError, DataError
from moekit.inspect import collect as module
from moekit.inspect.collect import BINS, BLOCKS, CONTEXT, EXAMPLES, Collector, Stats, collect, margins, quantile
from moekit.inspect.text import Window, rows
from moekit.inspect.vocabulary import KINDS
from moekit.nn.model import Model
from moekit.ops.routing import limit_capacity

from .conftest import random_windows

LENGTH = 12
KIND = np.arange(61) % 5
WINDOWS = random_windows([12, 12, 7, 12, 3, 12, 12, 1, 12, 5], ["a", "b", "a", "b", "b", "a", "a", "c", "a", "b"])
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid and groups": {
        **{"n_routed_experts": 8, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 4, "topk_group": 2},
        **{"norm_topk_prob": True},
    },
    "hash": {"topk_method": "hash"},
    "everyone": {"n_routed_experts": 3},
    "after a dense layer": {"first_k_dense_replace": 1, "intermediate_size": 20},
}


def build(tiny_config: Callable[..., ModelConfig], **ffn: Any) -> Model:
    model = Model(tiny_config(ffn=ffn)).double().eval()
    for layer in model.moe_layers:
        if getattr(layer.router, "expert_bias", None) is not None:
            layer.router.expert_bias.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("router", ROUTERS)
def test_every_count_equals_a_recount_token_by_token(tiny_config: Callable[..., ModelConfig], router: str) -> None:
    model = build(tiny_config, **ROUTERS[router])
    stats = collect(model, WINDOWS, KIND, LENGTH, batch_size=3)
    layers, experts = len(model.moe_layers), stats.experts
    assert stats.layers == model.config.moe_layers
    assert stats.domains == ["a", "b", "c"]
    assert stats.windows.tolist() == [5, 4, 1]
    by_domain, by_position = np.zeros((layers, 3, BLOCKS, experts)), np.zeros((layers, LENGTH, experts))
    by_token, together = np.zeros((layers, 61, experts)), np.zeros((layers, experts, experts))
    mass, entropies = np.zeros((layers, experts)), np.zeros(layers)
    gaps: list[list[float]] = [[] for _ in range(layers)]
    best: dict[tuple[int, int], list[tuple[float, list[int]]]] = {}
    for window in WINDOWS:
        with torch.no_grad():
            out = model(torch.from_numpy(window.tokens)[None], return_routing=True)
        padded = [-1] * CONTEXT + window.tokens.tolist() + [-1] * CONTEXT
        for at, routing in enumerate(out.routing):
            here: dict[int, list[tuple[float, list[int]]]] = {}
            for place, token in enumerate(window.tokens):
                ids = routing.expert_ids[place].tolist()
                for expert, weight in zip(ids, routing.weights[place].tolist(), strict=True):
                    by_domain[at, stats.domains.index(window.domain), window.number % BLOCKS, expert] += 1
                    by_position[at, place, expert] += 1
                    by_token[at, token, expert] += 1
                    mass[at, expert] += weight
                    here.setdefault(expert, []).append((weight, padded[place : place + 2 * CONTEXT + 1]))
                for one, two in itertools.product(ids, ids):
                    together[at, one, two] += 1
                if routing.scores is not None:
                    scores = routing.scores[place]
                    share = scores / scores.sum()
                    entropies[at] += float(-(share * share.log2()).sum())
                    bias = model.moe_layers[at].router.expert_bias
                    choice = scores + (0 if bias is None else bias)
                    if stats.experts == 8:  # groups of 2, of which the best 2 by their sum are allowed
                        allowed = choice.view(4, 2).sum(1).topk(2).indices.tolist()
                        choice = torch.tensor([c if e // 2 in allowed else -9.0 for e, c in enumerate(choice)])
                    order = choice.sort(descending=True).values
                    if len(order) > len(ids) and order[len(ids)] > -9:
                        gaps[at].append(float(order[len(ids) - 1] - order[len(ids)]))
            for expert, found in here.items():
                best.setdefault((at, expert), []).append(max(found, key=lambda item: item[0]))
    assert np.array_equal(stats.by_domain, by_domain)
    assert np.array_equal(stats.by_position, by_position)
    assert np.array_equal(stats.together, together)
    assert np.allclose(stats.gate_mass, mass)
    for slot, token in enumerate(stats.slot_ids):
        assert np.array_equal(stats.by_token[:, slot], np.zeros((layers, experts)) if token < 0 else by_token[:, token])
        assert stats.slot_tokens[slot] == sum(int((window.tokens == token).sum()) for window in WINDOWS)
        assert stats.slot_kinds[slot] == (slot if token < 0 else KIND[token])
    if router == "hash":
        assert stats.entropy is stats.margin is stats.entropy_sum is None
    else:
        assert np.allclose(stats.entropy_sum, entropies)
        assert (stats.entropy.sum(1) == stats.tokens.sum()).all()
        assert stats.margin.sum(1).tolist() == [len(found) for found in gaps]
        for at, found in enumerate(gaps):
            places = ((np.log2(np.maximum(found, 2.0**-20)) + 20) * 8).astype(int)
            assert np.array_equal(stats.margin[at], np.bincount(places, minlength=BINS)[:BINS])
    for (at, expert), found in best.items():
        weights = sorted((weight for weight, _ in found), reverse=True)[:EXAMPLES]
        assert np.allclose(stats.example_weights[at, expert, : len(weights)], weights)
        assert (stats.example_weights[at, expert, len(weights) :] == -1).all()
        if router != "hash":  # there all weights are the same
            assert stats.example_ids[at, expert, 0].tolist() == max(found, key=lambda item: item[0])[1]


@pytest.mark.parametrize("router", ["softmax", "hash"])
def test_the_batch_size_changes_nothing(tiny_config: Callable[..., ModelConfig], router: str) -> None:
    model = build(tiny_config, **ROUTERS[router])
    one, many = (collect(model, WINDOWS, KIND, LENGTH, batch_size=size) for size in (1, len(WINDOWS)))
    for name, first, second in zip(Stats._fields, one, many, strict=True):
        if name == "sample":
            assert [window.tokens.tolist() for window in first] == [window.tokens.tolist() for window in second]
        elif isinstance(first, np.ndarray):
            assert np.allclose(first, second, atol=1e-12), name
        else:
            assert first == second, name


def test_a_choice_that_no_expert_computes_counts_nowhere(tiny_config: Callable[..., ModelConfig]) -> None:
    model = build(tiny_config)
    collector = Collector(model, KIND, LENGTH)
    (batch,) = rows(WINDOWS[:2], 2, 61)
    with torch.no_grad():
        routings = model(batch.input_ids, return_routing=True).routing
    dropped = [limit_capacity(routing, 4, "score") for routing in routings]
    collector.add(batch, dropped)
    stats = collector.stats()
    kept = np.stack([np.bincount(r.expert_ids[r.expert_ids >= 0].numpy(), minlength=7) for r in dropped])
    assert np.array_equal(stats.load, kept)
    assert (kept <= 4).all()
    assert np.array_equal(stats.by_token.sum(1), kept)
    assert stats.margin is not None
    assert stats.margin.sum(1).tolist() == [int((r.expert_ids >= 0).all(1).sum()) for r in dropped]


def held(collector: Collector) -> int:
    """Returns the bytes of all arrays that a collector holds."""
    tensors = sum(v.nbytes for v in vars(collector).values() if isinstance(v, torch.Tensor | np.ndarray))
    return tensors + sum(window.tokens.nbytes for window in collector.sample)


def test_memory_does_not_grow_with_the_text(tiny_config: Callable[..., ModelConfig]) -> None:
    model = build(tiny_config)
    collector = Collector(model, KIND, LENGTH)
    names = ["a", "b"] * 30
    sizes = []
    for batch in rows(random_windows([LENGTH] * 60, names), 6, 61):
        with torch.no_grad():
            collector.add(batch, model(batch.input_ids, return_routing=True).routing)
        sizes.append(held(collector))
    assert sizes[2:] == [sizes[2]] * 8
    assert int(collector.stats().tokens.sum()) == 60 * LENGTH


def test_a_vocabulary_too_large_keeps_the_first_ids_and_counts_the_others_by_kind(
    tiny_config: Callable[..., ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(tiny_config)
    full = collect(model, WINDOWS, KIND, LENGTH)
    monkeypatch.setattr(module, "TOKEN_BYTES", 4 * 2 * 8 * 10)  # ten ids of two layers and seven experts
    few = collect(model, WINDOWS, KIND, LENGTH, batch_size=2)
    own = few.slot_ids[few.slot_ids >= 0].tolist()
    text = np.concatenate([window.tokens for window in WINDOWS]).tolist()
    assert own == list(dict.fromkeys(text))[:10]
    for slot, token in enumerate(few.slot_ids):
        if token >= 0:
            assert np.array_equal(few.by_token[:, slot], full.by_token[:, full.slot_ids.tolist().index(token)])
    for kind in range(len(KINDS)):
        sums = [stats.by_token[:, stats.slot_kinds == kind].sum(1) for stats in (few, full)]
        assert np.array_equal(*sums)
    assert few.slot_tokens.sum() == full.slot_tokens.sum() == len(text)


def test_the_sample_has_a_window_of_every_domain(tiny_config: Callable[..., ModelConfig]) -> None:
    domains = ["a"] * 20 + ["b"] * 3 + ["c"]
    stats = collect(build(tiny_config), random_windows([4] * 24, domains), KIND, LENGTH)
    assert [window.domain for window in stats.sample] == ["a"] * 6 + ["b", "c"]
    assert [window.number for window in stats.sample] == [*range(6), 0, 0]


def test_what_cannot_be_inspected_is_one_line(tiny_config: Callable[..., ModelConfig]) -> None:
    dense = Model(tiny_config(ffn={"kind": "dense"}))
    with pytest.raises(ConfigError, match="dense"):
        collect(dense, WINDOWS, KIND, LENGTH)
    model = build(tiny_config)
    with pytest.raises(DataError, match="no tokens"):
        collect(model, [], KIND, LENGTH)
    with pytest.raises(CheckpointError, match=r"the id 61 .* vocab_size is 61"):
        collect(model, [Window("a", 0, np.array([61]))], KIND, LENGTH)
    with pytest.raises(DataError, match="more than 64 domains"):
        collect(model, (Window(f"d{n}", 0, np.array([1])) for n in range(65)), KIND, LENGTH)


def test_quantiles_of_a_histogram_are_within_a_bin_of_those_of_the_values() -> None:
    values = np.random.default_rng(0).uniform(2, 50, (2, 4001))
    histogram = np.stack([np.bincount(row.astype(int), minlength=BINS) for row in values])
    for at in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert np.abs(quantile(histogram, at) - np.quantile(values, at, axis=1)).max() <= 1
    assert np.isnan(quantile(np.zeros((1, BINS), dtype=np.int64), 0.5)).all()
    one = np.zeros((1, BINS), dtype=np.int64)
    one[0, 8 * 20 - 1] = 5
    assert 2 ** (-1 / 8) <= margins(one, 0.5)[0] <= 1

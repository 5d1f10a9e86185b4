"""What is measured between two models is what the names say, at the ends of the scale too."""

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekit.config import ModelConfig
from moekit.errors import CheckpointError, ConfigError, DataError
from moekit.formats import compare
from moekit.formats.compare import BOUNDS, check, difference, logits_checks, routing_check, sample
from moekit.formats.tokenizer import train_tokenizer
from moekit.nn.model import Model
from moekit.ops.quantize import dequantize, quantize

Configs = Callable[..., ModelConfig]


@pytest.mark.parametrize(
    ("value", "sign", "held"), [(1.0, "<=", True), (1.5, "<=", False), (0.5, ">=", False), (2, ">=", True)]
)
def test_a_check_holds_up_to_its_bound(value: float, sign: Any, held: bool) -> None:
    told = {"name": "a", "value": value, "bound": f"{sign} 1", "held": held, "of": ["x"]}
    assert check("a", value, sign, 1.0, of=["x"]) == told


def test_what_is_not_a_number_never_holds_and_is_null() -> None:
    for sign in ("<=", ">="):
        found = check("a", math.nan, sign, 1.0, rms=math.inf)  # type: ignore[arg-type]
        assert (found["held"], found["value"], found["rms"]) == (False, None, None)
        json.dumps(found, allow_nan=False)


def test_the_difference_of_tensors_is_relative_to_the_first_whatever_they_are_kept_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    w = torch.randn(7, 50)
    assert difference(w, w * 1.25) == pytest.approx(0.25, abs=1e-6)
    assert difference(w, w) == 0
    assert difference(torch.zeros(3), torch.ones(3)) > 0
    codes = quantize(w, "int4")
    error = float((dequantize(codes) - w).norm() / w.norm())
    assert difference(w, codes) == pytest.approx(error, rel=1e-5)
    monkeypatch.setattr(compare, "BLOCK", 100)  # two rows at a time
    assert difference(w, codes) == pytest.approx(error, rel=1e-5)


def test_logits_moved_by_a_constant_have_not_moved_but_at_most() -> None:
    logits = torch.randn(2, 5, 11)
    moved, kept = logits_checks(BOUNDS["float32"], logits, logits + 3)
    assert (moved["held"], kept["value"]) == (True, 1.0)
    assert moved["logits_rms"] == pytest.approx(0, abs=1e-6)
    assert moved["logits_max"] == pytest.approx(3, abs=1e-5)
    moved, kept = logits_checks(BOUNDS["int4"], logits, -logits)
    assert [moved["held"], kept["held"]] == [False, False]
    assert moved["logits_rms"] == pytest.approx(2)


def test_routing_agrees_where_the_sets_do_and_the_worst_layer_is_told(tiny_config: Configs) -> None:
    model = Model(tiny_config()).eval()
    with torch.no_grad():
        routing = model(torch.randint(61, (1, 20)), return_routing=True).routing
    turned = [one._replace(expert_ids=one.expert_ids.flip(-1)) for one in routing]
    assert routing_check(BOUNDS["float32"], routing, turned)["value"] == 1
    ids = routing[1].expert_ids.clone()
    ids[:5, 0] = -1  # as if dropped
    other = routing_check(BOUNDS["float32"], routing, [routing[0], routing[1]._replace(expert_ids=ids)])
    assert (other["value"], other["by_layer"], other["held"]) == (0.75, [1.0, 0.75], False)


def test_the_sample_is_the_texts_first_tokens_or_the_same_random_ones(tiny_config: Configs) -> None:
    config = tiny_config(vocab_size=280)
    tokenizer = train_tokenizer(["the quick brown fox jumps\n"], 280)
    text = "the quick brown fox jumps over the lazy dog " * 50
    ids = sample(config, tokenizer, text)
    assert ids.shape == (4, 64)
    assert ids.flatten().tolist() == tokenizer.encode(text)[:256]
    assert sample(config, tokenizer, "fox").tolist() == [tokenizer.encode("fox")]
    assert torch.equal(sample(config, None, None), sample(config, tokenizer, None))
    with pytest.raises(ConfigError, match="--text needs a tokenizer"):
        sample(config, None, text)
    with pytest.raises(DataError, match="the text to compare on is empty"):
        sample(config, tokenizer, "")
    with pytest.raises(CheckpointError, match=r"the tokenizer gives the id \d+ but the model's vocab_size is 61"):
        sample(tiny_config(vocab_size=61), tokenizer, text)

"""A receipt is plain JSON that says what was made, from what, and what was proved."""

import datetime
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekit import files, receipts
from moekit.config import ModelConfig
from moekit.nn.model import Model
from moekit.version import __version__


def test_a_receipt_is_json_and_keeps_what_it_was_told(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> None:
    receipt = receipts.make(
        "prune",
        config={"keep": 4},
        model=tiny_config(),
        inputs={"model": "abc"},
        outputs={"x": {"bytes": 1}},
        tensors={"dropped": ["a"]},
        health={"dead": [0]},
        checks=[{"name": "perplexity", "value": 3.0, "bound": 4.0, "held": True}],
        seed=7,
        device="cuda:0",
        seconds=1.5,
    )
    files.write_json(tmp_path / "receipt.json", receipt)
    text = (tmp_path / "receipt.json").read_text()
    assert json.loads(text) == receipt
    assert text.endswith("}\n")
    assert receipt["checks"] == [{"name": "perplexity", "value": 3.0, "bound": 4.0, "held": True}]
    told = {"action": "prune", "config": {"keep": 4}, "seed": 7, "device": "cuda:0", "seconds": 1.5}
    told |= {"inputs": {"model": "abc"}, "outputs": {"x": {"bytes": 1}}, "tensors": {"dropped": ["a"]}}
    assert told.items() <= receipt.items()
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(receipt["time"])
    assert datetime.timedelta(0) <= age < datetime.timedelta(minutes=1)


def test_versions_are_those_that_ran() -> None:
    found = receipts.versions()
    assert found["moekit"] == __version__
    assert found["torch"] == torch.__version__
    assert found["threads"] == str(torch.get_num_threads())
    assert {"python", "numpy", "safetensors", "system"} < set(found)


@pytest.mark.parametrize("ffn", [{"kind": "dense"}, {"first_k_dense_replace": 1, "intermediate_size": 20}])
def test_parameters_by_role_add_up_to_the_built_model(tiny_config: Callable[..., ModelConfig], ffn: dict) -> None:  # type: ignore[type-arg]
    config = tiny_config(ffn=ffn)
    receipt = receipts.make("train", config, trains=True, config={})
    assert sum(receipt["parameters_by_role"].values()) == sum(p.numel() for p in Model(config).parameters())
    assert receipt["trained_by_role"] == receipt["parameters_by_role"]

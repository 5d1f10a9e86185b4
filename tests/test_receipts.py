"""A receipt is plain JSON that says what was made, from what, and what was proved."""

import datetime
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekit import receipts
from moekit.config import ModelConfig
from moekit.nn.model import Model
from moekit.receipts import Check
from moekit.version import __version__


def test_sha256_and_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    contents = {"b": b"\x00" * 3_000_000, "a": b"", "c": "é".encode()}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "other").touch()
    found = receipts.file_hashes(tmp_path, contents)
    assert list(found) == ["a", "b", "c"]
    for name, content in contents.items():
        assert found[name] == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_receipt_is_json_and_keeps_what_it_was_told(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> None:
    receipt = receipts.make(
        "prune",
        config={"keep": 4},
        model=tiny_config(),
        inputs={"model": "abc"},
        outputs={"x": {"bytes": 1}},
        tensors={"dropped": ["a"]},
        health={"dead": [0]},
        checks=[Check("perplexity", 3.0, 4.0, True)],
        seed=7,
        device="cuda:0",
        seconds=1.5,
    )
    receipts.write_json(tmp_path / "receipt.json", receipt)
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
    assert sum(receipts.parameters_by_role(config).values()) == sum(p.numel() for p in Model(config).parameters())


def test_text_is_written_as_it_is_read(tmp_path: Path) -> None:
    receipts.write_json(tmp_path / "x.json", {"域": "诗 é \u2028"})
    assert "诗 é" in (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"域": "诗 é \u2028"}

"""The names that others build on: there, lazily, with the promised signatures."""

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import moekit
from moekit.formats.tokenizer import train_tokenizer


def in_a_fresh_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", moekit.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(moekit, name) is not None


def test_the_promised_names_are_public() -> None:
    assert {"preset", "Model", "save", "load", "load_tokenizer", "generate", "KVCache", "__version__"} <= set(
        moekit.__all__
    )
    assert all(hasattr(moekit, name) for name in moekit.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'moekit' has no attribute 'Modell'"):
        moekit.Modell  # noqa: B018


def test_import_moekit_and_a_preset_need_no_torch() -> None:
    code = "import sys, moekit; moekit.preset('deepseekmoe-16b').num_parameters; print('torch' in sys.modules)"
    assert in_a_fresh_process(code) == "False"


def test_generate_can_be_called_whatever_was_imported_first() -> None:
    code = (
        "import moekit.generate.decode as decode\n"
        "from moekit.generate import complete\n"
        "import moekit, inspect\n"
        "assert callable(moekit.generate)\n"
        "model = moekit.Model(moekit.preset('tiny-dense'))\n"
        "import torch\n"
        "ids = torch.tensor([[1, 2]])\n"
        "a, b = moekit.generate(model, ids, max_new_tokens=2), decode.generate(model, ids, max_new_tokens=2)\n"
        "print(torch.equal(a, b), moekit.generate.complete is complete)"
    )
    assert in_a_fresh_process(code) == "True True"


def parameters(function: Any) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(function).parameters.items()}


def test_signatures_are_as_designed() -> None:
    none = inspect.Parameter.empty
    found = parameters(sys.modules["moekit.generate"].generate)
    assert list(found.items())[:4] == [
        ("model", none),
        ("input_ids", none),
        ("max_new_tokens", 64),
        ("temperature", 0.0),
    ]
    found = parameters(moekit.Model.forward)
    expected = [("self", none), ("input_ids", none), ("labels", None), ("cache", None), ("return_routing", False)]
    assert list(found.items())[:5] == expected
    found = parameters(moekit.load)
    assert list(found.items())[:3] == [("path", none), ("device", "cpu"), ("dtype", None)]
    assert parameters(moekit.save)["tokenizer"] is None
    assert list(parameters(moekit.ModelConfig.flops)) == ["self", "sequence_length", "rule"]


def test_the_whole_surface_runs_on_a_small_model(tmp_path: Path, device: torch.device) -> None:
    config = moekit.preset("tiny-deepseekmoe")
    assert config.num_parameters > config.num_active_parameters
    assert config.flops(128, rule="exact") > 0
    assert config.flops(128, rule="paper") > 0
    model = moekit.Model(config).to(device)
    tok = train_tokenizer(["one two three four five\n"], 280)
    input_ids = torch.tensor([tok.encode("one two three four")], device=device)

    out = model(input_ids, labels=None, cache=None, return_routing=False)
    assert isinstance(out, moekit.ModelOutput)
    assert out.logits.shape == (*input_ids.shape, config.vocab_size)
    assert out.loss is None
    assert out.routing is None
    out = model(input_ids, labels=input_ids, return_routing=True)
    assert out.logits is None  # training with a loss
    assert out.loss.shape == ()
    assert set(out.aux) == {"expert_balance"}
    assert all(isinstance(routing, moekit.Routing) for routing in out.routing)
    assert len(out.routing) == len(config.moe_layers)

    receipt = moekit.save(model, str(tmp_path / "dir"), tokenizer=tok)
    assert receipt["action"] == "save"
    again = moekit.load(str(tmp_path / "dir"), device=str(device), dtype=None)
    assert moekit.load_tokenizer(str(tmp_path / "dir")).encode("two") == tok.encode("two")
    ids = moekit.generate(again, input_ids, max_new_tokens=5, temperature=0.0)
    assert ids.shape == (1, input_ids.shape[1] + 5)
    assert torch.equal(ids[:, : input_ids.shape[1]], input_ids)
    assert torch.equal(ids, moekit.generate(model, input_ids, max_new_tokens=5))


def test_it_trains_in_a_plain_loop_with_any_optimiser_under_autocast(device: torch.device) -> None:
    config = moekit.preset("tiny-deepseekmoe").model_copy(update={"num_hidden_layers": 2, "vocab_size": 64})
    model = moekit.Model(config).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    ids = torch.arange(64, device=device).view(2, 32)
    losses = []
    for _ in range(8):
        with torch.autocast(device.type, torch.bfloat16):
            out = model(ids, labels=ids)
        (out.loss + sum(out.aux.values())).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(out.loss.item())
    assert losses[-1] < losses[0]
    assert all(p.dtype == torch.float32 for p in model.parameters())

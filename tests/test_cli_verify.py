"""`moekit verify` from end to end: what training and convert wrote holds, each kind of damage is named, by status 1."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moekit
from moekit import files
from moekit.cli import main
from moekit.config import ModelConfig
from moekit.formats import weights
from moekit.formats.tokenizer import train_tokenizer
from moekit.nn.model import Model

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that knows one sentence by heart: every matrix of it has learnt."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT], 300)
    attention = {"kind": "mha", "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 20}
    ffn = {"kind": "moe", "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
    config = ModelConfig.model_validate({
        "vocab_size": 300, "hidden_size": 48, "num_hidden_layers": 2, "max_position_embeddings": 128,
        "initializer_range": 0.02, "attention": attention,
        "ffn": {**ffn, "moe_intermediate_size": 32, "aux_loss_alpha": 0.01},
    })  # fmt: skip
    model = Model(config)
    optimizer = torch.optim.AdamW(model.parameters(), 6e-3)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    for _ in range(200):
        out = model(ids, labels=ids)
        torch.stack((out.loss, *out.aux.values())).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = tmp_path_factory.mktemp("trained") / "model"
    moekit.save(model, folder, tokenizer)
    return folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str]]:
    """Returns a function: the words of a command to its status and what it wrote, tables in one line each."""
    monkeypatch.setenv("COLUMNS", "300")

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["verify", *map(str, words)])
        written = capsys.readouterr()
        return status, written.err if status == 2 else written.out

    return run


def changed(trained: Path, folder: Path, change: Callable[[Model], object]) -> Path:
    """Returns a directory that moekit itself wrote, of the trained model with a change."""
    model = moekit.load(trained)
    with torch.no_grad():
        change(model)
    moekit.save(model, folder, moekit.load_tokenizer(trained))
    return folder


Said = Callable[..., tuple[int, str]]


def test_every_check_holds_for_a_trained_model_and_what_is_converted_from_it(
    trained: Path, tmp_path: Path, said: Said
) -> None:
    status, text = said(trained)
    assert (status, " NO" in text) == (0, False)
    assert f"{trained}: every check held" in text
    (tmp_path / "text.txt").write_text(TEXT)
    for dtype in ("bfloat16", "int8", "int4"):
        assert main(["convert", str(trained), str(tmp_path / dtype), "--dtype", dtype]) == 0
        status, text = said(tmp_path / dtype, "--against", trained, "--text", tmp_path / "text.txt")
        assert status == 0, text
        assert "tokens with the same experts, in the worst layer" in text


def test_one_expert_that_was_never_loaded_is_named(trained: Path, tmp_path: Path, said: Said) -> None:
    def draw(model: Model) -> None:
        model.moe_layers[1].experts.gate_up_proj[5].normal_(0, 0.02)
        model.moe_layers[1].experts.down_proj[5].normal_(0, 0.02)

    status, text = said(changed(trained, tmp_path / "m", draw))
    assert status == 1
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        assert f"matrices that look drawn, not learnt: model.layers.1.mlp.experts.5.{matrix}.weight" in text
    assert text.count("look drawn, not learnt: ") == 3
    assert "1 of 15 checks did not hold" in text


def test_all_experts_left_at_their_initialiser_are_found(trained: Path, tmp_path: Path, said: Said) -> None:
    def draw(model: Model) -> None:
        for layer in model.moe_layers:
            layer.experts.gate_up_proj.normal_(0, 0.02)
            layer.experts.down_proj.normal_(0, 0.02)

    status, text = said(changed(trained, tmp_path / "m", draw), "--json")
    (check,) = (one for one in json.loads(text)["checks"] if not one["held"])
    assert (status, check["name"], check["value"]) == (1, "matrices that look drawn, not learnt", 2 * 8 * 3)


def test_a_fresh_model_holds(trained: Path, tmp_path: Path, said: Said) -> None:
    status, text = said(changed(trained, tmp_path / "m", Model.reset_parameters))
    assert status == 0, text


def test_two_experts_that_changed_places_are_found_by_comparing(trained: Path, tmp_path: Path, said: Said) -> None:
    def swap(model: Model) -> None:
        experts = model.moe_layers[0].experts
        for stacked in (experts.gate_up_proj, experts.down_proj):
            stacked[[2, 6]] = stacked[[6, 2]]

    folder = changed(trained, tmp_path / "m", swap)
    assert said(folder)[0] == 0  # alone it is a sound model
    status, text = said(folder, "--against", trained)
    assert status == 1
    assert "largest relative RMS difference of a tensor: model.layers.0.mlp.experts." in text
    fallen = [line.split("  ")[0].strip() for line in text.splitlines() if line.rstrip().endswith(" NO")]
    assert "mean KL divergence of the next token, nats" in fallen


def test_experts_and_router_renumbered_together_compute_the_same_but_route_elsewhere(
    trained: Path, tmp_path: Path, said: Said
) -> None:
    def renumber(model: Model) -> None:
        layer = model.moe_layers[0]
        for stacked in (layer.experts.gate_up_proj, layer.experts.down_proj, layer.router.weight):
            stacked.copy_(stacked.flip(0))

    status, text = said(changed(trained, tmp_path / "m", renumber), "--against", trained, "--json")
    held = {one["name"]: one["held"] for one in json.loads(text)["checks"]}
    assert status == 1
    assert held["mean KL divergence of the next token, nats"]
    assert not held["tokens with the same experts, in the worst layer"]


def test_a_flipped_bit_a_missing_shard_an_edited_receipt_and_another_config_are_named(
    trained: Path, tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 100_000)
    whole = changed(trained, tmp_path / "whole", lambda model: None)
    shards = sorted(file.name for file in whole.glob("*.safetensors"))
    assert len(shards) > 2
    damages: dict[str, Callable[[Path], object]] = {
        f"files missing or changed since they were written: {shards[0]}": lambda m: flip(m / shards[0]),
        f"files missing or changed since they were written: {shards[1]}": lambda m: (m / shards[1]).unlink(),
        "files missing or changed since they were written: receipt.json": lambda m: edit(m / "receipt.json", "seed", 7),
        "tensors, shapes and types against the config: ": lambda m: edit(
            m / "config.json", "moekit", json.loads((m / "config.json").read_text())["moekit"] | {"hidden_size": 64}
        ),
    }
    for number, (message, damage) in enumerate(damages.items()):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        damage(folder)
        status, text = said(folder)
        assert status == 1
        assert message in text
        assert main(["generate", str(folder), "--prompt", "It"]) == 2 or "receipt" in message


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)


def edit(file: Path, key: str, value: object) -> None:
    files.write_json(file, json.loads(file.read_text()) | {key: value})


def test_json_is_one_document_and_what_cannot_be_read_at_all_is_status_2(
    trained: Path, tmp_path: Path, said: Said
) -> None:
    status, text = said(trained, "--against", trained, "--json")
    document = json.loads(text)
    assert (status, document["held"], document["against"]) == (0, True, str(trained))
    assert all({"name", "value", "bound", "held"} <= check.keys() for check in document["checks"])
    for words, message in (
        ([tmp_path / "none"], "none is not a directory"),
        ([tmp_path], "config.json cannot be read"),
        ([trained, "--against", tmp_path / "none"], "none is not a directory"),
        ([trained, "--text", trained / "config.json"], "it needs --against"),
    ):
        status, text = said(*words)
        assert status == 2
        assert message in text
        assert text.count("\n") == 1

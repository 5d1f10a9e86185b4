"""Lory through a run: dense in warm-up, then copies; resumed to the bit; saved by expert; what it cannot become."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from moekit.cli import main
from moekit.config import ModelConfig, RunConfig, load_model_config, parameters
from moekit.data import prepare
from moekit.errors import ConfigError, UnsupportedError
from moekit.formats.checkpoint import load
from moekit.formats.convert import convert
from moekit.formats.gguf.export import export_gguf
from moekit.nn.model import Model
from moekit.train import optimizer, train
from moekit.train.metrics import read
from moekit.train.state import TENSORS, newest

Configs = Callable[..., RunConfig]
LORY = {"kind": "lory", "intermediate_size": 16, "n_routed_experts": 3, "segment_size": 8, "warmup_steps": 5}


def _pair(tiny_config: Callable[..., ModelConfig]) -> tuple[Model, Model]:
    """Returns a Lory model in warm-up and the dense model that it begins as."""
    lory = Model(tiny_config(ffn={"kind": "lory", "warmup_steps": 3})).train()
    dense = Model(tiny_config(ffn={"kind": "dense", "intermediate_size": 10})).train()
    weights = {name: value for name, value in lory.state_dict().items() if ".mlp." not in name}
    for number in range(2):
        experts = lory.layers[number].mlp.experts
        gate, up = experts.gate_up_proj[0].chunk(2)
        names = (f"layers.{number}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        weights |= dict(zip(names, (gate, up, experts.down_proj[0]), strict=True))
    dense.load_state_dict(weights)
    return lory, dense


def test_warm_up_is_a_dense_models_training_and_leaves_copies_with_their_moments(
    run_config: Configs, tiny_config: Callable[..., ModelConfig]
) -> None:
    lory, dense = _pair(tiny_config)
    owners = [optimizer.build(model, run_config().optimizer) for model in (lory, dense)]
    batches = torch.randint(0, 61, (5, 2, 13))
    for step, ids in enumerate(batches):
        losses, norms = [], []
        for model, owner in zip((lory, dense), owners, strict=True):
            model.begin_step(step)
            losses.append(model(ids, targets=ids).loss)
            losses[-1].backward()
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
            owner[0].step()
            owner[0].zero_grad(set_to_none=True)
            model.end_step(owner)
        if step < 3:
            torch.testing.assert_close(*losses, rtol=1e-5, atol=0)
            torch.testing.assert_close(*norms, rtol=1e-4, atol=0)
        layer = lory.layers[1].mlp
        held = owners[0][0].state[layer.experts.down_proj]
        alike = [bool((t[1:] == t[:1]).all()) for t in (layer.experts.down_proj, held["exp_avg"], held["exp_avg_sq"])]
        assert alike == [step < 3] * 3
        if step == 2:
            gate, up = layer.experts.gate_up_proj[2].chunk(2)
            torch.testing.assert_close(gate, dense.layers[1].mlp.gate_proj.weight, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(up, dense.layers[1].mlp.up_proj.weight, rtol=1e-4, atol=1e-6)
            assert layer.router.weight not in owners[0][0].state  # its own moments begin with it
            outs = [model.eval()(ids).logits for model in (lory, dense)]
            torch.testing.assert_close(*outs, rtol=1e-3, atol=1e-4)
            lory.train(), dense.train()
    assert layer.router.weight in owners[0][0].state


@pytest.mark.parametrize("cut", [3, 7], ids=["in warm-up", "behind it"])
def test_a_resumed_run_ends_with_the_bits_of_a_straight_one(cut: int, run_config: Configs, tmp_path: Path) -> None:
    config = run_config(ffn=LORY, steps=10, save_every=1, keep_checkpoints=10)
    train(config, tmp_path / "straight")
    train(config, tmp_path / "cut")
    for folder in sorted((tmp_path / "cut" / "checkpoints").iterdir())[cut:]:
        folder.rename(tmp_path / f"later-{folder.name}")
    train(config, tmp_path / "cut", resume=True)
    ends = [newest(tmp_path / name) for name in ("straight", "cut")]
    for name in ("model.safetensors", TENSORS):
        first, second = ((end / name).read_bytes() for end in ends if end is not None)
        assert first == second
    loads = [record["load"] for record in read(tmp_path / "straight") if record["kind"] == "train"]
    assert all(dead == 0 for load in loads for dead in load["dead"])
    assert loads[0]["max_violation"] == [0.0, 0.0]  # warm-up: all experts are one
    assert max(loads[-1]["max_violation"]) > 0


def test_a_checkpoint_names_each_expert_and_what_cannot_hold_it_refuses(run_config: Configs, tmp_path: Path) -> None:
    train(run_config(ffn={**LORY, "first_segment": "learned"}, steps=7, save_every=4), tmp_path / "run")
    folder = newest(tmp_path / "run")
    assert folder is not None
    assert main(["verify", str(folder)]) == 0
    assert main(["verify", str(folder.with_name("step-00000004"))]) == 0  # all experts are one
    with safe_open(folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        stacked = file.get_tensor("model.layers.1.mlp.experts.2.up_proj.weight")
    assert {"model.layers.0.mlp.gate.weight", "model.layers.0.mlp.router.first"} <= keys
    model = load(folder)
    assert model.layers[1].mlp.experts.gate_up_proj[2, 16:].equal(stacked)
    assert sum(p.numel() for p in model.parameters()) == model.config.num_parameters
    with pytest.raises(UnsupportedError, match=r"GGUF has no architecture with ffn\.kind lory"):
        export_gguf(folder, tmp_path / "m.gguf")
    with pytest.raises(UnsupportedError, match="no other library's layout can hold this model"):
        convert(folder, tmp_path / "hf", layout="hf")
    assert main(["generate", str(tmp_path / "run"), "--prompt", "What is", "--max-new-tokens", "3"]) == 0


def test_a_first_segment_that_sees_itself_is_said_in_training_and_evaluation(
    run_config: Configs,
    data: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = "in the first 8 tokens of a sequence a token's output depends on later ones"
    with caplog.at_level(logging.WARNING):
        train(run_config(ffn={**LORY, "first_segment": "own"}, steps=6), tmp_path / "run")
        assert said in caplog.text
        caplog.clear()
        assert main(["evaluate", str(tmp_path / "run"), "--data", str(data), "--json"]) == 0
        assert said in caplog.text
    assert said in json.loads(capsys.readouterr().out)["model"]["looks_ahead"]


@pytest.mark.parametrize(
    ("ffn", "settings", "message"),
    [
        ({"segment_size": 32}, {}, "data.sequence_length is 32 but model.ffn.segment_size is 32"),
        ({}, {"optimizer": {"kind": "muon"}}, "optimizer.kind is muon but model.ffn.kind is lory"),
        ({}, {"backend": "native"}, "backend is native but model.ffn.kind is lory"),
        ({"n_routed_experts": 1}, {}, "warmup_steps is 5 but takes effect only with n_routed_experts above 1"),
        ({"first_segment": "next"}, {}, "first_segment"),
        ({}, {"data_order": "similar"}, "has no similar order"),
    ],
)
def test_settings_that_cannot_take_effect_are_refused(
    ffn: dict[str, Any], settings: dict[str, Any], message: str, run_config: Configs, tmp_path: Path
) -> None:
    with pytest.raises(Exception, match=message) as error:
        train(run_config(ffn={**LORY, **ffn}, **settings), tmp_path / "run")
    assert type(error.value).__module__ == "moekit.errors"


def test_a_run_reads_documents_in_the_order_that_it_names(run_config: Configs, data: Path, tmp_path: Path) -> None:
    sources = sorted(data.parent.glob("*.train.jsonl"))
    prepare(sources, tmp_path / "data", valid_fraction=0.1, tokenizer=data, similar=True)
    losses = {}
    for order in ("source", "shuffled", "similar"):
        config = run_config(ffn=LORY, steps=2, data_path=str(tmp_path / "data"), data_order=order)
        receipt = train(config, tmp_path / order)
        losses[order] = read(tmp_path / order)[0]["loss"]
        assert receipt["config"]["data"]["order"] == order
    assert len(set(losses.values())) == 3
    with pytest.raises(ConfigError, match=r"data\.order is source but similar"):
        train(run_config(ffn=LORY, steps=2, data_path=str(tmp_path / "data")), tmp_path / "similar", resume=True)


def test_merging_takes_experts_over_tokens_of_the_networks_flops() -> None:
    flops = {}
    for experts in (1, 8, 32):
        given = {"model.ffn.kind": "lory", "model.ffn.intermediate_size": "256", "model.ffn.segment_size": "256"}
        config = load_model_config("tiny-dense", {**given, "model.ffn.n_routed_experts": str(experts)})
        assert parameters(config)["routed"].active * experts == parameters(config)["routed"].total
        flops[experts] = config.ffn.forward_flops(config.hidden_size, 4096)  # type: ignore[union-attr]
    network = 2 * parameters(config)["routed"].active // config.num_hidden_layers * 4096
    router = 2 * config.hidden_size * 16  # a segment's logits, an expert
    assert (flops[8] - 8 * router) / network == pytest.approx(1 + 8 / 256)  # the paper: 3.1%
    assert (flops[32] - 32 * router) / network == pytest.approx(1 + 32 / 256)  # 12.5%

"""Masked language modelling in a run: its loss by hand, its validation, and that it goes on exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moekit.config import RunConfig
from moekit.errors import ConfigError
from moekit.formats.checkpoint import load
from moekit.nn.model import Model
from moekit.train import train
from moekit.train.hardware import Hardware
from moekit.train.metrics import read
from moekit.train.objectives import open_objective
from moekit.train.objectives.masked import Masked
from moekit.train.state import finished, newest

Configs = Callable[..., RunConfig]
DENSE = {"kind": "dense", "intermediate_size": 48, "hidden_act": "gelu"}


def settings(**others: Any) -> dict[str, Any]:
    model = {"causal": False, "vocab_size": 513} | others.pop("model", {})
    return {"model": model, "objective": {"kind": "masked"}, "ffn": DENSE, **others}


def opened(config: RunConfig) -> Masked:
    objective = open_objective(config, Hardware(torch.device(config.device), False))
    assert isinstance(objective, Masked)
    return objective


def test_a_step_depends_on_the_seed_and_its_number_alone(run_config: Configs) -> None:
    one, two = (opened(run_config(**settings())) for _ in range(2))
    later = one.batch(3)
    one.batch(0)
    assert all((a == b).all() for a, b in zip(later, two.batch(3), strict=True))
    assert (opened(run_config(**settings(seed=1))).batch(3).labels != later.labels).any()
    assert set(later.input_ids[later.labels != -100]) >= {512}  # the id behind the tokenizer's


@pytest.mark.parametrize("micro", [4, 1])
def test_the_first_step_is_cross_entropy_over_the_masked_places(
    run_config: Configs, tmp_path: Path, micro: int
) -> None:
    config = run_config(**settings(steps=1, log_every=1, data_micro_batch_size=micro))
    train(config, tmp_path / "run")
    (record,) = (record for record in read(tmp_path / "run") if record["kind"] == "train")
    batch = opened(config).batch(0)
    torch.manual_seed(config.seed)
    model = Model(config.model).to(config.device).eval()
    labels = torch.from_numpy(batch.labels).to(config.device)
    logits = model(torch.from_numpy(batch.input_ids).to(config.device)).logits
    expected = F.cross_entropy(logits[labels != -100], labels[labels != -100])
    assert record["loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_validation_hides_the_same_for_every_run_and_batch_size(run_config: Configs) -> None:
    torch.manual_seed(1)
    config = run_config(**settings(model={"initializer_range": 0.3}, seed=5))
    model = Model(config.model).to(config.device).train()
    found = opened(config).validate(model)
    other = opened(run_config(**settings(seed=9, data_batch_size=3))).validate(model)
    assert found is not None
    assert other is not None
    assert model.training
    assert found.scores.keys() == {"gov_en", "math_en"}
    for name, score in found.record["domains"].items():
        there = other.record["domains"][name]
        assert score["tokens"] == there["tokens"]
        assert 0.08 * config.eval_tokens < score["tokens"] < 0.22 * config.eval_tokens
        assert (score["loss"], score["accuracy"]) == pytest.approx((there["loss"], there["accuracy"]), rel=1e-5)
    assert found.record["loss"] == pytest.approx(sum(s["loss"] for s in found.scores.values()) / 2)


def test_an_encoder_learns(run_config: Configs, tmp_path: Path) -> None:
    config = run_config(**settings(steps=60, log_every=20, data_batch_size=16, eval_every=30))
    receipt = train(config, tmp_path / "run")
    losses = [record["loss"] for record in read(tmp_path / "run") if record["kind"] == "train"]
    assert losses[-1] < losses[0] - 0.4  # measured: 6.15, 5.62, 5.48
    evals = [record for record in read(tmp_path / "run") if record["kind"] == "eval"]
    assert set(evals[-1]) == {"kind", "step", "tokens", "loss", "accuracy", "domains"}
    assert receipt["health"]["validation"]["gov_en"]["loss"] == evals[-1]["domains"]["gov_en"]["loss"]
    folder = newest(tmp_path / "run")
    assert folder is not None
    assert not load(folder).config.causal


def test_killed_and_resumed_it_ends_with_the_same_bits(run_config: Configs, tmp_path: Path) -> None:
    config = run_config(**settings(steps=6, save_every=2, eval_every=3, data_micro_batch_size=2, ffn={}))
    train(config, tmp_path / "straight")

    class Crash:
        def record(self, record: dict[str, Any]) -> None:
            if record["kind"] == "eval":
                raise MemoryError

        def close(self) -> None:
            pass

    with pytest.raises(MemoryError):
        train(config, tmp_path / "run", sinks=[Crash()])
    assert [folder.name for folder in finished(tmp_path / "run")] == ["step-00000002"]
    train(config, tmp_path / "run", resume=True)
    a, b = newest(tmp_path / "straight"), newest(tmp_path / "run")
    assert a is not None
    assert b is not None
    for name in ("model.safetensors", "training.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    records = [[(r["step"], r["loss"]) for r in read(tmp_path / run)] for run in ("straight", "run")]
    assert records[0] == records[1]


def test_settings_that_contradict_each_other_are_one_line(run_config: Configs) -> None:
    wrong = r"objective.kind is masked but model.causal is true; use objective.kind next_token"
    with pytest.raises(ConfigError, match=wrong):
        run_config(**settings(model={"causal": True}))
    with pytest.raises(ConfigError, match=r"objective.kind is next_token but model.causal is false"):
        run_config(model={"causal": False})
    with pytest.raises(ConfigError, match=r"objective.random_share is 0.3 but mask_share, 0.8, leaves less"):
        run_config(**{**settings(), "objective": {"kind": "masked", "random_share": 0.3}})
    with pytest.raises(ConfigError, match=r"the mask token behind them needs one more; use --model.vocab_size 513"):
        opened(run_config(**settings(model={"vocab_size": 512})))
    with pytest.raises(ConfigError, match=r"mask_token_id 600 needs one more; use --model.vocab_size 601"):
        opened(run_config(**{**settings(), "objective": {"kind": "masked", "mask_token_id": 600}}))

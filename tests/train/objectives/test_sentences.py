"""Sentence tasks in a run: the loss by hand, learning, resuming, saving, scoring, and MEO by a task's description."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moekit.cli import main
from moekit.config import RunConfig
from moekit.errors import ConfigError
from moekit.start import origin
from moekit.train import train
from moekit.train.hardware import Hardware
from moekit.train.metrics import read
from moekit.train.objectives import open_objective
from moekit.train.objectives.sentences import Sentences, _cut
from moekit.train.state import newest

Configs = Callable[..., RunConfig]
DENSE = {"kind": "dense", "intermediate_size": 48, "hidden_act": "gelu"}
MODEL = {"causal": False, "vocab_size": 513, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def encoder(run_config: Configs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps of a masked language model."""
    out = tmp_path_factory.mktemp("encoder") / "run"
    train(run_config(model=MODEL, ffn=DENSE, objective={"kind": "masked"}, steps=2), out)
    return out


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences that praise or blame; the last column says how much, from 0 to 4, by the words of praise."""
    folder, draw = tmp_path_factory.mktemp("task"), random.Random(0)
    for split, count in (("train", 160), ("dev", 50)):
        lines = ["text\tother\tlabel\tnumber"]
        for _ in range(count):
            words = [draw.choice(["fine", "poor"]) for _ in range(4)]
            praise = words.count("fine")
            if praise != 2:
                rest = " ".join(draw.choices(["film", "the", "a", "story", "it"], k=draw.randint(1, 9)))
                label = "good" if praise > 2 else "bad"
                lines.append(f"{' '.join(words)} {rest}\tas {rest}\t{label}\t{praise}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def tuned(run_config: Configs, encoder: Path, task: Path) -> Configs:
    """Returns a factory of runs on the task, from the encoder's weights."""

    def make(
        *, objective: dict[str, Any] | None = None, model: dict[str, Any] | None = None, **settings: Any
    ) -> RunConfig:
        told = {"kind": "sentences", "labels": ["bad", "good"], "metrics": ["accuracy", "f1"], **(objective or {})}
        settings = {"data_path": str(task), "ffn": DENSE, "init": str(encoder), **settings}
        return run_config(model={**MODEL, "num_labels": 2, **(model or {})}, objective=told, **settings)

    return make


def opened(config: RunConfig) -> Sentences:
    assert config.init is not None
    weights = newest(Path(config.init))
    found = open_objective(config, Hardware(torch.device(config.device), False), weights)
    assert isinstance(found, Sentences)
    return found


@pytest.mark.parametrize("micro", [4, 1])
def test_the_first_step_is_the_loss_by_hand(tuned: Configs, tmp_path: Path, micro: int) -> None:
    config = tuned(steps=1, log_every=1, data_micro_batch_size=micro)
    train(config, tmp_path / "run", origin=origin)
    (record,) = (record for record in read(tmp_path / "run") if record["kind"] == "train")
    objective = opened(config)
    batch = objective.batch(0)
    assert len({len(objective.train.tokens[row]) for row in range(9)}) > 1
    torch.manual_seed(config.seed)
    model = origin(config).model.to(config.device).eval()
    total = torch.zeros(())
    for ids, documents, label in zip(batch.input_ids, batch.document_ids, batch.labels, strict=True):
        alone = torch.from_numpy(ids[documents >= 0]).unsqueeze(0).to(config.device)
        assert int(alone[0, -1]) == objective.tokenizer.eos_id
        total += F.cross_entropy(model(alone).scores, torch.tensor([int(label)], device=config.device)).cpu()
    assert record["loss"] == pytest.approx(float(total.detach()) / 4, rel=1e-5)
    assert record["tokens"] == batch.input_ids.size


def test_a_step_depends_on_the_seed_and_its_number_alone_and_an_epoch_has_all(tuned: Configs) -> None:
    one, two = opened(tuned()), opened(tuned())
    assert all((a == b).all() for a, b in zip(one.batch(7), two.batch(7), strict=True))
    count = len(one.train.tokens)
    batches = [one.batch(step) for step in range(-(-count // 4))]
    seen = [
        tuple(ids[documents >= 0])
        for batch in batches
        for ids, documents in zip(batch.input_ids, batch.document_ids, strict=True)
    ]
    assert sorted(seen[:count]) == sorted(tuple(tokens) for tokens in one.train.tokens)


def test_an_encoder_learns_a_task_and_keeps_what_it_learned(
    tuned: Configs, task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipt = train(tuned(steps=60, data_batch_size=16, eval_every=30), tmp_path / "run", origin=origin)
    evals = [record for record in read(tmp_path / "run") if record["kind"] == "eval"]
    assert [record["step"] for record in evals] == [30, 60]
    assert evals[-1]["metrics"]["accuracy"] > 0.9  # measured: 1.0; always the commoner label: 0.54
    assert receipt["health"]["validation"] == {"loss": evals[-1]["loss"], **evals[-1]["metrics"]}
    assert receipt["inputs"]["data"]["examples"]["valid"] == {"examples": evals[-1]["examples"], "truncated": 1}
    assert receipt["tensors"]["dropped"] == {"lm_head.weight": "the model has another head"}
    assert "score.out.weight" in receipt["tensors"]["created"]
    capsys.readouterr()
    for path in (task, task / "dev.tsv"):
        assert main(["evaluate", str(tmp_path / "run"), "--sentences", str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["sentences"]
        assert found["metrics"] == evals[-1]["metrics"]
        assert found["loss"] == pytest.approx(evals[-1]["loss"], rel=1e-4)
    assert main(["verify", str(newest(tmp_path / "run"))]) == 0


def test_numbers_of_pairs_are_learned(tuned: Configs, tmp_path: Path) -> None:
    objective = {"labels": [], "label": "number", "pair": "other", "metrics": None}
    config = tuned(objective=objective, model={"num_labels": 1}, steps=60, data_batch_size=16)
    train(config, tmp_path / "run", origin=origin)
    (record,) = (record for record in read(tmp_path / "run") if record["kind"] == "eval")
    assert record["metrics"].keys() == {"pearson", "spearman"}
    assert record["metrics"]["pearson"] > 0.8  # measured: 0.995
    tokens, eos = opened(config).train.tokens[0], opened(config).tokenizer.eos_id
    assert [place for place, token in enumerate(tokens) if token == eos][1:] == [len(tokens) - 1]


@pytest.mark.parametrize("level", ["task", "token"])
def test_resumed_it_ends_with_the_same_bits(tuned: Configs, tmp_path: Path, level: str) -> None:
    meo = {"kind": "meo", "intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2, "level": level}
    objective = {"description": "Is it praise?"} if level == "task" else {}
    config = tuned(objective=objective, ffn=meo, steps=6, save_every=2, eval_every=3, data_micro_batch_size=2)
    train(config, tmp_path / "straight", origin=origin)

    class Crash:
        def record(self, record: dict[str, Any]) -> None:
            if record["kind"] == "eval":
                raise MemoryError

        def close(self) -> None:
            pass

    with pytest.raises(MemoryError):
        train(config, tmp_path / "run", sinks=[Crash()], origin=origin)
    train(config, tmp_path / "run", resume=True, origin=origin)
    a, b = newest(tmp_path / "straight"), newest(tmp_path / "run")
    assert a is not None
    assert b is not None
    for name in ("model.safetensors", "training.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
    records = [[(r["step"], r["loss"], r["tokens"]) for r in read(tmp_path / run)] for run in ("straight", "run")]
    assert records[0] == records[1]


def test_a_description_reaches_the_gates(tuned: Configs) -> None:
    meo = {"kind": "meo", "intermediate_size": 48, "n_routed_experts": 4, "num_experts_per_tok": 2, "level": "task"}
    one, two = (opened(tuned(objective={"description": text}, ffn=meo)) for text in ("Is it praise?", "A number"))
    model = origin(one.config).model.to(one.config.device).eval()
    for name, parameter in model.named_parameters():
        if "gate" in name or "task" in name:
            parameter.data.normal_()
    batch = one.batch(0)
    chosen = [objective.forward(model, batch).routing for objective in (one, two)]
    assert any((a.weights != b.weights).any() for a, b in zip(*chosen, strict=True))
    ids, real = (torch.from_numpy(part).to(one.config.device) for part in (batch.input_ids, batch.document_ids >= 0))
    described = torch.tensor(one.tokenizer.encode("Is it praise?"), device=ids.device).expand(4, -1)
    by_hand = model(ids, padding_mask=real, task_ids=described).scores
    torch.testing.assert_close(one.forward(model, batch).scores, by_hand)


def test_the_longer_sentence_is_cut_first() -> None:
    assert _cut([[1, 2, 3, 4]], 3) == [[1, 2, 3]]
    assert _cut([[1, 2], [3, 4, 5, 6, 7]], 5) == [[1, 2], [3, 4, 5]]
    assert _cut([[1, 2, 3, 4, 5], [6]], 4) == [[1, 2, 3], [6]]
    assert _cut([[1, 2, 3], [4, 5, 6]], 3) == [[1, 2], [4]]
    assert _cut([[1, 2], [3]], 3) == [[1, 2], [3]]


def test_mistakes_are_one_line(tuned: Configs, run_config: Configs, task: Path) -> None:
    settings = {
        "objective.kind is sentences but model.num_labels is null": {"model": {"num_labels": None}},
        "objective.description takes effect only with model.ffn.kind meo": {"objective": {"description": "praise?"}},
        "data.packing, data.order and data.cross_document_attention have no effect": {"data_packing": "documents"},
    }
    for message, told in settings.items():
        with pytest.raises(ConfigError, match=message):
            tuned(**told)
    with pytest.raises(ConfigError, match=r"objective.kind is masked but model.num_labels is 2; use sentences"):
        run_config(model={**MODEL, "num_labels": 2}, ffn=DENSE, objective={"kind": "masked"})
    with pytest.raises(ConfigError, match=r"num_labels is 3 but the task has 2 labels; use --model.num_labels 2"):
        opened(tuned(model={"num_labels": 3}))
    with pytest.raises(ConfigError, match="num_labels is 2 but the task has numbers, for which it is 1"):
        opened(tuned(objective={"labels": [], "label": "number", "metrics": None}))
    with pytest.raises(ConfigError, match=r"init is missing: objective.kind sentences takes the tokenizer"):
        train(tuned(init=None), task / "run")

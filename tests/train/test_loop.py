"""The training loop on real text: what it computes, records and refuses."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moekit.config import RunConfig, load_run_config
from moekit.data import Batch, Sampler, open_dataset, prepare
from moekit.errors import CheckpointError, ConfigError, DataError, TrainingError, UnsupportedError
from moekit.formats.checkpoint import load
from moekit.nn.model import Model
from moekit.nn.router import HashRouter
from moekit.ops.routing import balanced_hash_table
from moekit.train import directory, hardware, train
from moekit.train.metrics import read
from moekit.train.state import finished, newest

Configs = Callable[..., RunConfig]

GROUPS = {
    "topk_method": "group_limited_greedy",
    "n_group": 4,
    "topk_group": 2,
    "device_aux_loss_alpha": 0.02,
    "comm_aux_loss_alpha": 0.03,
    "z_loss_alpha": 0.001,
}
BIASED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "bias_update_speed": 0.01, "norm_topk_prob": True}


@dataclasses.dataclass
class Recorder:
    """A sink that keeps what it is given, and may do something with it."""

    then: Callable[[dict[str, Any]], None] = lambda record: None
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    closed: int = 0

    def record(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.then(record)

    def close(self) -> None:
        self.closed += 1


def of_kind(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in read(run) if record["kind"] == kind]


def last_model(run: Path) -> Model:
    folder = newest(run)
    assert folder is not None
    return load(folder)


def first_batch(config: RunConfig) -> Batch:
    data = config.data
    return Sampler(open_dataset(data.path, "train"), data.sequence_length, data.batch_size, config.seed).batch(0)


def fresh_model(config: RunConfig) -> Model:
    torch.manual_seed(config.seed)
    return Model(config.model).to(config.device)


@pytest.fixture(scope="module")
def finished_run(
    run_config: Configs, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], Recorder]:
    """A run of 60 steps: its directory, its receipt and what a sink saw."""
    out, sink = tmp_path_factory.mktemp("loop") / "run", Recorder()
    config = run_config(steps=60, log_every=5, eval_every=20, save_every=10, keep_checkpoints=3)
    return out, train(config, out, sinks=[sink]), sink


def test_the_loss_falls_on_real_text(finished_run: tuple[Path, dict[str, Any], Recorder]) -> None:
    run, _, _ = finished_run
    losses = [record["loss"] for record in of_kind(run, "train")]
    assert losses[0] == pytest.approx(math.log(512), abs=0.3)
    assert losses[-1] < losses[0] - 0.7  # measured: 6.26 to 5.15 with this seed
    scores = [record["bits_per_byte"] for record in of_kind(run, "eval")]
    assert scores == sorted(scores, reverse=True)


def test_metrics_hold_every_promised_key(finished_run: tuple[Path, dict[str, Any], Recorder]) -> None:
    run, _, sink = finished_run
    assert read(run) == json.loads(json.dumps(sink.records))
    assert sink.closed == 1
    trained, evals = of_kind(run, "train"), of_kind(run, "eval")
    assert [record["step"] for record in trained] == list(range(5, 61, 5))
    assert [record["step"] for record in evals] == [20, 40, 60]
    keys = {"kind", "step", "tokens", "loss", "grad_norm", "aux", "lr", "seconds", "tokens_per_second"}
    keys |= {"matmul_share", "peak_memory_bytes", "load", "tokens_per_expert"}
    for record in trained:
        assert set(record) == keys
        assert set(record["load"]) == {"max_violation", "entropy", "dead", "router_z"}
        assert all(len(values) == 2 for values in record["load"].values())
        assert record["tokens"] == record["step"] * 4 * 32
        assert [sum(counts) for counts in record["tokens_per_expert"]] == [5 * 4 * 32 * 2] * 2
        assert record["tokens_per_second"] > 0
        assert record["peak_memory_bytes"] > 0
    for record in evals:
        assert set(record) == {"kind", "step", "tokens", "loss", "bits_per_byte", "domains"}
        assert set(record["domains"]) == {"gov_en", "math_en"}  # the third has no validation text
        for domain in record["domains"].values():
            assert set(domain) == {"loss", "bits_per_byte", "tokens", "tokens_per_expert"}
        assert record["loss"] == pytest.approx(sum(d["loss"] for d in record["domains"].values()) / 2)


def test_a_speed_measured_while_the_machine_was_busy_is_measured_again(
    run_config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speeds = iter((1.0, 1e18))
    monkeypatch.setattr(hardware, "matmul_flops", lambda hardware: next(speeds))
    train(run_config(steps=4, log_every=2), tmp_path / "run")
    assert all(0 <= record["matmul_share"] <= 1 for record in of_kind(tmp_path / "run", "train"))
    assert next(speeds, None) is None


def test_a_run_that_is_taken_for_a_model_names_its_newest(finished_run: tuple[Path, dict[str, Any], Recorder]) -> None:
    run, _, _ = finished_run
    with pytest.raises(CheckpointError, match=r"it is a run, whose newest is .*step-00000060"):
        load(run)


def test_a_run_holds_what_the_design_promises(finished_run: tuple[Path, dict[str, Any], Recorder]) -> None:
    run, receipt, _ = finished_run
    assert {entry.name for entry in run.iterdir()} == {"config.yaml", "metrics.jsonl", "checkpoints", "receipt.json"}
    assert json.loads((run / "receipt.json").read_text()) == receipt
    assert receipt["status"] == "done"
    assert receipt["step"] == 60
    assert receipt["health"]["validation"].keys() == {"gov_en", "math_en"}
    assert load_run_config(run / "config.yaml").model_dump(mode="json") == receipt["config"]


def test_only_the_newest_checkpoints_stay(finished_run: tuple[Path, dict[str, Any], Recorder]) -> None:
    run, _, _ = finished_run
    names = [folder.name for folder in finished(run)]
    assert names == ["step-00000040", "step-00000050", "step-00000060"]
    assert sorted(entry.name for entry in (run / "checkpoints").iterdir()) == names
    assert last_model(run).config == load_run_config(run / "config.yaml").model


@pytest.mark.parametrize("ffn", [{}, GROUPS, BIASED, {"kind": "dense", "intermediate_size": 48}])
@pytest.mark.parametrize("across", [True, False])
def test_the_first_step_is_the_models_own_loss_with_each_term_by_itself(
    run_config: Configs, tmp_path: Path, ffn: dict[str, Any], across: bool
) -> None:
    config = run_config(ffn=ffn, steps=1, data_sequence_length=128, data_cross_document_attention=across)
    train(config, tmp_path / "run")
    (record,) = of_kind(tmp_path / "run", "train")
    batch = first_batch(config)
    assert len({len(set(row)) for row in batch.document_ids.tolist()} - {1}) > 0  # a sequence with two documents
    ids, labels, documents = (
        torch.from_numpy(part).to(config.device) for part in (batch.input_ids, batch.labels, batch.document_ids)
    )
    model = fresh_model(config)
    out = model(ids, targets=labels, document_ids=None if across else documents, return_routing=True)
    assert record["loss"] == pytest.approx(float(out.loss.detach()), rel=1e-5)
    assert record["aux"].keys() == out.aux.keys()
    for name, term in out.aux.items():
        assert record["aux"][name] == pytest.approx(float(term.detach()), rel=1e-4)
    expected = [routing.tokens_per_expert.sum(0).tolist() for routing in out.routing]
    assert record["tokens_per_expert"] == expected
    if ffn is GROUPS:
        assert set(record["aux"]) == {"expert_balance", "device_balance", "communication_balance", "router_z"}


def test_closing_attention_between_documents_changes_the_loss(run_config: Configs, tmp_path: Path) -> None:
    losses = []
    for across in (True, False):
        config = run_config(steps=1, data_sequence_length=128, data_cross_document_attention=across)
        train(config, tmp_path / str(across))
        losses += [record["loss"] for record in read(tmp_path / str(across))]
    assert losses[0] != losses[2]  # training
    assert losses[1] != losses[3]  # validation


@pytest.mark.parametrize("ffn", [GROUPS, BIASED])
def test_micro_batches_give_the_same_weights_and_the_same_bias(
    run_config: Configs, tmp_path: Path, ffn: dict[str, Any]
) -> None:
    models, records = [], []
    for size in (1, 2, 4):
        # a large epsilon: with the usual one, a gradient of rounding size would move a weight by a whole step
        config = run_config(ffn=ffn, steps=3, log_every=1, data_micro_batch_size=size, optimizer={"eps": 1e-3})
        train(config, tmp_path / str(size))
        models.append(last_model(tmp_path / str(size)).state_dict())
        records.append(of_kind(tmp_path / str(size), "train"))
    for other, lines in zip(models[:2], records[:2], strict=True):
        for name, value in models[2].items():
            if name.endswith("expert_bias"):
                assert (value != 0).any()
                assert torch.equal(other[name], value), name
            else:
                torch.testing.assert_close(other[name], value, rtol=1e-4, atol=2e-6)
        for one, whole in zip(lines, records[2], strict=True):
            assert one["tokens_per_expert"] == whole["tokens_per_expert"]
            assert one["loss"] == pytest.approx(whole["loss"], rel=1e-5)
            assert one["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
            assert one["aux"] == pytest.approx(whole["aux"], rel=1e-4)


def test_the_bias_moves_once_per_step_by_gamma_towards_balance_of_the_global_batch(
    run_config: Configs, tmp_path: Path
) -> None:
    config = run_config(ffn=BIASED, steps=7, log_every=1, data_micro_batch_size=1)
    train(config, tmp_path / "run")
    expected = torch.zeros(2, 8)
    for record in of_kind(tmp_path / "run", "train"):
        load_now = torch.tensor(record["tokens_per_expert"], dtype=torch.float64)
        assert (load_now.sum(1) == 4 * 32 * 2).all()
        expected += 0.01 * torch.sign(load_now.mean(1, keepdim=True) - load_now).float()
    found = torch.stack([layer.router.expert_bias for layer in last_model(tmp_path / "run").moe_layers])
    assert torch.equal(found, expected)
    assert found.abs().max() > 0.01


def test_global_balance_counts_the_micro_batches_before(run_config: Configs, tmp_path: Path) -> None:
    ffn = {"seq_aux": False, "global_aux": True, "aux_loss_alpha": 1.0}
    config = run_config(ffn=ffn, steps=1, data_micro_batch_size=1, data_batch_size=2)
    train(config, tmp_path / "run")
    ids = torch.from_numpy(first_batch(config).input_ids).to(config.device)
    model = fresh_model(config)
    expected = 0.0
    for layer in range(2):
        loads, shares = [], []
        for row in range(2):
            routing = model(ids[row : row + 1], return_routing=True).routing[layer]
            loads.append(routing.tokens_per_expert.sum(0).double())
            shares.append(routing.scores.detach().double().mean(0))
        first = (loads[0] / 32 * 8 / 2 * shares[0]).sum()
        second = ((loads[0] + loads[1]) / 64 * 8 / 2 * shares[1]).sum()
        expected += float(first + second) / 2
    assert of_kind(tmp_path / "run", "train")[0]["aux"]["expert_balance"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("ffn", [BIASED, GROUPS])
def test_recomputing_activations_changes_no_bit(run_config: Configs, tmp_path: Path, ffn: dict[str, Any]) -> None:
    for recompute in (False, True):
        train(run_config(ffn=ffn, steps=4, recompute=recompute), tmp_path / str(recompute))
    a, b = (last_model(tmp_path / name).state_dict() for name in ("False", "True"))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    losses = [[record["loss"] for record in read(tmp_path / name)] for name in ("False", "True")]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"model": {"attention": {"kind": "mla", "num_attention_heads": 2, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                                 "qk_rope_head_dim": 8, "v_head_dim": 8}}},
        {"optimizer": {"kind": "muon"}},
        {"ffn": {"capacity_factor": 1.0, "drop_policy": "score"}},
        {"ffn": {"topk_method": "hash", "aux_loss_alpha": 0.0}},
        {"model": {"tie_word_embeddings": True}},
        {"precision": "bfloat16"},
        {"schedule": {"kind": "cosine", "warmup_steps": 2}, "grad_clip": None},
    ],
    ids=["mla", "muon", "capacity", "hash", "tied", "bfloat16", "unclipped"],
)  # fmt: skip
def test_every_kind_of_model_and_setting_learns(run_config: Configs, tmp_path: Path, settings: dict[str, Any]) -> None:
    train(run_config(steps=10, log_every=1, **settings), tmp_path / "run")
    losses = [record["loss"] for record in of_kind(tmp_path / "run", "train")]
    assert losses[-1] < losses[0]
    assert {p.dtype for p in last_model(tmp_path / "run").parameters()} == {torch.float32}


def test_a_balanced_hash_table_is_filled_from_the_datas_counts(run_config: Configs, tmp_path: Path, data: Path) -> None:
    ffn = {"topk_method": "hash", "hash_method": "balanced", "aux_loss_alpha": 0.0}
    train(run_config(ffn=ffn, steps=1, model={"vocab_size": 520}), tmp_path / "run")
    counts = torch.zeros(520, dtype=torch.int64)
    counts[:512] = torch.from_numpy(open_dataset(data, "train").token_counts())
    for layer in last_model(tmp_path / "run").moe_layers:
        assert isinstance(layer.router, HashRouter)
        assert torch.equal(layer.router.table, balanced_hash_table(counts, 8, 2))
        load_of = torch.zeros(8, dtype=torch.int64).index_add(
            0, layer.router.table.flatten(), counts.repeat_interleave(2)
        )
        assert load_of.max() - load_of.min() <= counts.max()


def test_an_expert_that_died_raises_one_alarm(
    run_config: Configs, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ffn = {"n_routed_experts": 48, "num_experts_per_tok": 1}  # 16 tokens cannot reach 48 experts
    sizes = {"data_sequence_length": 16, "data_batch_size": 1}
    train(run_config(ffn=ffn, steps=8, log_every=1, dead_after=2, **sizes), tmp_path / "run")
    idle, expected = [[0] * 48 for _ in range(2)], []
    for record in of_kind(tmp_path / "run", "train"):
        for layer, counts in enumerate(record["tokens_per_expert"]):
            assert record["load"]["dead"][layer] == counts.count(0)
            idle[layer] = [0 if count else before + 1 for count, before in zip(counts, idle[layer], strict=True)]
            expected += [(record["step"], layer, expert) for expert, n in enumerate(idle[layer]) if n == 2]
    alarms = of_kind(tmp_path / "run", "alarm")
    assert [(alarm["step"], alarm["layer"], expert) for alarm in alarms for expert in alarm["experts"]] == expected
    assert len(expected) >= 16
    assert len({(layer, expert) for _, layer, expert in expected}) < len(expected)  # told again after it lived
    assert len(alarms) < len(expected)  # one line a layer, not one an expert
    for alarm in alarms:
        assert f"of layer {alarm['layer']} " in alarm["text"]
        assert "had no token for 2 steps" in alarm["text"]
        assert all(str(expert) in alarm["text"] for expert in alarm["experts"])
    assert caplog.messages.count(alarms[0]["text"]) == 1


def poison(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Makes a weight infinite once `after` steps are done: a broken memory cell, say."""
    steps, update = [0], Model.update_expert_bias

    def and_break(model: Model, loads: Any) -> None:
        update(model, loads)
        steps[0] += 1
        if steps[0] == after:
            model.norm.weight.data[0] = math.inf

    monkeypatch.setattr(Model, "update_expert_bias", and_break)


@pytest.mark.parametrize(("after", "good"), [(5, 4), (4, 2), (3, 2)])
def test_a_loss_that_is_not_finite_stops_and_names_the_last_good_checkpoint(
    run_config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, good: int
) -> None:
    poison(monkeypatch, after)
    sink = Recorder()
    with pytest.raises(TrainingError) as caught:
        train(run_config(steps=9, save_every=2, keep_checkpoints=9), tmp_path / "run", sinks=[sink])
    message = str(caught.value)
    assert "\n" not in message
    assert f"at step {after + 1}," in message
    assert f"the last good checkpoint is {tmp_path / 'run' / 'checkpoints'}/step-{good:08d};" in message
    assert all(p.isfinite().all() for p in load(tmp_path / "run" / "checkpoints" / f"step-{good:08d}").parameters())
    assert sink.closed == 1


def test_a_rate_far_too_high_stops_with_no_good_checkpoint(run_config: Configs, tmp_path: Path) -> None:
    config = run_config(steps=9, save_every=1, grad_clip=None, optimizer={"lr": 1e30})
    with pytest.raises(TrainingError, match="there is no good checkpoint yet"):
        train(config, tmp_path / "run")


def test_an_existing_run_is_refused_and_untouched(
    run_config: Configs, finished_run: tuple[Path, dict[str, Any], Recorder], tmp_path: Path
) -> None:
    run, _, _ = finished_run
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=r"exists already; use --resume"):
        train(run_config(), run)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"exists already"):
        train(run_config(), tmp_path / "file")


def test_an_empty_directory_is_free(run_config: Configs, tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.writing").write_text("half of it, from a killed start")
    assert train(run_config(steps=1), tmp_path)["status"] == "done"


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"model": {"vocab_size": 511}},
            ConfigError,
            "model.vocab_size is 511 but the tokenizer of .* has 512 entries",
        ),
        ({"data_path": "nowhere"}, DataError, "nowhere is not a dataset"),
        ({"data_sequence_length": 200_000, "model": {"max_position_embeddings": 200_000}}, DataError, "fewer than one"),
        ({"device": "gpu"}, ConfigError, "device is 'gpu'"),
        ({"device": "cuda:99"}, UnsupportedError, "device is 'cuda:99'"),
        ({"backend": "grouped", "precision": "float32"}, UnsupportedError, "backend is 'grouped'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_directory(
    run_config: Configs, tmp_path: Path, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    sink = Recorder()
    with pytest.raises(error, match=message) as caught:
        train(run_config(**settings), tmp_path / "run", sinks=[sink])
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert sink.closed == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": {"lr": 0.002}}, "optimizer.lr is 0.002 but 0.003 in"),
        ({"optimizer": {"kind": "muon", "lr": 0.003}}, "optimizer.kind is muon but adamw in"),
        ({"ffn": {"n_routed_experts": 16}}, "model.ffn.n_routed_experts is 16 but 8 in"),
        ({"model": {"hidden_size": 64}}, "model.hidden_size is 64 but 32 in"),
        ({"schedule": {"kind": "cosine"}}, "schedule.kind is cosine but constant in"),
        ({"steps": 61}, "steps is 61 but 60 in"),
        ({"seed": 1}, "seed is 1 but 0 in"),
        ({"grad_clip": None}, "grad_clip is None but 1.0 in"),
        ({"data_sequence_length": 64}, "data.sequence_length is 64 but 32 in"),
        ({"data_batch_size": 8}, "data.batch_size is 8 but 4 in"),
        ({"data_cross_document_attention": False}, "data.cross_document_attention is False but True in"),
    ],
)
def test_a_resumed_run_keeps_its_settings(
    run_config: Configs,
    finished_run: tuple[Path, dict[str, Any], Recorder],
    change: dict[str, Any],
    message: str,
) -> None:
    run, _, _ = finished_run
    before = (run / "config.yaml").read_bytes()
    with pytest.raises(ConfigError) as caught:
        train(run_config(**{"steps": 60, **change}), run, resume=True)
    assert str(caught.value) == f"{message} {run / 'config.yaml'}; a resumed run must keep it, start a new one instead"
    assert (run / "config.yaml").read_bytes() == before


def test_a_run_is_resumed_on_its_own_text_only(
    run_config: Configs, finished_run: tuple[Path, dict[str, Any], Recorder], data: Path, tmp_path: Path
) -> None:
    run, _, _ = finished_run
    texts = sorted(data.parent.glob("*.train.jsonl"))[:2]
    prepare(texts, tmp_path / "other", valid_paths=sorted(data.parent.glob("*.valid.jsonl")), tokenizer=data)
    with pytest.raises(ConfigError, match="holds other text than the run was started with"):
        train(run_config(steps=60, data_path=str(tmp_path / "other")), run, resume=True)


def test_there_must_be_a_run_to_resume(run_config: Configs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no config\.yaml, so there is no run to resume"):
        train(run_config(), tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()


def test_data_without_validation_text_trains_without_evals(run_config: Configs, data: Path, tmp_path: Path) -> None:
    prepare(sorted(data.parent.glob("*.train.jsonl"))[:1], tmp_path / "d", valid_fraction=0.0, tokenizer=data)
    receipt = train(run_config(steps=2, eval_every=1, data_path=str(tmp_path / "d")), tmp_path / "run")
    assert receipt["health"]["validation"] == {}
    assert of_kind(tmp_path / "run", "eval") == []


@pytest.mark.parametrize("packing", ["stream", "documents"])
@pytest.mark.parametrize("across", [True, False])
def test_the_loss_is_the_mean_over_answers_whatever_the_micro_batches(
    packing: str, across: bool, prompted: Path, run_config: Configs, tmp_path: Path
) -> None:
    settings = {"data_path": str(prompted), "data_packing": packing, "data_cross_document_attention": across}
    losses = []
    for size in (4, 1):
        config = run_config(steps=1, log_every=1, data_micro_batch_size=size, **settings)
        train(config, tmp_path / str(size))
        losses.append(of_kind(tmp_path / str(size), "train")[0]["loss"])
    torch.manual_seed(config.seed)
    model = Model(config.model)
    batch = Sampler(open_dataset(prompted, "train"), 32, 4, config.seed, config.data.packing).batch(0)
    total, count = 0.0, 0
    for ids, labels, documents in zip(*map(torch.from_numpy, batch), strict=True):
        real = documents >= 0  # a sequence by itself, without its padding
        document_ids = None if across else documents[real][None]
        logits = model(ids[real][None], document_ids=document_ids).logits[0]
        answers = labels[real] != -100
        nats = torch.nn.functional.cross_entropy(logits[answers].detach(), labels[real][answers], reduction="sum")
        total, count = total + float(nats), count + int(answers.sum())
    assert count < 0.8 * batch.labels.size
    assert losses == pytest.approx([total / count] * 2, rel=1e-5)


def test_a_batch_of_prompts_alone_is_survived(run_config: Configs, data: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "a long question without end, " * 40, "text": "no"}] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prepare([tmp_path / "a.jsonl"], tmp_path / "data", valid_fraction=0, tokenizer=data, prompt_field="prompt")
    receipt = train(run_config(data_path=str(tmp_path / "data"), data_batch_size=1, steps=4), tmp_path / "run")
    assert receipt["status"] == "done"


def test_a_run_that_another_process_holds_is_refused(run_config: Configs, tmp_path: Path) -> None:
    with directory.locked(tmp_path / "run"):
        for resume in (False, True):
            if resume:
                directory.claim(tmp_path / "run", run_config())
            with pytest.raises(ConfigError, match=r"another process is at work in .*run; wait for it, or end it"):
                train(run_config(), tmp_path / "run", resume=resume)
    assert train(run_config(), tmp_path / "run", resume=True)["status"] == "done"

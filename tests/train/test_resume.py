"""A killed run, resumed, ends with the bits of a straight one: weights, optimiser, bias, counters and metrics."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from moekit.config import RunConfig, dump
from moekit.errors import CheckpointError
from moekit.formats.checkpoint import load
from moekit.formats.directory import check_directory
from moekit.train import state, train
from moekit.train.metrics import FILE, read
from moekit.train.state import STATE, TENSORS, finished, folder_of, newest

Configs = Callable[..., RunConfig]
TIMING = ("seconds", "tokens_per_second", "matmul_share", "peak_memory_bytes")

SETTINGS: dict[str, Any] = {
    "steps": 12,
    "log_every": 5,  # no divisor of save_every: log windows are cut by the kills
    "eval_every": 4,
    "save_every": 3,
    "keep_checkpoints": 2,
    "dead_after": 1,
    "optimizer": {"kind": "muon", "lr": 3e-3},
    "schedule": {"kind": "step", "warmup_steps": 3},
    "ffn": {
        "n_routed_experts": 32,  # some are idle at times, so that the dead counters count
        "num_experts_per_tok": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "bias_update_speed": 0.003,
        "z_loss_alpha": 0.001,
    },
    "data_sequence_length": 16,
    "data_batch_size": 2,
    "data_micro_batch_size": 1,
}


class Stop:
    """A sink that does something at the train record of a step."""

    def __init__(self, step: int, action: Callable[[], None]) -> None:
        self.step, self.action = step, action

    def record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train" and record["step"] == self.step:
            self.action()

    def close(self) -> None:
        pass


def crash() -> None:
    raise MemoryError("the machine is gone")


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def assert_same_end(straight: Path, resumed: Path) -> None:
    """Both runs have the same newest checkpoint, to the bit, and the same measurements; times apart."""
    a, b = newest(straight), newest(resumed)
    assert a is not None
    assert b is not None
    assert a.name == b.name
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()
    ours, theirs = load_file(a / TENSORS), load_file(b / TENSORS)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    states = [json.loads((folder / STATE).read_text()) for folder in (a, b)]
    for one in states:
        del one["seconds"]
    assert states[0] == states[1]
    records = [read(run) for run in (straight, resumed)]
    for record in [record for run in records for record in run]:
        for key in TIMING:
            record.pop(key, None)
    assert records[0] == records[1]
    assert [folder.name for folder in finished(straight)] == [folder.name for folder in finished(resumed)]


@pytest.fixture(scope="module")
def straight(run_config: Configs, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that nothing interrupted."""
    run = tmp_path_factory.mktemp("straight") / "run"
    assert train(run_config(**SETTINGS), run)["status"] == "done"
    return run


def test_the_straight_run_holds_what_could_differ(straight: Path) -> None:
    folder = newest(straight)
    assert folder is not None
    tensors = load_file(folder / TENSORS)
    assert {name.split("/")[0] for name in tensors} >= {"optimizer", "other", "random"}
    assert {name.split("/")[1] for name in tensors if name.startswith("optimizer")} == {
        "exp_avg",
        "exp_avg_sq",
        "step",
        "momentum",
    }
    assert {name for name in tensors if name.startswith("other")} == {
        "other/idle",
        "other/window/tokens_per_expert",
        "other/window/units",
        "other/window/squared_lse",
    }
    assert tensors["other/idle"].max() > 0
    assert all(layer.router.expert_bias.abs().max() > 0 for layer in load(folder).moe_layers)
    kinds = [record["kind"] for record in read(straight)]
    assert {"train", "eval", "alarm"} == set(kinds)


# A process that trains and is killed in each of its children but the last: SIGKILL comes so many seconds after the
# start of the given step.
KILLED = """
import json, os, signal, sys, threading
import torch
from moekit.config import load_run_config
from moekit.nn.model import Model
from moekit.train import state, train

torch.set_num_threads(1)
config, out, kills = load_run_config(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
update = Model.update_expert_bias
for number, kill in enumerate([*kills, None]):
    child = os.fork()
    if child == 0:
        steps = [0]
        def update_and_count(model, loads):
            update(model, loads)
            steps[0] += 1
            if kill is not None and steps[0] == kill[0]:
                threading.Timer(kill[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
        Model.update_expert_bias = update_and_count
        train(config, out, resume=os.path.exists(out + "/config.yaml"))
        if kill is not None:
            signal.pause()  # the timer is on its way
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == (0 if kill is None else -signal.SIGKILL), status
"""


def train_and_kill(config: RunConfig, folder: Path, kills: Sequence[tuple[int, float]]) -> Path:
    (folder / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-c", KILLED, str(folder / "config.yaml"), str(folder / "run"), json.dumps(kills)]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_killed_at_three_random_moments_it_ends_with_the_same_bits(
    run_config: Configs, tmp_path: Path, straight: Path
) -> None:
    generator = torch.Generator().manual_seed(2)
    steps = torch.randint(1, 5, (3,), generator=generator).tolist()  # of each life; a step takes about 0.02 s
    delays = (0.04 * torch.rand(3, generator=generator)).tolist()
    run = train_and_kill(run_config(**SETTINGS), tmp_path, list(zip(steps, delays, strict=True)))
    assert_same_end(straight, run)
    assert not list((run / "checkpoints").glob(".*"))


@pytest.mark.parametrize(
    "settings",
    [
        {"ffn": {"kind": "dense", "intermediate_size": 48}, "optimizer": {"kind": "adamw"}},
        {"ffn": {"topk_method": "hash", "hash_method": "balanced", "aux_loss_alpha": 0.0}, "precision": "bfloat16"},
        {"model": {"tie_word_embeddings": True}, "grad_clip": None, "schedule": {"kind": "cosine"}, "recompute": True},
    ],
    ids=["dense", "hash", "tied"],
)
def test_crashed_and_resumed_other_models_end_with_the_same_bits(
    run_config: Configs, tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = run_config(**{**SETTINGS, "steps": 7, **settings})
    train(config, tmp_path / "straight")
    with pytest.raises(MemoryError):
        train(config, tmp_path / "run", sinks=[Stop(5, crash)])
    assert train(config, tmp_path / "run", resume=True)["status"] == "done"
    assert_same_end(tmp_path / "straight", tmp_path / "run")


def test_killed_before_the_first_checkpoint_it_starts_again(
    run_config: Configs, tmp_path: Path, straight: Path
) -> None:
    config = run_config(**{**SETTINGS, "log_every": 1})
    with pytest.raises(MemoryError):
        train(config, tmp_path / "run", sinks=[Stop(2, crash)])
    assert finished(tmp_path / "run") == []
    assert [record["step"] for record in read(tmp_path / "run") if record["kind"] == "train"] == [1, 2]
    train(run_config(**SETTINGS), tmp_path / "run", resume=True)  # how often it logs may change
    assert_same_end(straight, tmp_path / "run")


def interrupted(run_config: Configs, run: Path, step: int = 5) -> dict[str, Any]:
    return train(run_config(**SETTINGS), run, sinks=[Stop(step, terminate)])


def test_sigterm_saves_says_so_and_resumes_exactly(run_config: Configs, tmp_path: Path, straight: Path) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    receipt = interrupted(run_config, tmp_path / "run")
    assert receipt["status"] == "interrupted"
    assert receipt["signal"] == signal.SIGTERM
    assert receipt["step"] == 5
    assert newest(tmp_path / "run") == folder_of(tmp_path / "run", 5)
    assert json.loads((tmp_path / "run" / "receipt.json").read_text()) == receipt
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    again = train(run_config(**SETTINGS), tmp_path / "run", resume=True)
    assert again["status"] == "done"
    assert "signal" not in again
    # the extra checkpoint at step 5 has gone by now
    assert_same_end(straight, tmp_path / "run")


def test_a_signal_in_the_middle_of_a_save_ends_the_run_after_the_next_step(
    run_config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run_config(**{**SETTINGS, "save_every": 4})
    real = state.write

    def write_and_be_told(*arguments: Any) -> Path:
        folder = real(*arguments)
        if folder.name == "step-00000004":
            terminate()  # once: a second signal would act as usual
        return folder

    monkeypatch.setattr(state, "write", write_and_be_told)
    receipt = train(config, tmp_path / "run")
    assert receipt["status"] == "interrupted"
    assert receipt["step"] == 5
    assert newest(tmp_path / "run") == folder_of(tmp_path / "run", 5)


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(
    run_config: Configs, tmp_path: Path, straight: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupted(run_config, tmp_path / "run")
    damaged = folder_of(tmp_path / "run", 5) / TENSORS
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    train(run_config(**SETTINGS), tmp_path / "run", resume=True)
    assert any("skipping a damaged checkpoint" in text and str(damaged) in text for text in caplog.messages)
    assert_same_end(straight, tmp_path / "run")


def test_a_run_that_went_back_behind_a_damaged_checkpoint_keeps_its_own_newest(
    run_config: Configs, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    train(run_config(steps=8, save_every=2, keep_checkpoints=9), run)
    for step in (4, 6, 8):
        (folder_of(run, step) / "config.json").unlink()
    config = run_config(steps=8, save_every=1, keep_checkpoints=1, log_every=1)
    receipt = train(config, run, resume=True, sinks=[Stop(3, terminate)])
    assert receipt["step"] == 3
    assert newest(run) == folder_of(run, 3)
    check_directory(folder_of(run, 3))
    assert train(config, run, resume=True)["status"] == "done"
    assert finished(run) == [folder_of(run, 8)]
    check_directory(folder_of(run, 8))


def test_when_every_checkpoint_is_damaged_nothing_is_touched(run_config: Configs, tmp_path: Path) -> None:
    interrupted(run_config, tmp_path / "run")
    for folder in finished(tmp_path / "run"):
        shutil.rmtree(folder)
        folder.mkdir()
    before = (tmp_path / "run" / FILE).read_bytes()
    with pytest.raises(
        CheckpointError, match=r"none of the \d+ checkpoints is whole; remove .*checkpoints to start again"
    ):
        train(run_config(**SETTINGS), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / FILE).read_bytes() == before


def test_a_metrics_line_that_a_kill_cut_is_made_again(run_config: Configs, tmp_path: Path, straight: Path) -> None:
    interrupted(run_config, tmp_path / "run")
    file = tmp_path / "run" / FILE
    file.write_text(file.read_text() + '{"kind": "train", "step": 6, "load": {"ma')
    train(run_config(**SETTINGS), tmp_path / "run", resume=True)
    assert_same_end(straight, tmp_path / "run")


def test_leftovers_of_a_kill_are_swept_away(run_config: Configs, tmp_path: Path, straight: Path) -> None:
    interrupted(run_config, tmp_path / "run")
    for name in (".step-00000006.writing-1", ".step-00000003.removed", ".step-00000006.replaced-1"):
        (tmp_path / "run" / "checkpoints" / name).mkdir()
        (tmp_path / "run" / "checkpoints" / name / "model.safetensors").touch()
    train(run_config(**SETTINGS), tmp_path / "run", resume=True)
    assert_same_end(straight, tmp_path / "run")
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_resuming_a_finished_run_changes_nothing(run_config: Configs, tmp_path: Path, straight: Path) -> None:
    shutil.copytree(straight, tmp_path / "run")
    receipt = train(run_config(**SETTINGS), tmp_path / "run", resume=True)
    assert receipt["status"] == "done"
    assert receipt["step"] == 12
    assert_same_end(straight, tmp_path / "run")


def test_a_checkpoint_of_a_run_is_a_model_directory(straight: Path) -> None:
    folder = newest(straight)
    assert folder is not None
    receipt = json.loads((folder / "receipt.json").read_text())
    assert receipt["action"] == "train"
    assert receipt["outputs"]["model.safetensors"] == check_directory(folder)["model.safetensors"]
    assert load(folder).config.num_parameters == sum(p.numel() for p in load(folder).parameters())

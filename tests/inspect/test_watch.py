"""Watching a run: every record once, whatever the file is doing, and a picture of load and domains."""

import gzip
import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import moekit.quickstart
from moekit import files
from moekit.config import RunConfig, dump
from moekit.data import prepare
from moekit.errors import ConfigError
from moekit.inspect.watch import Follower, State, after, latest, picture, status, use_of, watch
from moekit.train import train
from moekit.train.metrics import FILE, read

TEXT = Path(moekit.quickstart.__file__).parent / "text"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few documents of three domains of the package's text."""
    folder = tmp_path_factory.mktemp("text")
    for domain, split in itertools.product(("math_en", "poetry_zh", "spec_en"), ("train", "valid")):
        with gzip.open(TEXT / f"{domain}.{split}.jsonl.gz", "rb") as file:
            (folder / f"{domain}.{split}.jsonl").write_bytes(b"".join(itertools.islice(file, 6)))
    trains, valids = (sorted(folder.glob(f"*.{split}.jsonl")) for split in ("train", "valid"))
    prepare(trains, folder / "data", valid_paths=valids, vocab_size=512)
    return folder / "data"


def config(data: Path, **settings: Any) -> RunConfig:
    ffn = {"kind": "moe", "n_routed_experts": 9, "n_shared_experts": 1, "num_experts_per_tok": 2}
    model = {
        "vocab_size": 512,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "attention": {"kind": "mha", "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16},
        "ffn": {**ffn, "moe_intermediate_size": 16, "first_k_dense_replace": 1, "intermediate_size": 32},
    }
    tree = {
        "model": model,
        "data": {"path": str(data), "sequence_length": 32, "batch_size": 2},
        "schedule": {"kind": "constant"},
        "steps": 6,
        "log_every": 2,
        "eval_every": 3,
        "eval_tokens": 96,
        "save_every": 3,
        "precision": "float32",
        "device": "cpu",
    }
    return RunConfig.model_validate({**tree, **settings})


def console(terminal: bool = False, width: int = 90, height: int = 40) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=terminal, width=width, height=height, color_system=None), out


def shown(state: State, of: RunConfig, **size: int) -> str:
    screen, out = console(**size)
    screen.print(picture(state, of, "running", screen))
    return out.getvalue()


# the file


def test_records_come_once_and_a_half_written_one_when_it_is_whole(tmp_path: Path) -> None:
    file = tmp_path / FILE
    follower = Follower(file)
    assert follower.new() == (False, [])  # not there yet
    record = json.dumps({"kind": "alarm", "step": 1, "text": "ä"}).encode()
    with file.open("ab", buffering=0) as writing:
        writing.write(record + b"\n" + record[:9])
        assert [one["step"] for one in follower.new()[1]] == [1]
        assert follower.new() == (False, [])
        writing.write(record[9:])
        assert follower.new() == (False, [])
        writing.write(b"\n")
        assert [one["text"] for one in follower.new()[1]] == ["ä"]


def test_what_is_no_record_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(
        b'{"kind": "train", "st\n\xff\xfe\n\n[1]\n3\n{"step": 2}\n{"kind": "eval", "step": 5}\n'
    )
    assert Follower(tmp_path / FILE).new() == (True, [{"kind": "eval", "step": 5}])


def test_a_file_that_was_written_anew_is_read_from_its_beginning_even_if_it_is_longer(tmp_path: Path) -> None:
    lines = [json.dumps({"kind": "train", "step": step}) + "\n" for step in range(9)]
    (tmp_path / FILE).write_text("".join(lines[:4]))
    follower = Follower(tmp_path / FILE)
    assert len(follower.new()[1]) == 4
    files.write(tmp_path / FILE, "".join(lines))
    anew, records = follower.new()
    assert anew
    assert [record["step"] for record in records] == list(range(9))


# a run


def test_a_training_process_is_watched_from_before_it_exists_to_its_end(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump(config(data)))
    run = tmp_path / "run"
    words = [sys.executable, "-m", "moekit", "train", "run.yaml", "--out", "run", "--quiet"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        screen, out = console()
        state = watch(run, screen, poll=0.01)
        assert process.wait() == 0
    records = read(run)
    assert len(records) == 3 + 2
    waiting, *lines = out.getvalue().splitlines()
    assert waiting == f"waiting for {run / FILE}"
    assert [line.split()[1].split("/")[0] for line in lines] == [str(record["step"]) for record in records]
    assert lines[0].startswith(f"step 2/6  loss {records[0]['loss']:.4f}")
    assert "experts of its own: math_en " in lines[-1]
    assert state.train == records[-2]
    assert state.eval == records[-1]
    assert len(state.own) == 2
    document = latest(run)
    assert (document["status"], document["steps"], document["eval"]) == ("done", 6, records[-1])
    json.dumps(document)


def test_a_resumed_run_is_seen_and_its_lines_are_not_told_twice(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"

    class Interrupt:
        def record(self, record: dict[str, Any]) -> None:
            if record["kind"] == "train" and record["step"] == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        def close(self) -> None: ...

    assert train(config(data), run, sinks=[Interrupt()])["status"] == "interrupted"
    assert status(run) == "interrupted"
    with (run / FILE).open("a") as file:  # what a kill would have left behind; the run has not ended now
        file.write('{"kind": "train", "step": 5, "lo')
    os.utime(run / FILE, ns=(time.time_ns() + 10**9,) * 2)
    assert status(run) == "running"
    screen, out = console()
    watcher = threading.Thread(target=watch, args=(run, screen, 0.01))
    watcher.start()
    while out.getvalue().count("\n") < 3:
        time.sleep(0.01)
    train(config(data), run, resume=True)
    watcher.join(60)
    assert not watcher.is_alive()
    told = [line.split()[1].split("/")[0] for line in out.getvalue().splitlines()]
    assert told == [str(record["step"]) for record in read(run)]


def test_in_a_terminal_the_picture_ends_as_the_runs_last_state(data: Path, tmp_path: Path) -> None:
    of = config(data, steps=2)
    train(of, tmp_path / "run")
    screen, out = console(terminal=True)
    watch(tmp_path / "run", screen)
    assert "waiting for" in out.getvalue()
    assert "done  step 2/2  loss" in out.getvalue()
    assert out.getvalue().count("\x1b[?25h") == 1  # the cursor is given back


def test_ctrl_c_ends_the_watching_of_a_run_without_an_end_in_order(data: Path, tmp_path: Path) -> None:
    train(config(data, steps=2), tmp_path / "run")
    (tmp_path / "run" / "receipt.json").unlink()  # as if it had been killed
    code = "from pathlib import Path; from moekit.inspect.watch import watch; state = watch(Path('run'), poll=0.01)"
    words = [sys.executable, "-u", "-c", f"{code}; print('ended after', state.train['step'])"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert [line.split()[1] for line in lines] == ["2/2", "2"]
    assert (rest, process.returncode) == ("ended after 2\n", 0)


def test_what_holds_no_run_is_an_error_and_a_run_that_has_not_begun_has_no_state(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for place in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(
            ConfigError, match=r"has no config\.yaml, so it is no training run; give what `moekit train"
        ):
            watch(place)
    with pytest.raises(ConfigError, match=r"nowhere has no metrics.jsonl yet"):
        latest(tmp_path / "nowhere")


# the picture

TRAIN: dict[str, Any] = {
    "kind": "train",
    "step": 6,
    "loss": 2.5,
    "lr": 1e-3,
    "tokens_per_second": 1000.0,
    "matmul_share": 0.4,
    "load": {"max_violation": [0.0, 8.0], "entropy": [1.0, 0.0], "dead": [0, 8], "router_z": [1, 1]},
    "tokens_per_expert": [[4] * 9, [36] + [0] * 8],
}
EVAL: dict[str, Any] = {
    "kind": "eval",
    "step": 6,
    "loss": 3.0,
    "domains": {
        "[/b]odd": {"loss": 2.0, "bits_per_byte": 1.5, "tokens_per_expert": [[8, 8, 2] + [0] * 6, [2] * 9]},
        "prose": {"loss": 4.0, "bits_per_byte": 2.5, "tokens_per_expert": [[0, 2, 2, 5] + [0] * 5, [1] * 9]},
    },
}


def test_shares_of_an_experts_work_do_not_depend_on_the_sizes_of_domains() -> None:
    use = use_of(EVAL)
    assert use[:, 0, 0].tolist() == [1, 0]
    assert use[:, 1].tolist() == [[0.5] * 9] * 2  # one domain has twice the tokens, both use all experts alike
    assert use[:, 0, 4].tolist() == [0, 0]  # an expert without a token is nobody's
    assert use[0, 0, 1] == pytest.approx((8 / 18) / (8 / 18 + 2 / 9))


def test_strips_show_load_in_the_experts_order_and_the_domain_that_uses_each(data: Path) -> None:
    state = State()
    for record in (TRAIN, EVAL, {"kind": "alarm", "step": 6, "text": "expert [3] died"}, EVAL):
        state = after(state, record)
    lines = shown(state, config(data)).splitlines()
    cells = [line.split() for line in lines]
    assert cells[2] == ["1", "▄▄▄▄▄▄▄▄▄", "1.00", "1.000", "0"]  # layer 0 is dense
    assert cells[3] == ["2", "█········", "9.00", "0.000", "8"]
    assert cells[5] == ["1", "AABB·····", "44%"]
    assert cells[6] == ["2", "0%"]  # both use all of them alike
    assert cells[8] == ["a", "[/b]odd", "2.0000", "1.500", "2"]
    assert lines[10:] == ["experts that work mostly for one domain: 22%, 22%", "expert [3] died"]


def test_many_layers_and_experts_fit_a_small_screen(data: Path) -> None:
    wide = {**TRAIN, "tokens_per_expert": [[1] * 256] * 60}
    wide["load"] = {name: [0.0] * 60 for name in TRAIN["load"]}
    domains = {name: {"loss": 2.0, "bits_per_byte": 1.5, "tokens_per_expert": [[1] * 256] * 60} for name in "abcdefgh"}
    ffn = {**config(data).model.ffn.model_dump(exclude_unset=True), "n_routed_experts": 256}
    model = {**config(data).model.model_dump(exclude_unset=True), "ffn": ffn, "num_hidden_layers": 61}
    of = config(data, model=model)
    text = shown(after(after(State(), wide), {**EVAL, "domains": domains}), of, width=80, height=30)
    assert len(text.splitlines()) <= 30
    assert max(map(len, text.splitlines())) <= 80


def test_a_dense_model_has_a_loss_and_no_strips(data: Path) -> None:
    of = config(data, steps=2)
    train_record = {**TRAIN, "load": {}, "tokens_per_expert": []}
    domains = {name: {**score, "tokens_per_expert": []} for name, score in EVAL["domains"].items()}
    state = after(after(State(), train_record), {**EVAL, "domains": domains})
    text = shown(state, of)
    assert "loss 2.5000" in text
    assert "layer" not in text
    assert state.own == ()

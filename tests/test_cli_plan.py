"""The command line: plan and presets as a user runs them, and how every verb answers bad usage."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from moekit.cli import main
from moekit.cli.output import read_text
from moekit.config import describe_keys, load_model_config, load_run_config, preset, preset_names


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert main([*words, "--json"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    return json.loads(output.out)


def _error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("moekit: error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_plan_prints_the_figures_of_the_paper_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    document = _json(capsys, "plan", "deepseekmoe-16b")
    assert document["parameters"]["total"] == 16_375_728_128
    assert document["parameters"]["active"] == 2_828_650_496
    assert document["parameters"]["active_without_embedding"] == 2_828_650_496 - 102400 * 2048
    assert document["parameters"]["by_role"]["routed"]["total"] == 27 * 64 * 3 * 2048 * 1408
    assert document["flops"]["sequence_length"] == 4096
    assert round(document["flops"]["paper"] / 1e12, 1) == 74.4
    assert round(document["flops"]["exact"] / 1e12, 1) == 75.9
    assert document["kv_cache_bytes_per_token"] == 229_376
    assert document["memory"]["weights"] == 4 * 16_375_728_128


def test_plan_prints_the_same_figures_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "deepseekmoe-16b"]) == 0
    output = capsys.readouterr().out
    for figure in ("16,375,728,128", "2,828,650,496", "74.42T", "75.90T", "229,376"):
        assert figure in output


def test_plan_prints_meos_table_and_merged_weights_for_a_model_that_merges(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "meo-bert-base"]) == 0
    output = capsys.readouterr().out
    for figure in ("merged weights", "m = 4 ", "71.99G", "28.73G", "28.95G", "over 128 tokens"):
        assert figure in output
    assert "KV cache" not in output  # an encoder has none
    table = _json(capsys, "plan", "meo-bert-base")["meo_table"]
    assert round(table["lines"][2]["dispatched"] / 1e9, 2) == 71.99
    assert main(["plan", "tiny-deepseekmoe"]) == 0
    assert "merged weights" not in capsys.readouterr().out


def test_overrides_may_stand_anywhere_and_take_both_forms(capsys: pytest.CaptureFixture[str]) -> None:
    plain = _json(capsys, "plan", "tiny-deepseekmoe")
    first = _json(capsys, "plan", "--model.ffn.n_routed_experts", "31", "tiny-deepseekmoe")
    last = _json(capsys, "plan", "tiny-deepseekmoe", "--model.ffn.n-routed-experts=31")
    assert first == last
    dropped = 4 * 32 * (96 + 3 * 96 * 64)
    assert plain["parameters"]["total"] - first["parameters"]["total"] == dropped


def test_plan_options_change_length_batch_precision_and_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--sequence-length", "64", "--batch", "4", "--precision", "float32", "--optimizer", "muon", "--recompute"]
    document = _json(capsys, "plan", "tiny-deepseekmoe", *words)
    assert document["flops"]["sequence_length"] == 64
    assert document["flops"]["exact"] == preset("tiny-deepseekmoe").flops(64)
    assert document["memory"]["kv_cache"] == 4 * 64 * preset("tiny-deepseekmoe").kv_cache_bytes_per_token(4)
    expected = {"batch": 4, "precision": "float32", "optimizer": "muon", "recompute": True}
    assert document["settings"] == expected


@pytest.mark.parametrize("option", ["--print_config", "--print-config"])
def test_printed_configs_load_again(option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["plan", "tiny-gshard", "--model.hidden_size", "48", option]) == 0
    (tmp_path / "model.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert load_model_config(tmp_path / "model.yaml").hidden_size == 48
    assert main(["train", "tiny-gshard", "--data", "1e3", "--steps", "70", "--optimizer.lr=1e-4", option]) == 0
    (tmp_path / "run.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    run = load_run_config(tmp_path / "run.yaml")
    assert (run.data.path, run.steps, run.optimizer.lr) == ("1e3", 70, 1e-4)
    assert _json(capsys, "plan", str(tmp_path / "run.yaml"))["model"] == str(tmp_path / "run.yaml")


def test_presets_lists_all_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    rows = _json(capsys, "presets")["presets"]
    assert [row["name"] for row in rows] == preset_names()
    assert main(["presets"]) == 0
    table = capsys.readouterr().out
    assert all(name in table for name in preset_names())


def test_train_help_names_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"--{key.key} " in text and key.description in text for key in describe_keys())


@pytest.mark.parametrize("verb", ["quickstart", "presets", "plan", "prepare", "train", "generate"])
def test_every_verb_has_an_example_in_its_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    text = capsys.readouterr().out
    assert "example:" in text
    assert f"moekit {verb}" in text.split("example:")[1]
    assert "--json" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pln", "there is no verb 'pln' (did you mean plan?)"),
        ("--json plan tiny-dense", "--json stands before the verb; write `moekit VERB --json`"),
        ("--vrsion", "--vrsion stands before the verb; write `moekit VERB --vrsion`, see `moekit --help`"),
        ("plan", "PRESET|FILE"),
        ("plan tiny-dens", "no preset or file 'tiny-dens' (did you mean tiny-dense"),
        ("plan tiny-dense --jsn", "unknown option --jsn (did you mean --json?)"),
        ("plan tiny-dense --sequence-lenght 3", "(did you mean --sequence-length?)"),
        ("plan tiny-dense --n_routed_experts 3", "n_routed_experts is model.ffn.n_routed_experts"),
        ("plan tiny-dense --model.hiden_size 3", "model.hiden_size is not a setting (did you mean hidden_size?)"),
        ("plan tiny-dense --model.hidden_size", "--model.hidden_size needs a value"),
        ("plan tiny-dense --model.hidden_size --json", "--model.hidden_size needs a value"),
        ("plan tiny-dense --steps 3", "--steps is no setting of a model"),
        ("plan tiny-dense --batch 0", "'0' is not a whole number above 0"),
        ("plan tiny-dense --batch 1_0", "'1_0' is not a whole number above 0"),
        (
            "plan tiny-dense --precision float8",
            "argument --precision: 'float8' (did you mean float32?); allowed: bfloat16, float32",
        ),
        ("plan tiny-dense --sequence-length 257", "sequence_length is 257 but model.max_position_embeddings is 256"),
        ("plan tiny-dense more", "unrecognized arguments: more"),
        ("presets --model.hidden_size 3", "unknown option --model.hidden_size"),
        ("quickstart --steps soon", "'soon' is not a whole number above 0"),
        ("train --data d --out r", "PRESET or FILE is missing"),
        (
            "train tiny-dense --out r",
            "data.path is missing: directory written by `moekit prepare`, or files of sentences; --data sets it too",
        ),
        ("train tiny-dense --data d", "--out is missing"),
        ("train tiny-dense --data d --data.path e --out r", "--data and --data.path are both given"),
        ("train tiny-dense --data d --out r --stepps 3", "unknown option --stepps (did you mean steps?)"),
        ("train tiny-dense --data d --out r --optimizer.kind muon", "kind is muon but model.ffn.kind is dense"),
        ("train tiny-dense --data d --out r --backend torch", "backend is torch but model.ffn.kind is dense"),
        ("prepare a --out d --valid v --valid-fraction 0.1", "valid_fraction is 0.1 but validation text is given"),
        ("prepare a --out d --tokenizer t --vocab-size 300", "vocab_size is 300 but a tokenizer is given"),
        ("train tiny-dense --data d --out r --grad-clip -1", "grad_clip is -1 but must be greater than 0"),
        ("train --resume", "--out is missing: the directory of the run"),
        ("train tiny-dense --data d --out=", "argument --out: it is empty"),
        ("train tiny-dense --data= --out r", "argument --data: it is empty"),
        ("prepare a --tokenizer= --out r", "argument --tokenizer: it is empty"),
        ("train --resume --out nowhere", "config.yaml cannot be read: No such file or directory"),
        ("generate somewhere", "--prompt or --prompts-file is missing"),
        ("generate somewhere --prompts-file nowhere.txt", "nowhere.txt: No such file or directory"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(words: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in _error(capsys, *words.split())


def test_a_resumed_run_keeps_its_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "tiny-dense", "--data", "d", "--print_config"]) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    resume = ["train", "--resume", "--out", str(tmp_path)]
    said = _error(capsys, *resume, "--model.hidden_size", "48")
    assert "model.hidden_size is 48 but 96 in" in said
    assert "a resumed run must keep it" in said
    assert "model.ffn." in _error(capsys, *resume, "tiny-gshard", "--data", "d")
    assert main([*resume, "--steps", "900", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["steps"] == 900


def test_without_words_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "moekit quickstart" in capsys.readouterr().out


def test_train_prints_its_config_before_there_is_data(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny-dense", "--print_config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["data"]["path"] == "DATA"


def test_prompts_that_are_not_utf8_are_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9\n")
    said = _error(capsys, "generate", "somewhere", "--prompts-file", str(tmp_path / "prompts.txt"))
    assert "prompts.txt is not UTF-8 text: byte 3" in said


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfcaf\xc3\xa9\n")
    assert read_text(tmp_path / "prompts.txt") == "caf\u00e9\n"


def _of_a_gpu() -> None:  # the real thing needs one
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore on this")


@pytest.mark.parametrize(
    ("run_out", "message"),
    [
        (_of_a_gpu, "CUDA out of memory"),
        (lambda: torch.empty(1 << 60), "can't allocate memory: you tried to allocate 4611686018427387904 bytes"),
        (lambda: bytearray((1 << 63) - 64), "out of memory"),
    ],
)
def test_too_little_memory_is_one_line_with_advice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, run_out: Callable[[], object], message: str
) -> None:
    monkeypatch.setattr("moekit.cli.presets.run", lambda args: run_out())
    said = _error(capsys, "presets")
    assert message in said
    assert said.endswith("; in training, a smaller data.micro_batch_size or recompute true needs less memory\n")


def _run(*words: str, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "moekit", *words]
    return subprocess.run(command, stderr=subprocess.PIPE, cwd=Path(__file__).parents[1], **settings)


def test_any_language_is_written_whatever_the_locale(tmp_path: Path) -> None:
    path = tmp_path / "模型.yaml"
    path.write_text("preset: tiny-dense", encoding="utf-8")
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = _run("plan", str(path), "--json", env=environment, stdout=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout.decode())["model"] == str(path)
    done = _run("plan", "模型", env=environment, stdout=subprocess.PIPE)
    assert "there is no preset or file '模型'" in done.stderr.decode()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_under_the_output_is_one_line() -> None:
    with open("/dev/full", "wb") as full:
        done = _run("presets", "--json", stdout=full)
    assert (done.returncode, done.stderr) == (2, b"moekit: error: cannot write or read: No space left on device\n")


def test_a_reader_that_leaves_early_causes_no_traceback() -> None:
    for words in (["plan", "tiny-dense"], ["presets", "--json"]):
        read, write = os.pipe()
        os.close(read)
        done = _run(*words, stdout=write)
        os.close(write)
        assert (done.returncode, done.stderr) == (141, b"")


def test_a_closed_output_takes_everything() -> None:
    command = [sys.executable, "-c", "from moekit.cli import main; raise SystemExit(main(['presets']))"]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_pipe_cuts_no_figures() -> None:
    words = ["doctor", "--device", "cpu", "--quick"]
    command = [sys.executable, "-c", f"from moekit.cli import main; raise SystemExit(main({words}))"]
    surroundings = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(command, capture_output=True, text=True, env=surroundings)
    assert "it takes bfloat16, in widths that 8 divides" in done.stdout

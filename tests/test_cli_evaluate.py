"""`moekit evaluate` from end to end."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moekit
from moekit import files
from moekit.cli import main
from moekit.config import ModelConfig
from moekit.formats.tokenizer import train_tokenizer
from moekit.nn.model import Model

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.\n"
Said = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., ModelConfig]) -> Path:
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT], 300)
    folder = tmp_path_factory.mktemp("evaluate")
    moekit.save(Model(tiny_config(vocab_size=300)), folder / "model", tokenizer)
    (folder / "a.valid.txt").write_text(TEXT * 3)
    (folder / "b.jsonl").write_text(json.dumps({"text": TEXT, "domain": "c"}) + "\n")
    lines = [json.dumps({"goal": TEXT, "sol1": "wait", "sol2": "go on"})] * 4
    (folder / "piqa_valid.jsonl").write_text("\n".join(lines))
    (folder / "piqa_valid-labels.lst").write_text("0\n1\n1\n0\n")
    return folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """Returns a function: the words of a command to its status and what it wrote."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main(["evaluate", *map(str, words)])
        written = capsys.readouterr()
        return status, written.err if status == 2 else written.out

    return run


def test_text_gives_a_record_and_a_table(folder: Path, said: Said, tmp_path: Path) -> None:
    words = folder / "model", "--text", folder / "a.valid.txt", folder / "b.jsonl"
    status, output = said(*words, "--json", "--out", tmp_path / "record.json")
    record = json.loads(output)
    assert status == 0
    assert record == json.loads((tmp_path / "record.json").read_text())
    text, model = record["text"], record["model"]
    assert model["sha256"]["manifest.json"] == files.sha256(folder / "model" / "manifest.json")
    assert model["parameters"] == moekit.load(folder / "model").config.num_parameters
    assert text["settings"]["sequence_length"] == text["settings"]["stride"] == 64
    assert {domain: score["bytes"] for domain, score in text["domains"].items()} == {
        "a": 3 * len(TEXT), "c": len(TEXT)
    }  # fmt: skip
    status, output = said(*words, "--batch-size", 1, "--stride", 64)
    assert status == 0
    assert f"{text['domains']['a']['bits_per_byte']:.4f}" in output
    assert f"{text['mean']['perplexity']:,.2f}" in output
    shorter = json.loads(said(*words, "--json", "--sequence-length", 20, "--stride", 5)[1])["text"]
    assert shorter["domains"]["a"]["tokens"] == text["domains"]["a"]["tokens"]
    assert shorter["domains"]["a"]["loss"] != text["domains"]["a"]["loss"]


def test_prepared_data_is_evaluated_by_its_validation_text(folder: Path, said: Said, tmp_path: Path) -> None:
    words = ["prepare", folder / "b.jsonl", "--valid", folder / "a.valid.txt", "--tokenizer", folder / "model"]
    assert main([*map(str, words), "--out", str(tmp_path / "data")]) == 0
    record = json.loads(said(folder / "model", "--data", tmp_path / "data", "--json")[1])
    direct = json.loads(said(folder / "model", "--text", folder / "a.valid.txt", "--json")[1])
    assert record["text"]["domains"] == direct["text"]["domains"]


def test_tasks_give_their_prompt_with_their_score(folder: Path, said: Said) -> None:
    pytest.importorskip("lm_eval")
    words = folder / "model", "--tasks", "piqa", "--task-data", folder, "--limit", 2
    (task,) = json.loads(said(*words, "--json")[1])["tasks"].values()
    assert task["n"] == 2
    assert task["prompt"]["doc_to_text"] == "Question: {{goal}}\nAnswer:"
    assert task["example"] == {"prompt": f"Question: {TEXT}\nAnswer:", "continuation": " wait"}
    status, table = said(*words)
    assert status == 0
    assert "acc_norm" in table
    assert table.rstrip().endswith("for it") == bool(task["truncated"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--questions", "q.jsonl", "--sequence-length", "8"],
            "--sequence-length has no effect with --questions alone",
        ),
        ([], "--text, --data, --tasks, --questions or --sentences is missing: what to evaluate on"),
        (["--text", "a", "--data", "b"], "--text and --data are both given"),
        (["--text", "{}/nothing.txt"], "nothing.txt does not exist"),
        (["--text", "{}/b.jsonl", "--stride", "65"], "stride is 65 but must be 1 to 64"),
        (["--text", "{}/b.jsonl", "--sequence-length", "65"], "sequence_length is 65 but must be 1 to 64"),
        (["--text", "{}/b.jsonl", "--task-data", "{}"], "--task-data has no effect without --tasks"),
        (["--tasks", "piqa", "--stride", "4"], "--stride has no effect without --text or --data"),
        (["--data", "{}", "--text-field", "body"], "--text-field and --domain-field have no effect without --text"),
        (["--text", "{}/b.jsonl", "--out", "{}"], "{}: Is a directory"),
        (["--text", "{}/b.jsonl", "--out", "{}/b.jsonl/x.json"], "{}/b.jsonl/x.json: "),
        (["--tasks", "hellaswagg"], "there is no task 'hellaswagg' (did you mean hellaswag?)"),
        (["--tasks", "piqa"], "--task-data is missing"),
        (["--tasks", "humaneval", "--task-data", "{}"], "humaneval runs what the model writes; --allow-code-execution"),
    ],
)
def test_mistakes_are_one_line(folder: Path, said: Said, words: list[str], message: str) -> None:
    if "--tasks" in words:
        pytest.importorskip("lm_eval")
    status, line = said(folder / "model", *(word.format(folder) for word in words))
    assert status == 2
    assert message.format(folder) in line
    assert line.count("\n") == 1


def test_without_the_harness_one_line_says_what_to_install(folder: Path) -> None:
    words = ["evaluate", str(folder / "model"), "--tasks", "piqa", "--task-data", str(folder)]
    code = f"import sys; sys.modules['lm_eval'] = None; from moekit.cli import main; sys.exit(main({words}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = done.returncode, done.stderr
    assert found == (2, "moekit: error: --tasks needs lm-evaluation-harness; pip install 'moekit[eval]'\n")

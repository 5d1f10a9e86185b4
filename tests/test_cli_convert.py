"""`moekit convert` from end to end: a model that has learnt something, in every precision, still says the same."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

import moekit
from moekit.cli import main
from moekit.config import ModelConfig
from moekit.formats.tokenizer import train_tokenizer
from moekit.nn.quantized import dequantize_

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness.\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that knows one sentence by heart."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer([TEXT], 300)
    attention = {"kind": "mha", "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 20}
    ffn = {"kind": "moe", "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
    config = ModelConfig.model_validate({
        "vocab_size": 300, "hidden_size": 40, "num_hidden_layers": 2, "max_position_embeddings": 128,
        "initializer_range": 0.05, "attention": attention, "ffn": {**ffn, "moe_intermediate_size": 24},
    })  # fmt: skip
    model = moekit.Model(config)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    ids = torch.tensor([tokenizer.encode(TEXT)])
    for _ in range(60):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1
    folder = tmp_path_factory.mktemp("trained") / "model"
    moekit.save(model, folder, tokenizer)
    return folder


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["generate", str(folder), "--prompt", "It was the best", "--max-new-tokens", "20", "--json"]) == 0
    return str(json.loads(capsys.readouterr().out)["completions"][0]["text"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_every_precision_still_knows_the_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: str
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["convert", str(trained), str(tmp_path / "new"), "--dtype", dtype]
    assert main([*words, "--text", str(tmp_path / "text.txt"), "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == json.loads((tmp_path / "new" / "receipt.json").read_text())
    assert all(check["held"] for check in document["checks"])
    assert said(tmp_path / "new", capsys) == said(trained, capsys)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_codes_say_what_their_numbers_say(trained: Path, tmp_path: Path, dtype: str) -> None:
    assert main(["convert", str(trained), str(tmp_path / "new"), "--dtype", dtype]) == 0
    codes, numbers = moekit.load(tmp_path / "new"), moekit.load(tmp_path / "new")
    dequantize_(numbers, torch.float32)
    ids = torch.randint(300, (3, 5))
    assert torch.equal(moekit.generate(codes, ids, 30), moekit.generate(numbers, ids, 30))


def test_the_table_has_a_row_for_like_tensors_and_the_checks(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert main(["convert", str(trained), str(tmp_path / "new"), "--dtype", "int4"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mlp.experts.*.gate_proj", "16", "float32", "->", "int4"] in [line[:5] for line in lines]
    assert ["embed_tokens", "1", "float32", "0", "0"] in lines
    assert sum(line[-1:] == ["yes"] for line in lines) == 3
    assert main(["convert", str(tmp_path / "new"), str(tmp_path / "back"), "--dtype", "fp32"]) == 0
    assert "made of the numbers that int4 codes stand for" in capsys.readouterr().out


def test_a_check_that_does_not_hold_is_status_1_and_what_cannot_be_read_is_2(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = moekit.load(trained)
    with torch.no_grad():  # one weight outshines its group
        model.lm_head.weight[:, ::32] *= 1e4
    moekit.save(model, tmp_path / "spoilt")
    assert main(["convert", str(tmp_path / "spoilt"), str(tmp_path / "new"), "--dtype", "int4"]) == 1
    assert " NO" in capsys.readouterr().out
    assert moekit.load(tmp_path / "new").quantization == "int4"
    assert main(["convert", str(tmp_path / "none"), str(tmp_path / "other"), "--dtype", "int4"]) == 2
    assert "none is not a directory" in capsys.readouterr().err


def test_to_gguf_and_back_it_still_knows_the_sentence(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, back = tmp_path / "it.gguf", tmp_path / "and back"
    assert main(["convert", str(trained), str(file), "--to", "gguf", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((tmp_path / "it.gguf.receipt.json").read_text())
    assert main(["convert", str(file), str(back)]) == 0
    (then,) = re.findall("next: moekit (generate .*)", capsys.readouterr().out.replace("\n", " "))
    assert shlex.split(then)[1] == str(back)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (back / name).read_bytes() == (trained / name).read_bytes()
    assert main(["convert", str(trained), str(tmp_path / "small.gguf"), "--to", "gguf", "--dtype", "q8_0"]) == 0
    assert "small.gguf.receipt.json" in capsys.readouterr().out
    assert said(back, capsys) == said(trained, capsys)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (
            ["{model}", "{out}"],
            "is a moekit directory already; --dtype is missing, allowed: float32, bfloat16, int8, int4",
        ),
        (
            ["{model}", "{out}", "--to", "gguf", "--dtype", "int8"],
            "--dtype is int8 but a model directory to gguf takes",
        ),
        (
            ["{file}", "{out}", "--dtype", "q8_0"],
            "--dtype is q8_0 but GGUF to moekit takes no --dtype, float32, bfloat16",
        ),
        (["{file}", "{out}", "--to", "gguf"], "is a file; make a model directory of it first (--to moekit)"),
        (["{file}", "{out}", "--text", "{file}"], "--text compares logits, which takes two model directories"),
        (["{file}", "{out}"], "cannot be read as GGUF"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], reason: str
) -> None:
    (tmp_path / "empty.gguf").touch()
    names = {"model": trained, "file": tmp_path / "empty.gguf", "out": tmp_path / "out"}
    assert main(["convert", *(word.format(**names) for word in words)]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()

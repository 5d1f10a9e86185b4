"""A run that starts from another model's weights, through the command line."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import moekit.quickstart
from moekit.cli import main
from moekit.formats.checkpoint import load
from moekit.train.state import newest

TEXT = Path(moekit.quickstart.__file__).parent / "text" / "gov_en.valid.jsonl.gz"
SHORT = ["--steps", "2", "--save_every", "1", "--eval_tokens", "32", "--quiet"]
SHORT += ["--data.batch_size", "2", "--data.sequence_length", "16"]
MODEL = {"vocab_size": 301, "hidden_size": 16, "num_hidden_layers": 1, "causal": False, "initializer_range": 0.1}
MODEL |= {"attention": {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}}
MODEL |= {"ffn": {"kind": "dense", "intermediate_size": 24, "hidden_act": "gelu"}}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with prepared text, `data`, and a run, `run`."""
    folder = tmp_path_factory.mktemp("start")
    assert main(["prepare", str(TEXT), "--out", str(folder / "data"), "--vocab-size", "300"]) == 0
    (folder / "run.yaml").write_text(json.dumps({"model": MODEL, "objective": {"kind": "masked"}}))
    told = ["train", str(folder / "run.yaml"), "--data", str(folder / "data"), "--out", str(folder / "run")]
    assert main([*told, *SHORT]) == 0
    return folder


def test_a_run_starts_from_a_model_and_needs_it_no_more(encoder: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    source = newest(encoder / "run")
    assert source is not None
    shutil.copytree(source, gone)
    told = ["train", "--from", str(gone), "--data", str(encoder / "data"), "--objective.kind", "masked"]
    told += ["--out", str(tmp_path / "run"), "--optimizer.lr", "1e-30", "--optimizer.weight_decay", "0"]
    assert main([*told, *SHORT]) == 0
    before, after = load(gone), load(newest(tmp_path / "run") or gone)
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], tensor, rtol=0, atol=1e-25)
    receipt = json.loads((tmp_path / "run" / "receipt.json").read_text())
    manifest = json.loads((gone / "manifest.json").read_text())
    assert receipt["inputs"]["init"] == {"path": str(gone), "files": manifest["files"]}
    assert receipt["tensors"]["used"]["lm_head.weight"] == {"source": "lm_head.weight"}
    assert receipt["config"]["init"] == str(gone)
    assert main(["verify", str(newest(tmp_path / "run"))]) == 0
    shutil.rmtree(gone)
    shutil.rmtree(newest(tmp_path / "run") or gone)
    assert main(["train", "--resume", "--out", str(tmp_path / "run"), "--quiet"]) == 0
    assert json.loads((tmp_path / "run" / "receipt.json").read_text())["tensors"] == receipt["tensors"]


def test_mistakes_are_one_line(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(TEXT), "--out", str(tmp_path / "other"), "--vocab-size", "290"]) == 0
    told = ["train", "--from", str(encoder / "run"), "--out", str(tmp_path / "run"), *SHORT]
    masked, here = ["--objective.kind", "masked"], ["--data", str(encoder / "data")]
    for words, message in (
        ([*masked, "--data", str(tmp_path / "other")], "was prepared with another tokenizer than that of init"),
        ([*masked, *here, "--init", "elsewhere"], "--from and --init are both given"),
        ([*masked, *here, "--model.hidden_size", "32"], "model.hidden_size is 32 but 16 in the model to start from"),
        (here, "objective.kind is next_token but model.causal is false"),
    ):
        capsys.readouterr()
        assert main([*told, *words]) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1
        assert not (tmp_path / "run").exists()

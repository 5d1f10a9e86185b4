"""muMoE from end to end, as a user runs it: plan, train, resume, generate, verify; and what cannot hold it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moekit
from moekit.cli import main
from moekit.data import prepare
from moekit.quickstart import job
from moekit.train import state

TEXT = Path(job.__file__).parent / "text"
SHAPE = (
    "--model.vocab_size 512 --model.hidden_size 32 --model.num_hidden_layers 2 --model.attention.head_dim 16"
    " --model.attention.num_attention_heads 2 --model.attention.num_key_value_heads 2 --model.ffn.kind mumoe"
)
RECIPE = "--data.sequence_length 32 --data.batch_size 4 --log_every 2 --eval_tokens 256 --device cpu"
LAYERS = {
    "cp": "--model.ffn.n_routed_experts 8 --model.ffn.intermediate_size 64",
    "tr of two levels": "--model.ffn.n_routed_experts 12 --model.ffn.intermediate_size 64 --model.ffn.factorization tr"
    " --model.ffn.expert_rank 3 --model.ffn.second_level_experts 4 --model.ffn.input_norm true",
}
Told = Callable[..., Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("mumoe") / "data"
    prepare([TEXT / "math_en.valid.jsonl.gz"], out, valid_paths=[TEXT / "gov_en.valid.jsonl.gz"], vocab_size=512)
    return out


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Told:
    """Returns a function that runs a command and gives its JSON document, or its error where one is expected."""

    def run(command: str, status: int = 0) -> Any:
        assert main(command.split()) == status, capsys.readouterr().err
        output = capsys.readouterr()
        return output.err if status == 2 else json.loads(output.out)

    return run


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_a_run_learns_resumes_to_the_bit_and_writes_text(data: Path, tmp_path: Path, told: Told, layer: str) -> None:
    settings = f"tiny-dense {SHAPE} {layer}"
    planned = told(f"plan {settings} --json")
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    recipe = f"{RECIPE} --steps 8 --save_every 4 --eval_every 4 --schedule.warmup_steps 2"
    told(f"train {settings} {recipe} --data {data} --out {straight} --json")
    records = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if record["kind"] == "train"]
    assert trained[-1]["loss"] < trained[0]["loss"]
    assert trained[-1]["tokens_per_expert"] == []
    newest = state.newest(straight)
    assert newest is not None
    model = moekit.load(newest)
    assert sum(p.numel() for p in model.parameters()) == planned["parameters"]["total"]
    assert all(gate.any() for block in model.layers for gate in block.mlp.router)

    shutil.copytree(straight, killed)
    shutil.rmtree(killed / "checkpoints" / newest.name)
    (killed / "receipt.json").unlink()
    told(f"train --resume --out {killed} --json")
    again = killed / "checkpoints" / newest.name
    assert (again / "model.safetensors").read_bytes() == (newest / "model.safetensors").read_bytes()

    command = f"generate {newest} --prompt The --max-new-tokens 4 --json"
    assert told(command) == told(command)
    report = told(f"verify {newest} --json")
    assert all(check["held"] for check in report["checks"]), report


def test_a_saved_model_is_the_same_model(tmp_path: Path, tiny_config: Callable[..., Any]) -> None:
    for number, ffn in enumerate(({"factorization": "tr", "second_level_experts": 3}, {"gate_norm": "batch"})):
        model = moekit.Model(tiny_config(ffn={"kind": "mumoe", **ffn}, causal="gate_norm" not in ffn)).train()
        ids = torch.randint(61, (2, 9))
        model(ids)  # moves the statistics, if there are any
        moekit.save(model.eval(), tmp_path / str(number))
        assert torch.equal(moekit.load(tmp_path / str(number))(ids).logits, model(ids).logits)


def test_other_formats_have_no_place_for_it(tmp_path: Path, told: Told, tiny_config: Callable[..., Any]) -> None:
    moekit.save(moekit.Model(tiny_config(ffn={"kind": "mumoe"})), tmp_path / "model")
    for to, reason in (
        ("gguf", "GGUF has no architecture with ffn.kind mumoe"),
        ("llama", "layout llama has ffn.kind dense, this model mumoe"),
        ("deepseek", "layout deepseek has ffn.kind moe, this model mumoe"),
    ):
        error = told(f"convert {tmp_path / 'model'} {tmp_path / 'other'} --to {to}", 2)
        assert error == f"moekit: error: {reason}\n"
        assert not (tmp_path / "other").exists()


def test_a_batch_statistic_in_a_causal_model_is_one_line(told: Told) -> None:
    error = told(f"plan tiny-dense {SHAPE} {LAYERS['cp']} --model.ffn.gate_norm batch", 2)
    assert error.startswith("moekit: error: model.causal is true but ffn.gate_norm is batch: a token's output would")
    assert error.count("\n") == 1

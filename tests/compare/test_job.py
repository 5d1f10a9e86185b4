"""Comparisons through the command line: real runs, killed, continued, taken, refused."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moekit.cli import main
from moekit.config import load_run_config
from moekit.config.files import write_yaml
from moekit.data import Sampler, open_dataset
from moekit.data.synthetic import prepare_synthetic
from moekit.train import metrics


def _words(folder: Path, out: Path, file: str = "two.yaml") -> list[str]:
    return ["compare", str(folder / file), "--data", str(folder / "data"), "--out", str(out), "--quiet"]


@pytest.fixture(scope="module")
def done(compared: Path) -> Path:
    """The directory of a comparison that nothing disturbed."""
    assert main([*_words(compared, compared / "done"), "--jobs", "2"]) == 0
    return compared / "done"


def _result(out: Path) -> dict[str, Any]:
    return dict(json.loads((out / "result.json").read_text(encoding="utf-8")))


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(part) for key, part in value.items() if key != "timing"}
    return value


def test_every_architecture_is_trained_with_every_seed_and_scored_at_its_end(done: Path) -> None:
    result = _result(done)
    for name, row in result["architectures"].items():
        assert [*row["seeds"]] == ["0", "1"]
        for seed, score in row["seeds"].items():
            run = done / "runs" / name / f"seed-{seed}"
            last = [record for record in metrics.read(run) if record["kind"] == "eval"][-1]
            assert (score["loss"], score["bits_per_byte"]) == (last["loss"], last["bits_per_byte"])
            assert last["step"] == load_run_config(run / "config.yaml").steps == 40
            assert score["loss"] == pytest.approx(sum(one["loss"] for one in score["domains"].values()) / 2)
            assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000040"]
    losses = {name: [one["loss"] for one in row["seeds"].values()] for name, row in result["architectures"].items()}
    gap = result["loss"]["mean"]["differences"]["moe"]
    each = [ours - theirs for ours, theirs in zip(losses["moe"], losses["dense"], strict=True)]
    assert gap["mean"] == pytest.approx(sum(each) / 2)
    assert gap["high"] - gap["mean"] == pytest.approx(12.7062 * abs(each[0] - each[1]) / 2, rel=1e-5)
    assert result["loss"]["pairs"]["dense"]["moe"]["mean"] == pytest.approx(-gap["mean"])


def test_all_architectures_of_a_seed_saw_the_same_batches(done: Path, compared: Path) -> None:
    result, dataset = _result(done), open_dataset(compared / "data", "train")
    assert result["data"]["sha256"] == dataset.fingerprint
    assert len({*result["data"]["order"].values()}) == 2  # one order for each seed
    orders = []
    for name in ("dense", "moe"):
        config = load_run_config(done / "runs" / name / "seed-1" / "config.yaml")
        sampler = Sampler(dataset, config.data.sequence_length, config.data.batch_size, config.seed)
        orders.append([sampler.batch(step).input_ids.tolist() for step in range(config.steps)])
    assert orders[0] == orders[1]


def test_the_curves_have_every_logged_and_validated_loss(done: Path) -> None:
    with (done / "curves.csv").open(encoding="utf-8") as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 2 * 2 * (10 + 4)
    each = _result(done)["architectures"]["moe"]["flops_per_token"]
    for row in (row for row in rows if row["architecture"] == "moe"):
        assert int(row["tokens"]) == int(row["step"]) * 64
        assert float(row["flops"]) == pytest.approx(int(row["tokens"]) * each)
        assert bool(row["bits_per_byte"]) == (row["kind"] == "eval")
    seconds = [float(row["seconds"]) for row in rows[:14]]
    assert seconds == sorted(seconds)


def _start(words: list[str]) -> subprocess.Popen[bytes]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.Popen([sys.executable, "-m", "moekit", *words], env=environment)


def _wait_for(out: Path, pattern: str, process: subprocess.Popen[bytes]) -> None:
    while not [*out.glob(pattern)]:
        assert process.poll() is None
        time.sleep(0.01)


def test_a_comparison_that_is_killed_interrupted_and_continued_gives_the_same_result(
    done: Path, compared: Path, tmp_path: Path
) -> None:
    words, out = [*_words(compared, tmp_path / "out"), "--seeds", "1"], tmp_path / "out"
    process = _start(words)
    _wait_for(out, "runs/dense/seed-1/checkpoints/step-*", process)
    process.kill()
    process.wait()
    process = _start(words)
    _wait_for(out, "runs/moe/seed-1/checkpoints/step-*", process)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130
    assert not (out / "result.json").exists()
    assert main(["compare", "--out", str(out), "--quiet"]) == 0
    log = "".join(path.read_text(encoding="utf-8") for path in sorted(out.glob("runs/*/*.log")))
    assert log.count("resuming after step") == 2

    shutil.copytree(done, tmp_path / "undisturbed")
    assert main([*_words(compared, tmp_path / "undisturbed"), "--seeds", "1", "--report"]) == 0
    assert _untimed(_result(out)) == _untimed(_result(tmp_path / "undisturbed"))


def test_a_run_that_fails_is_named_with_its_log_and_the_others_go_on(
    done: Path, compared: Path, two: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out = compared / "failing"
    shutil.copytree(done, out)
    own = {"recipe": {"optimizer": {"lr": 1e37}}}
    more = {**two["architectures"], "broken": {**two["architectures"]["dense"], **own}}
    (compared / "three.yaml").write_text(write_yaml({**two, "architectures": more}), encoding="utf-8")
    assert main([*_words(compared, out, "three.yaml"), "--seeds", "1", "--json"]) == 1
    document = json.loads(capsys.readouterr().out)
    (failed,) = document["failed"]
    assert failed["run"] == "broken/seed-1"
    assert "at step" in failed["error"]
    assert failed["error"] in Path(failed["log"]).read_text(encoding="utf-8")
    assert document["loss"]["mean"]["differences"]["moe"]["verdict"] == "one seed, no interval"
    assert "broken/seed-1 failed" in (out / "report.html").read_text(encoding="utf-8")


@pytest.fixture
def take(done: Path, compared: Path, two: dict[str, Any]) -> Callable[..., list[str]]:
    """Returns a function that writes a comparison which takes the finished runs, and returns its command line."""

    def make(out: Path, data: Path | None = None, **changes: Any) -> list[str]:
        runs = {name: {"run": str(done / "runs" / name / "seed-{seed}")} for name in two["architectures"]}
        tree = {**two, "architectures": runs, **changes}
        (out.parent / "taken.yaml").write_text(write_yaml(tree), encoding="utf-8")
        words = ["compare", str(out.parent / "taken.yaml"), "--out", str(out), "--quiet"]
        return [*words, "--data", str(data or compared / "data")]

    return make


def test_finished_runs_can_be_taken_and_give_the_same_figures(
    done: Path, take: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert main(take(tmp_path / "taken")) == 0
    ours, theirs = _result(tmp_path / "taken"), _result(done)
    assert ours["loss"] == theirs["loss"]
    assert not (tmp_path / "taken" / "runs").exists()
    assert ours["architectures"]["moe"]["run"] == str(done / "runs" / "moe" / "seed-{seed}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [0, 7]}, "seed-7 is not a run (it has no config.yaml); only a finished run can be taken"),
        ({"recipe": {"steps": 44}}, "dense/seed-0: steps is 44 but 40 in"),
        ({"recipe": {"optimizer": {"lr": 0.5}}}, "dense/seed-0: optimizer.lr is 0.5 but 0.003 in"),
        ({"recipe": {"eval_tokens": 99}}, "dense/seed-0: eval_tokens is 99 but 256 in"),
    ],
)
def test_a_run_that_does_not_agree_is_not_taken(
    take: Callable[..., list[str]],
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(take(tmp_path / "taken", **changes)) == 2
    assert message in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_not_taken(
    done: Path, two: dict[str, Any], compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done / "runs" / "moe" / "seed-0", tmp_path / "half")
    (tmp_path / "half" / "receipt.json").unlink()
    runs = {**two["architectures"], "moe": {"run": str(tmp_path / "half")}}
    (tmp_path / "c.yaml").write_text(write_yaml({**two, "architectures": runs, "seeds": [0]}), encoding="utf-8")
    words = ["compare", str(tmp_path / "c.yaml"), "--data", str(compared / "data"), "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "half is not finished; only a finished run can be taken" in capsys.readouterr().err


def test_runs_on_other_text_are_refused_taken_or_not(
    done: Path,
    take: Callable[..., list[str]],
    make_data: Callable[[Path, int], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    other = make_data(tmp_path, 8)
    assert main(take(tmp_path / "taken", data=other)) == 2
    assert "was trained on other text than" in capsys.readouterr().err
    shutil.copytree(done, tmp_path / "copy")
    assert main(["compare", "--out", str(tmp_path / "copy"), "--data", str(other), "--quiet"]) == 2
    assert "was trained on other text than" in capsys.readouterr().err


def test_a_comparison_with_another_recipe_does_not_overwrite_its_runs(
    done: Path, compared: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (done / "compare.yaml").read_bytes()
    assert main([*_words(compared, done), "--recipe.optimizer.lr", "0.1"]) == 2
    assert "dense/seed-0: optimizer.lr is 0.1 but 0.003 in" in capsys.readouterr().err
    assert (done / "compare.yaml").read_bytes() == before


def test_a_directory_of_something_else_is_left_alone(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    assert main(_words(compared, tmp_path)) == 2
    assert "holds something else" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["table1"], "--out is missing"),
        (["--out", "nowhere"], "NAME or FILE is missing"),
        (["table1", "--out", "o", "--seeds", "a"], "--seeds: 'a' is not a list of whole numbers"),
        (["table1", "--out", "o"], "recipe: data.path is missing"),
        (["table1", "--out", "o", "--data", "nowhere"], "nowhere is not a dataset"),
        (["table1", "--steps", "3", "--dry-run"], "steps is not a setting of a comparison"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words]) == 2
    assert message in capsys.readouterr().err


def test_what_comes_with_the_package_is_listed_and_can_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--list", "--json"]) == 0
    listed = [one["name"] for one in json.loads(capsys.readouterr().out)["comparisons"]]
    assert {"table1", "table2", "ablation", "shared-ratio"} <= {*listed}
    assert main(["compare", "table1", "--size", "mini", "--dry-run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"] == 15
    assert main(["compare", "table1", "--print-config", "--seeds", "3"]) == 0
    assert "seeds:\n- 3\n" in capsys.readouterr().out


def test_questions_that_the_data_brings_along_are_asked_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare_synthetic("phone-book", tmp_path / "book", examples=64, questions=12)
    ffn = "n_routed_experts: 2, num_experts_per_tok: 1, moe_intermediate_size: 8"
    attention = "attention: {num_attention_heads: 2, num_key_value_heads: 2, head_dim: 8}"
    model = f"vocab_size: 257, hidden_size: 16, num_hidden_layers: 1, max_position_embeddings: 64, {attention}"
    (tmp_path / "two.yaml").write_text(
        "title: two\nbaseline: a\nseeds: [0]\n"
        f"architectures: {{a: {{model: {{{model}, ffn: {{{ffn}}}}}}}, b: {{model: {{{model}, ffn: {{{ffn}}}}}}}}}\n"
        "recipe: {steps: 2, schedule: {warmup_steps: 0}, "
        "data: {sequence_length: 32, batch_size: 2, packing: documents}}\n"
    )
    words = [str(tmp_path / "two.yaml"), "--data", str(tmp_path / "book"), "--out", str(tmp_path / "out"), "--json"]
    assert main(["compare", *words, "--quiet"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["accuracy"]["questions"] == 12
    kept = json.loads((tmp_path / "out" / "runs" / "a" / "seed-0.answers.json").read_text())
    shares = result["accuracy"]["mean"]["summaries"]
    assert shares["a"]["mean"] == kept["score"]["accuracy"]
    assert 0 <= shares["a"]["mean"] <= 1
    assert "The answers" in (tmp_path / "out" / "report.html").read_text()
    monkeypatch.setattr("moekit.compare.answers.score", None)  # would fail if it were asked again
    assert main(["compare", *words, "--quiet"]) == 0

"""Every benchmark of models runs, at sizes that say nothing about speed, and its result file says what it must."""

import gzip
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import moekit.quickstart
from moekit.config import load_run_config
from moekit.data import prepare
from moekit.errors import ConfigError

FOLDER = Path(__file__).parents[1] / "benchmarks"
ARGUMENTS = {
    "layer": "--sizes 16x8 --tokens 24 --dtype fp32 amp --backend auto",
    "train_step": "--batch 2 --length 12 --dtype fp32 bf16",
    "prefill": "--prompts 1x12 2x5 --dtype fp32 amp",
    "decode": "--batch 1 2 --prompt 5 --tokens 3 --dtype fp32 int8 int4",
    "scaling": "--sweep granularity --values 1 2 --budget 256 --steps 1 --dtype fp32",
}


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)  # as if a script of the folder had been started


def _module(name: str) -> ModuleType:
    return importlib.import_module(name)


def _rows(text: str) -> list[dict[str, str]]:
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[2:]]


@pytest.mark.usefixtures("scripts")
@pytest.mark.parametrize("name", ARGUMENTS)
def test_its_file_names_command_machine_and_guard_and_has_a_row_for_ours_and_theirs(name: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    out = tmp_path / "result.md"
    words = ["--shape", "tiny", "--repeats", "1", "--out", str(out), *ARGUMENTS[name].split()]
    _module(name).main(words)
    text = out.read_text()
    assert f"`python benchmarks/{name}.py --shape tiny" in text
    assert all(part in text for part in (", commit ", f"torch {torch.__version__}", " thread", "Guard: matmul GFLOP/s"))
    rows = _rows(text)
    llama, codes = _module("llama"), _module("peers").CODES
    runs_llama = name in ("prefill", "decode") and llama.program() and llama.gguf
    for dtype in {row["dtype"] for row in rows}:
        who = {"moekit auto"} if dtype in codes else {"moekit auto", "transformers grouped_mm"}
        who |= {f"llama.cpp {llama.TYPES[dtype]}"} if runs_llama and dtype in llama.TYPES else set()
        assert {row["who"] for row in rows if row["dtype"] == dtype} - {"dense"} == who
    for row in rows:
        assert float((row.get("tokens/s") or row["eff"]).replace(",", "")) > 0
        if row["dtype"] == "fp32":  # the same weights: what is compared computes the same
            assert float(row.get("logits off by") or 0) < 1e-5
            assert row.get("tokens as exact", "") in ("", "4 of 4", "8 of 8")


@pytest.mark.usefixtures("scripts")
def test_who_cannot_run_is_named_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.md"
    monkeypatch.setenv("LLAMA_BENCH", "false")  # the program that only fails
    words = ["--shape", "tiny", "--repeats", "1", "--dtype", "fp32", "--models", "qwen2_moe", "--prompts", "1x5"]
    _module("prefill").main([*words, "--out", str(out), "--impl", "none", "--backend", "auto", "nonesuch"])
    text = out.read_text()
    assert "- moekit nonesuch, Qwen2Moe, plain attention, fp32: " in text
    assert "- llama.cpp: " in text
    assert [row["who"] for row in _rows(text)] == ["moekit auto"]


@pytest.mark.usefixtures("scripts")
def test_reference_shape_has_164_million_parameters_35_of_them_active() -> None:
    peers = _module("peers")
    for kind in peers.KINDS:
        made = peers.config(peers.Shape(), kind, 512)
        assert made.num_parameters == pytest.approx(163.9e6, rel=1e-3)
        assert made.num_active_parameters_without_embedding == pytest.approx(35e6, rel=0.05)


@pytest.mark.usefixtures("scripts")
def test_granularity_keeps_routed_parameters_and_active_width() -> None:
    peers, scaling = _module("peers"), _module("scaling")
    cut = [scaling.granular(peers.Shape(), m) for m in scaling.SWEEPS["granularity"]]
    assert {shape.experts * shape.width for shape in cut} == {64 * 192}
    assert {(shape.chosen + shape.shared) * shape.width for shape in cut} == {8 * 192}
    assert cut[2] == peers.Shape()


@pytest.mark.usefixtures("scripts")
def test_a_fresh_model_is_not_blamed_for_what_it_has_not_learnt(tmp_path: Path) -> None:
    _module("drawn").main(["--fresh", "1", "--toys", "0", "--out", str(tmp_path / "result.md")])
    assert "| fresh | 1 | 786 | 0 |" in (tmp_path / "result.md").read_text()


@pytest.mark.usefixtures("scripts")
def test_probes_of_two_models_are_a_page_with_the_papers_figures_a_picture_and_the_numbers(tmp_path: Path) -> None:
    for split, domain in itertools.product(("train", "valid"), ("math_en", "poetry_zh")):
        with gzip.open(Path(moekit.quickstart.__file__).parent / f"text/{domain}.{split}.jsonl.gz") as file:
            (tmp_path / f"{domain}.{split}.jsonl").write_bytes(b"".join(itertools.islice(file, 6)))
    texts = [sorted(tmp_path.glob(f"*.{split}.jsonl")) for split in ("train", "valid")]
    prepare(texts[0], tmp_path / "data", valid_paths=texts[1], vocab_size=512)
    folders = []
    for seed, name in itertools.product(range(2), ("tiny-deepseekmoe", "tiny-gshard")):
        torch.manual_seed(seed)
        shrunk = {"model.vocab_size": "512", "model.hidden_size": "32", "model.num_hidden_layers": "2"}
        model = moekit.Model(load_run_config(name, shrunk, template=True).model)
        moekit.save(model, tmp_path / f"{name}{seed}", tokenizer=moekit.load_tokenizer(tmp_path / "data"))
        folders.append(str(tmp_path / f"{name}{seed}"))
    out, script = tmp_path / "probes.md", _module("probes")
    words = ["--data", str(tmp_path / "data"), "--tokens", "96", "--length", "32", "--out", str(out)]
    script.main([*folders, *words])
    text = out.read_text()
    for part in ("2 seeds, 192 tokens in 6 windows of 32", "| gshard | 0.25 | 4 |", "| deepseekmoe | 0.0625 | 4 |"):
        assert part in text
    assert "n_shared_experts is 0: there is nothing to take away" in text
    assert "DeepSeekMoE, 0.0625: 7.468 (4.131)" in text
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    numbers = json.loads(out.with_suffix(".json").read_text())
    assert len(numbers["seeds"]) == 2
    assert numbers["seeds"][0] != numbers["seeds"][1]
    script.main([*folders[:2], *words])
    assert "| difference | standard error |" in out.read_text()
    with pytest.raises(ConfigError, match="3 models were given; give two, or two for each seed"):
        script.main([*folders[:3], *words])


@pytest.mark.usefixtures("scripts")
def test_lory_beside_a_dense_model_is_a_page_of_losses_differences_and_what_routing_says(tmp_path: Path) -> None:
    for split, domain in itertools.product(("train", "valid"), ("math_en", "poetry_zh")):
        with gzip.open(Path(moekit.quickstart.__file__).parent / f"text/{domain}.{split}.jsonl.gz") as file:
            (tmp_path / f"{domain}.{split}.jsonl").write_bytes(b"".join(itertools.islice(file, 6)))
    texts = [sorted(tmp_path.glob(f"*.{split}.jsonl")) for split in ("train", "valid")]
    prepare(texts[0], tmp_path / "data", valid_paths=texts[1], vocab_size=300)
    words = [
        str(tmp_path / "data"),
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "lory.md"),
        "--seeds",
        "2",
    ]
    sizes = {"tokens": 256, "experts": 3, "segment": 8, "length": 32, "batch": 2, "passage": 20, "domain-tokens": 1000}
    words += [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    _module("lory").main([*words, "--orders", "shuffled", "similar"])
    text = (tmp_path / "lory.md").read_text()
    assert "| model | order | mean | math_en | poetry_zh |" in text
    rows = [line.split(" | ")[:2] for line in text.splitlines() if line.startswith(("| dense", "| lory"))]
    assert rows[:4] == [[f"| {kind}", order] for order in ("shuffled", "similar") for kind in ("dense", "lory")]
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("receipt.json")}
    assert len(finished) >= 4
    _module("lory").main([*words, "--orders", "shuffled", "similar"])  # nothing is made again
    assert finished == {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("receipt.json")}
    assert (tmp_path / "lory.md").read_text() == text


def _merging(tmp_path: Path, name: str, alike: bool = False) -> tuple[str, str]:
    """Returns a run's folder and its text: a fresh model, whose experts are copies of each other if `alike`."""
    texts: list[list[Path]] = []
    for split in ("train", "valid"):
        with gzip.open(Path(moekit.quickstart.__file__).parent / f"text/math_en.{split}.jsonl.gz") as file:
            (tmp_path / f"math_en.{split}.jsonl").write_bytes(b"".join(itertools.islice(file, 6)))
        texts.append([tmp_path / f"math_en.{split}.jsonl"])
    if not (tmp_path / "data").exists():
        prepare(texts[0], tmp_path / "data", valid_paths=texts[1], vocab_size=512)
    shrunk = {"model.vocab_size": "512", "model.hidden_size": "32", "model.num_hidden_layers": "2"}
    model = moekit.Model(load_run_config(name, shrunk | {"model.initializer_range": "0.1"}, template=True).model)
    for layer in model.moe_layers if alike else []:
        for stacked in (layer.experts.gate_up_proj, layer.experts.down_proj):
            stacked.data = stacked.data[:1].repeat(len(stacked), 1, 1)
    folder = tmp_path / name / "seed-0"
    moekit.save(model, folder, tokenizer=moekit.load_tokenizer(tmp_path / "data"))
    return str(folder), str(tmp_path / "data")


def _merging_rows(tmp_path: Path, folder: str, data: str) -> dict[str, dict[str, str]]:
    out, words = tmp_path / "merge.md", ["--tokens", "90", "--length", "32", "--segment", "8"]  # the last is padded
    _module("merge_at_inference").main([folder, "--data", data, *words, "--out", str(out)])
    text = out.read_text()
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "90 tokens of validation text in windows of 32" in text
    linear = float(re.search(r"merged by token: error ([\d.e-]+)\.", text)[1])  # type: ignore[index]
    assert 0 < linear < 1e-6
    return {row["routed experts"]: row for row in _rows(text.split("## Made experts")[0])}


@pytest.mark.usefixtures("scripts")
def test_merging_different_experts_changes_output_and_loss(tmp_path: Path) -> None:
    rows = _merging_rows(tmp_path, *_merging(tmp_path, "tiny-gshard"))
    assert len(rows) == 10
    for name in ("weights merged, by token", "weights merged, then scaled, by sequence", "outputs mixed, by segment"):
        assert float(rows[name]["error"].split("%")[0]) > 10
    assert rows["routed experts left out"]["error"] == rows["routed experts left out"]["at best"]
    assert rows["routed experts left out"]["error"] == "100.0% (100% to 100%)"


@pytest.mark.usefixtures("scripts")
def test_merging_copies_of_one_expert_or_a_single_choice_changes_nothing_if_scaled(tmp_path: Path) -> None:
    """The sum of the chosen affinities is all that is left of a token's gate, and scaling keeps it."""
    for name, alike in (("tiny-gshard", True), ("tiny-switch", False)):
        rows = _merging_rows(tmp_path, *_merging(tmp_path, name, alike))
        scaled = rows["weights merged, then scaled, by token"]
        assert scaled["error"] == "0.0% (0% to 0%)"
        assert float(scaled["more"]) == 0
        assert float(rows["weights merged, by token"]["error"].split("%")[0]) > 10  # three matrices, each too small


@pytest.mark.usefixtures("scripts")
def test_merging_made_experts_errs_as_far_as_they_are_apart() -> None:
    made = _module("merge_at_inference").synthetic
    found = [sum(made(spread, seed, True) for seed in range(3)) / 3 for spread in (0.1, 0.3, 1.0, 3.0)]
    assert found == pytest.approx([0.008, 0.073, 0.56, 0.92], rel=0.1)  # seeds differ by up to 6%


@pytest.mark.usefixtures("scripts")
def test_merging_refuses_models_without_affinities(tmp_path: Path) -> None:
    folder, data = _merging(tmp_path, "tiny-hash")
    with pytest.raises(ConfigError, match="scoring_func softmax and topk_method greedy"):
        _module("merge_at_inference").main([folder, "--data", data])
    with pytest.raises(ConfigError, match="segment is 3 but must divide length, 32"):
        _module("merge_at_inference").main([folder, "--data", data, "--length", "32", "--segment", "3"])


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system has no list of allowed cores")
def test_a_script_binds_its_threads_but_not_what_it_starts(tmp_path: Path) -> None:
    """The process restarts itself with the binding; a child that is let go has all cores again."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, subprocess, sys\n"
        f"sys.path.insert(0, {str(FOLDER)!r})\n"
        "import binding\n"
        "def main(argv):\n"
        "    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as OpenMP does to the first thread\n"
        "    seen = 'import os; print(len(os.sched_getaffinity(0)))'\n"
        "    child = subprocess.run([sys.executable, '-c', seen], preexec_fn=binding.unbound, capture_output=True)\n"
        "    sys.stdout.write(os.environ['OMP_PROC_BIND'] + ' ' + ' '.join(argv) + ' ' + child.stdout.decode())\n"
        "binding.bound(main)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("OMP_")}
    done = subprocess.run([sys.executable, str(script), "word"], capture_output=True, text=True, env=environment)
    binding, word, cores = done.stdout.split()
    assert (binding, word) == ("close", "word")
    assert int(cores) >= len(os.sched_getaffinity(0))


@pytest.mark.usefixtures("scripts")
def test_samples_of_paths_share_one_vertex_or_none() -> None:
    x, labels = _module("parrots_miniature").path_samples(4000, torch.Generator().manual_seed(0))
    from_s, to_t = x.chunk(2, dim=1)
    assert torch.equal((from_s * to_t).sum(1), labels.float())
    assert 0.45 < labels.float().mean() < 0.55


@pytest.mark.usefixtures("scripts")
def test_what_experts_add_in_one_layer_has_a_row_for_each_layer(tmp_path: Path) -> None:
    words = "--steps 2 --seeds 1 --rates 1 --layers plain narrow"
    _module("parrots_miniature").main([*words.split(), "--out", str(tmp_path / "result.md")])
    found = _rows((tmp_path / "result.md").read_text().split("\n\n| layer | rates")[0])
    assert {row["layer"] for row in found} == {"plain", "narrow", "reference"}
    assert all(0 <= float(row["dense x16"].split()[0]) <= 1 for row in found)


@pytest.mark.usefixtures("scripts")
def test_merging_is_timed_against_dispatching_over_each_sweep_and_drawn(tmp_path: Path) -> None:
    out, picture = tmp_path / "merge.md", tmp_path / "merge.png"
    words = "--dim 16 --width 24 --experts 4 --chosen 1 2 --length 3 6 --batch 1 2 --at 2 6 2 --repeats 1"
    sizes = words.split()
    _module("merge").main([*sizes, "--out", str(out), "--picture", str(picture)])
    text = out.read_text()
    assert "Where merging starts to win" in text
    assert "![MEO's time over vanilla MoE's, over m](merge.png)" in text
    assert picture.read_bytes().startswith(b"\x89PNG")
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith(("| m", "| ---"))]
    assert len(lines) == 3 * 2 * 2 * 2  # sweeps, values, dtypes, passes
    # 2 matrices; one token of a sequence costs vanilla m products and MEO one; merging costs m a sequence
    weights, gates = 2 * 2 * 16 * 24, 2 * 2 * 4 * (16 + 24)
    found = {tuple(line.strip("| ").split(" | ")[:3]): line.strip("| ").split(" | ")[-1] for line in lines}
    assert found["2", "3", "2"] == f"{(weights * (3 + 2) + gates) / (weights * 2 * 3 + gates * 3):.2f}"


def test_where_merging_wins_is_from_where_it_never_loses_again(scripts: None) -> None:
    crossing = _module("merge").crossing
    assert crossing([1, 2, 4], [1.5, 0.9, 0.5]) == "wins from 2 on"
    assert crossing([1, 2, 4], [0.9, 1.1, 0.5]) == "wins from 4 on"
    assert crossing([1, 2, 4], [0.9, 0.8, 1.1]) == "does not win at 4"


def test_mumoe_is_measured_beside_a_dense_layer_of_as_many_parameters(scripts: None, tmp_path: Path) -> None:
    sizes = "--dim 32 --width 64 --tokens 8 --repeats 1 --layers cp-8 tr-2x4"
    _module("mumoe").main([*sizes.split(), "--out", str(tmp_path / "mumoe.md")])
    lines = [line.strip("| ").split(" | ") for line in (tmp_path / "mumoe.md").read_text().splitlines() if "| " in line]
    assert [line[0] for line in lines if line[1] == "fp32"] == ["dense", "cp-8", "tr-2x4"]
    assert [line[0] for line in lines if line[1] == "bf16"] == ["dense", "cp-8", "tr-2x4"]
    parameters = [int(line[3].replace(",", "")) for line in lines if line[1] == "fp32"]
    assert max(parameters) < 1.1 * min(parameters)
    assert all(float(line[-1]) > 0 for line in lines if line[1] in ("fp32", "bf16"))


@pytest.mark.usefixtures("scripts")
def test_sentence_tasks_are_a_page_of_scores_differences_and_costs_made_a_few_runs_at_a_time(tmp_path: Path) -> None:
    with gzip.open(Path(moekit.quickstart.__file__).parent / "text/math_en.train.jsonl.gz") as file:
        (tmp_path / "text.jsonl").write_bytes(b"".join(itertools.islice(file, 20)))
    prepare([tmp_path / "text.jsonl"], tmp_path / "text", vocab_size=300)
    shrunk = {
        "model.vocab_size": "301",
        "model.hidden_size": "16",
        "model.causal": "false",
        "model.ffn.hidden_act": "gelu",
        "objective.kind": "masked",
    }
    encoder = moekit.Model(load_run_config("tiny-dense", shrunk, template=True).model)
    moekit.save(encoder, tmp_path / "encoder", tokenizer=moekit.load_tokenizer(tmp_path / "text"))
    (tmp_path / "glue/rte").mkdir(parents=True)
    lines = [f"{n}\tseven and {n}\tit is {n}\t{'not_' * (n % 2)}entailment\n" for n in range(12)]
    for split, some in (("train", lines[:8]), ("dev", lines[8:])):
        (tmp_path / f"glue/rte/{split}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + "".join(some))
    out = tmp_path / "glue.md"
    sizes = "--tasks rte --seeds 1 --experts 3 --chosen 2 --batch 4 --steps 2 --runs 2"
    words = [str(tmp_path / "encoder"), *sizes.split(), "--out", str(out)]
    words += ["--data", str(tmp_path / "glue"), "--work", str(tmp_path / "work")]
    for made in (2, 4, 5):
        _module("glue").main(words)
        assert len([*(tmp_path / "work").glob("rte/*/receipt.json")]) == made
        assert (f" {5 - made} runs are missing" in out.read_text()) == (made < 5)
    scores, told, cost = (_rows(part) for part in out.read_text().split("##"))
    models = ["dense", "vanilla MoE", "MEO, sequence", "MEO, task", "MEO, token"]
    assert [row[""] for row in scores] == [row[""] for row in cost] == models
    assert [row[""] for row in told] == [name for name in models if name != "vanilla MoE"]
    assert {row["rte"] for row in scores} <= {"0.0", "25.0", "50.0", "75.0", "100.0"}  # of four examples
    flops = {row[""]: int(row["MFLOPs"].replace(",", "")) for row in cost}
    assert flops["dense"] <= flops["MEO, task"] < flops["MEO, token"] < flops["vanilla MoE"]
    assert all(float(row["rte"]) >= 0 for row in cost)

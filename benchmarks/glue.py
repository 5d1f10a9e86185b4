"""MEO where its paper judged it: one encoder tuned on sentence tasks as dense, vanilla MoE and MEO at three levels.

    moekit train ENCODER.yaml --out encoder            # objective masked, a dense GELU model
    python benchmarks/glue.py encoder --data FOLDER --work RUNS --out docs/results/glue.md

FOLDER holds a folder of files for each task. Experts begin as copies of the encoder's dense layers. All models of a
task and seed see the same batches, with the same settings. A finished run is not made again, and a killed one goes on;
--runs N stops after N more. Scores are of the development set, in percent, as GLUE counts them.
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import commit, machine, progress, table

from moekit import files
from moekit.compare.statistics import Difference, difference
from moekit.config import RunConfig, SentencesObjective, dump, load_run_config, validate
from moekit.data.sentences import examples, layout
from moekit.data.sentences import files as files_of
from moekit.formats.checkpoint import load_config
from moekit.train import metrics
from moekit.train.state import model_folder


class Task(NamedTuple):
    labels: int
    epochs: float
    metrics: tuple[str, ...]
    """Their mean is the score."""
    description: str


TASKS = {
    "cola": Task(2, 3, ("matthews",), "Is this sentence grammatical English?"),
    "sst2": Task(2, 0.33, ("accuracy",), "Is the mood of this film review positive or negative?"),
    "mrpc": Task(2, 3, ("f1", "accuracy"), "Do these two sentences from the news say the same?"),
    "stsb": Task(1, 3, ("pearson", "spearman"), "How alike are two sentences in meaning, from 0 to 5?"),
    "rte": Task(2, 3, ("accuracy",), "Does the second sentence follow from the first?"),
}
LEVELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "vanilla MoE": {"mode": "dispatch", "level": "token"},
    "MEO, sequence": {"mode": "merge", "level": "sequence"},
    "MEO, task": {"mode": "merge", "level": "task"},
    "MEO, token": {"mode": "merge", "level": "token"},
}
BASELINE = "vanilla MoE"


class Run(NamedTuple):
    task: str
    model: str
    seed: int

    def folder(self, work: Path) -> Path:
        return work / self.task / f"{self.model.replace(', ', '-').replace(' ', '-').lower()}-{self.seed}"


class Result(NamedTuple):
    score: float
    """Percent."""
    seconds: float
    """Of training."""
    flops: float
    """Of one forward pass over an example of mean length."""


def objective(args: argparse.Namespace, task: str) -> SentencesObjective:
    """Returns how a task's files are read."""
    valid = (args.sst2_valid,) if task == "sst2" and args.sst2_valid else None
    return SentencesObjective(task=task, valid=valid)


def count(args: argparse.Namespace, task: str) -> int:
    """Returns the examples that a task has to learn from."""
    folder, how = layout(objective(args, task), args.data / task)
    return sum(1 for file in files_of(folder, how.train) for _ in examples(file, how))


def settings(args: argparse.Namespace, run: Run, learnt: int) -> dict[str, Any]:
    """Returns a run's whole configuration."""
    task, base = TASKS[run.task], load_config(model_folder(args.encoder))
    assert base.ffn.kind == "dense"
    model = base.model_dump(mode="json") | {"num_labels": task.labels}
    asked = objective(args, run.task)
    if run.model != "dense":
        sizes = {"n_routed_experts": args.experts, "num_experts_per_tok": args.chosen}
        model["ffn"] = {"kind": "meo", "intermediate_size": base.ffn.intermediate_size, **sizes, **LEVELS[run.model]}
        if run.model == "MEO, task":
            asked = asked.model_copy(update={"description": task.description})
    steps = args.steps or max(1, round(task.epochs * learnt / args.batch))
    return {
        "model": model,
        "objective": asked.model_dump(mode="json", exclude_none=True),
        "init": str(args.encoder.resolve()),
        "data": {
            "path": str((args.data / run.task).resolve()),
            "sequence_length": min(128, base.max_position_embeddings),
            "batch_size": args.batch,
        },
        "optimizer": {"kind": "adamw", "lr": args.lr, "beta2": 0.999, "weight_decay": 0.01},
        "schedule": {"kind": "cosine", "warmup_steps": round(0.06 * steps), "final_ratio": 0.0},
        "steps": steps,
        "seed": run.seed,
        "precision": args.precision,
        "log_every": max(1, steps // 10),
        "save_every": max(1, steps // 4),
        "keep_checkpoints": 1,
    }


def make(args: argparse.Namespace, run: Run, learnt: int) -> None:
    """Trains a run in a process of its own, or finishes it; SystemExit with its last words where it fails."""
    folder = run.folder(args.work)
    folder.parent.mkdir(parents=True, exist_ok=True)
    words = ["--resume"]
    if not (folder / "config.yaml").is_file():
        file = folder.with_suffix(".yaml")
        files.write(file, dump(validate(RunConfig, settings(args, run, learnt))))
        words = [str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "moekit", "train", *words, "--out", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{folder}: {done.stderr.strip().splitlines()[-1]}")
    progress(f"{folder}: {read(args, run).score:.1f}")


def read(args: argparse.Namespace, run: Run) -> Result:
    """Returns what a finished run came to."""
    folder = run.folder(args.work)
    records = metrics.read(folder)
    last = [record for record in records if record["kind"] == "eval"][-1]
    trained = [record for record in records if record["kind"] == "train"][-1]
    config = load_run_config(folder / "config.yaml")
    score = 100 * statistics.fmean(last["metrics"][metric] for metric in TASKS[run.task].metrics)
    return Result(score, trained["seconds"], config.model.flops(args.tokens) / 3)


def finished(args: argparse.Namespace, run: Run) -> bool:
    file = run.folder(args.work) / "receipt.json"
    return file.is_file() and json.loads(file.read_text())["status"] == "done"


def average(found: dict[Run, Result], tasks: Sequence[str], model: str, seed: int) -> float | None:
    """Returns the mean over tasks of one seed, where all are there."""
    runs = [Run(task, model, seed) for task in tasks]
    return statistics.fmean(found[run].score for run in runs) if all(run in found for run in runs) else None


def spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    return f"{statistics.fmean(values):.1f}" + (f" ({statistics.stdev(values):.1f})" if len(values) > 1 else "")


def report(args: argparse.Namespace, found: dict[Run, Result]) -> str:
    """Returns the page: scores, what seeds tell apart, FLOPs and time beside them."""
    seeds = range(args.seeds)

    def of(model: str, task: str) -> dict[int, float]:
        if task == "average":
            means = {seed: average(found, args.tasks, model, seed) for seed in seeds}
            return {seed: mean for seed, mean in means.items() if mean is not None}
        return {seed: found[run].score for seed in seeds if (run := Run(task, model, seed)) in found}

    columns = [*args.tasks, "average"]
    scores = [[model, *(spread(list(of(model, task).values())) for task in columns)] for model in LEVELS]
    told = []
    for model in LEVELS:
        if model != BASELINE:
            differences = [difference(of(model, task), of(BASELINE, task)) for task in columns]
            told.append([model, *("" if one is None else interval(one) for one in differences)])
    cost = []
    for model in LEVELS:
        runs = [run for run in found if run.model == model]
        flops = {found[run].flops for run in runs}
        seconds = [[found[run].seconds for run in runs if run.task == task] for task in args.tasks]
        shown = f"{statistics.fmean(flops) / 1e6:,.0f}" if flops else ""
        cost.append([model, shown, *(f"{statistics.fmean(one):,.0f}" if one else "" for one in seconds)])
    epochs = ", ".join(f"{task} {TASKS[task].epochs:g}" for task in args.tasks)
    left = len(args.tasks) * len(LEVELS) * args.seeds - len(found)
    parts = [
        "# MEO on sentence tasks",
        f"`{shlex.join(['python', 'benchmarks/glue.py', *args.words])}`, commit {commit()}, "
        f"{machine(torch.device('cpu'))}.",
        f"{args.experts} experts of each linear map, {args.chosen} chosen; batches of {args.batch}, learning rate "
        f"{args.lr:g}; epochs: {epochs}. Percent; standard deviations over {args.seeds} "
        f"seed{'s' * (args.seeds > 1)} in brackets." + (f" {left} runs are missing." if left else ""),
        table(("", *columns), scores),
        f"## Less {BASELINE}",
        "Paired by seed, mean and 95% interval of Student's t.",
        table(("", *columns), told),
        "## Cost",
        f"Forward FLOPs of {args.tokens} tokens, in millions, and seconds of training a task's run.",
        table(("", "MFLOPs", *args.tasks), cost),
    ]
    return "\n\n".join(parts) + "\n"


def interval(one: Difference) -> str:
    return f"{one.mean:+.1f}" + (f" ({one.low:+.1f} to {one.high:+.1f})" if one.low is not None else "")


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path, help="run or model directory of a dense encoder")
    parser.add_argument("--data", type=Path, required=True, help="folder with a folder for each task")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, metavar="FILE.md", help="the page; standard output without it")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--models", nargs="+", choices=LEVELS, default=list(LEVELS), help="make runs of these; all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=int, help="make no more than this many; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once (1)")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--chosen", type=int, default=4)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--steps", type=int, help="of every run; default: a task's epochs")
    parser.add_argument("--tokens", type=int, default=48, help="of the example whose FLOPs are counted (48)")
    parser.add_argument("--precision", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--sst2-valid", metavar="FILE", help="SST-2's development set, where it is not dev.tsv")
    args = parser.parse_args(argv, argparse.Namespace(words=list(argv)))
    everyone = [Run(task, model, seed) for seed in range(args.seeds) for task in args.tasks for model in LEVELS]
    missing = [run for run in everyone if run.model in args.models and not finished(args, run)]
    learnt = {task: count(args, task) for task in args.tasks}
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda run: make(args, run, learnt[run.task]), missing[: args.runs]))
    text = report(args, {run: read(args, run) for run in everyone if finished(args, run)})
    if args.out:
        args.out.write_text(text, encoding="utf-8")
    else:
        sys.stdout.write(text)


if __name__ == "__main__":
    main(sys.argv[1:])

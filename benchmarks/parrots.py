"""Memory and path finding of small language models, as the number of experts grows and the active size stays.

    python benchmarks/parrots.py --task phone-book --threads 1 --out benchmarks/results/parrots_phone_book.md

The architectures and the recipe are those of parrots.yaml. Data, runs and answers stay in --folder; what is finished
there is not done again. A row is one architecture: the share of questions answered rightly, in all and by group.
"""

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import measure

from moekit.config import RunConfig, validate
from moekit.config.files import read_yaml
from moekit.data.synthetic import TASKS, prepare_synthetic, read_questions
from moekit.evaluate.synthetic import score
from moekit.formats.checkpoint import load
from moekit.formats.tokenizer import load_tokenizer
from moekit.train import train
from moekit.train.state import newest


def run_config(plan: dict[str, Any], architecture: str, data: Path, seed: int, changes: dict[str, Any]) -> RunConfig:
    """Returns the run of an architecture of the plan."""
    recipe = {**plan["recipe"], "seed": seed, **changes}
    recipe["model"] = {**recipe["model"], "ffn": plan["architectures"][architecture]}
    recipe["data"] = {**recipe["data"], "path": str(data)}
    return validate(RunConfig, recipe)


def result(config: RunConfig, data: Path, run: Path, questions: int) -> dict[str, Any]:
    """Returns what a run came to, after it is trained and asked; both are done once."""
    file = run / "score.json"
    if not file.exists():
        train(config, run, resume=(run / "config.yaml").is_file())
        asked = read_questions(data / "synthetic" / "questions.jsonl")[:questions]
        ((_, found),) = score(load(newest(run)), load_tokenizer(data), asked).items()
        losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        seconds = json.loads((run / "receipt.json").read_text())["seconds"]
        document = {
            "parameters": config.model.num_parameters,
            "active": config.model.num_active_parameters,
            "accuracy": found.all.accuracy,
            "standard_error": found.all.standard_error,
            "by_group": {group: share.accuracy for group, share in found.by_group.items()},
            "loss": [line["loss"] for line in losses if line["kind"] == "train"][-1],
            "seconds": seconds,
        }
        file.write_text(json.dumps(document))
    return dict(json.loads(file.read_text()))


def main(argv: Sequence[str]) -> None:
    parser = measure.parser(__file__, __doc__, repeats=1)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--plan", type=Path, default=Path(__file__).with_suffix(".yaml"), help="(parrots.yaml)")
    parser.add_argument("--architectures", nargs="+", metavar="NAME", help="of the plan (all)")
    parser.add_argument("--examples", type=int, default=10_000, help="to train on (10000)")
    parser.add_argument("--questions", type=int, default=500, help="to ask (500)")
    parser.add_argument("--steps", type=int, help="of training (the plan's)")
    parser.add_argument("--folder", type=Path, default=Path("parrots"), help="of data and runs (parrots)")
    args = measure.parse(parser, argv)
    plan, guard = read_yaml(args.plan), measure.Guard(args.device)
    folder = args.folder / args.task
    data = folder / "data"
    prepare_synthetic(args.task, data, examples=args.examples, questions=args.questions)
    changes: dict[str, Any] = {"device": str(args.device)}
    if args.steps:
        schedule = plan["recipe"]["schedule"]
        warmup = min(schedule["warmup_steps"], args.steps)
        changes |= {"steps": args.steps, "schedule": {**schedule, "warmup_steps": warmup}}
    rows, groups = [], list[str]()
    for name in args.architectures or plan["architectures"]:
        found = [
            result(run_config(plan, name, data, seed, changes), data, folder / f"{name}-{seed}", args.questions)
            for seed in plan["seeds"]
        ]
        groups = list(found[0]["by_group"])
        mean = {key: statistics.mean(one[key] for one in found) for key in ("accuracy", "standard_error", "loss")}
        by_group = [f"{statistics.mean(one['by_group'][group] for one in found):.3f}" for group in groups]
        sizes, seconds = (
            [f"{found[0][key]:,}" for key in ("parameters", "active")],
            sum(one["seconds"] for one in found),
        )
        right = [f"{mean[key]:.3f}" for key in ("accuracy", "standard_error")]
        rows.append([name, *sizes, *right, *by_group, f"{mean['loss']:.3f}", f"{seconds:.0f}"])
        measure.progress(" ".join(rows[-1]))
    header = ["architecture", "parameters", "active", "right", "standard error", *groups, "training loss", "seconds"]
    what = (
        f"{args.task}: {args.examples:,} examples, {args.questions:,} questions, seeds {plan['seeds']}, "
        f"{args.steps or plan['recipe']['steps']:,} steps."
    )
    measure.report(args, f"Experts and the task {args.task}", what, guard, [measure.table(header, rows)], [])


if __name__ == "__main__":
    main(sys.argv[1:])

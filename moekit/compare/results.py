"""What the runs of a comparison came to."""

import csv
import io
from pathlib import Path
from typing import Any

from moekit import files
from moekit.compare.plan import Plan, costs
from moekit.compare.runs import Run, receipt_of
from moekit.errors import DataError
from moekit.train import metrics

FILE, CURVES = "result.json", "curves.csv"
COLUMNS = ("architecture", "seed", "kind", "step", "tokens", "flops", "seconds", "loss", "bits_per_byte")


def write_results(plan: Plan, runs: list[Run], out: Path, data: dict[str, Any]) -> dict[str, Any]:
    """Returns what result.json holds, written with curves.csv: every figure of the finished runs."""
    found = {run: read_scores(run) for run in runs}
    result = {
        "title": plan.comparison.title,
        "data": data,
        "budget": plan.comparison.budget.model_dump(),
        "baseline": plan.comparison.baseline,
        "architectures": {
            name: costs(config) | {"seeds": {str(run.seed): found[run] for run in runs if run.name == name}}
            for name, config in plan.configs.items()
        },
    }
    files.write_json(out / FILE, result)
    files.write(out / CURVES, curves_csv(runs))
    return result


def read_scores(run: Run) -> dict[str, Any]:
    """Returns the last validation of a finished run, and under `timing` what depends on the machine."""
    records = metrics.read(run.path)
    evals = [record for record in records if record["kind"] == "eval"]
    trained = [record for record in records if record["kind"] == "train"]
    if not evals or not trained or evals[-1]["step"] != run.config.steps:
        raise DataError(f"{run.path / metrics.FILE} has no validation after the last step; remove that run")
    last, seconds = evals[-1], trained[-1]["seconds"]
    receipt = receipt_of(run)
    return {
        "loss": last["loss"],
        "bits_per_byte": last["bits_per_byte"],
        "domains": {
            name: {"loss": one["loss"], "bits_per_byte": one["bits_per_byte"]} for name, one in last["domains"].items()
        },
        "training_loss": trained[-1]["loss"],
        "device": receipt["device"],
        "timing": {"seconds": seconds, "tokens_per_second": trained[-1]["tokens"] / max(seconds, 1e-9)},
    }


def curves_csv(runs: list[Run]) -> str:
    """Returns every logged and every validated loss of the runs, with the tokens, FLOPs and seconds spent until then.

    Seconds are of training alone, validation and checkpoints aside.
    """
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, restval="", lineterminator="\n")
    table.writeheader()
    for run in runs:
        each = costs(run.config)["flops_per_token"]
        seconds = 0.0
        for record in metrics.read(run.path):
            if record["kind"] in ("train", "eval"):
                seconds = record.get("seconds", seconds)
                row = {key: record[key] for key in ("kind", "step", "tokens", "loss")}
                if "bits_per_byte" in record:
                    row["bits_per_byte"] = record["bits_per_byte"]
                row |= {"flops": round(record["tokens"] * each), "seconds": seconds}
                table.writerow({"architecture": run.name, "seed": run.seed, **row})
    return text.getvalue()

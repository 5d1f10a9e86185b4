"""What the runs of a comparison came to: result.json and curves.csv."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from moekit import files
from moekit.compare import answers
from moekit.compare.plan import Plan, costs
from moekit.compare.runs import Run, receipt_of
from moekit.compare.statistics import difference, summarize
from moekit.errors import DataError
from moekit.train import metrics

FILE, CURVES = "result.json", "curves.csv"
MEASURES = ("loss", "bits_per_byte")
COLUMNS = ("architecture", "seed", "kind", "step", "tokens", "flops", "seconds", "loss", "bits_per_byte")
Scores = Mapping[str, Mapping[str, float]]
"""Architecture -> seed -> value."""


def write_results(
    plan: Plan, runs: list[Run], out: Path, data: dict[str, Any], asked: Mapping[Run, dict[str, Any]]
) -> dict[str, Any]:
    """Returns what result.json holds, written with curves.csv: all figures of the finished runs.

    `asked` is what questions of a synthetic task came to, empty without any. Whatever depends on the machine's speed
    stands under keys called `timing`; the rest is the same every time.
    """
    comparison = plan.comparison
    found = {run: read_scores(run) for run in runs}
    if not found:
        raise DataError(f"{out} has no finished run yet, so there is nothing to report")
    rows = {}
    for name, config in plan.configs.items():
        own = {str(run.seed): score for run, score in found.items() if run.name == name}
        times = [score["timing"] for score in own.values()]
        timing = {key: fmean(time[key] for time in times) for key in times[0]} if times else None
        taken = comparison.architectures[name].run
        rows[name] = costs(config) | {"run": taken, "timing": timing, "seeds": own}
    result: dict[str, Any] = {
        "title": comparison.title,
        "data": data,
        "budget": comparison.budget.model_dump(),
        "baseline": comparison.baseline,
        "seeds": comparison.seeds,
        "architectures": rows,
    }
    for measure in MEASURES:
        result[measure] = analysis({name: row["seeds"] for name, row in rows.items()}, measure, comparison.baseline)
    if asked:
        by_seed = {name: {str(r.seed): found for r, found in asked.items() if r.name == name} for name in rows}
        result[answers.MEASURE] = analysis(by_seed, answers.MEASURE, comparison.baseline)
        result[answers.MEASURE]["questions"] = next(iter(asked.values()))["questions"]
    result["expected"] = [beside(one.model_dump(), result["loss"], comparison.baseline) for one in comparison.expected]
    files.write_json(out / FILE, result)
    files.write(out / CURVES, curves_csv(runs))
    return result


def analysis(rows: Mapping[str, Mapping[str, Any]], measure: str, baseline: str) -> dict[str, Any]:
    """Returns one measure's summaries and differences to the baseline, of the mean over domains (`mean`) and of each
    domain, and the differences of all pairs (row less column) of the mean."""
    domains = [*next(iter(next(seeds for seeds in rows.values() if seeds).values()))["domains"]]

    def compared(scores: Scores) -> dict[str, Any]:
        summaries = {name: summarize([*of.values()])._asdict() for name, of in scores.items() if of}
        against = {name: _less_all(scores, name).get(baseline) for name in summaries if name != baseline}
        return {"summaries": summaries, "differences": {name: one for name, one in against.items() if one}}

    overall = {name: {seed: one[measure] for seed, one in of.items()} for name, of in rows.items()}
    parts = {
        domain: {name: {s: one["domains"][domain][measure] for s, one in of.items()} for name, of in rows.items()}
        for domain in domains
    }
    return {
        "mean": compared(overall),
        "domains": {domain: compared(scores) for domain, scores in parts.items()},
        "pairs": {name: _less_all(overall, name) for name in overall},
    }


def _less_all(scores: Scores, name: str) -> dict[str, Any]:
    """Returns an architecture's difference to each other one, where they share a seed."""
    found = {other: difference(scores[name], of) for other, of in scores.items() if other != name}
    return {other: one.document() for other, one in found.items() if one}


def beside(expected: dict[str, Any], ours: dict[str, Any], baseline: str) -> dict[str, Any]:
    """Returns somebody else's figures with their differences to the baseline, and whether ours point the same way.

    `agreement` is same or opposite where our interval excludes 0 and theirs is not 0, else why it cannot be said.
    """
    values, better = expected["values"], -1 if expected["better"] == "lower" else 1
    differences, agreement = {}, {}
    for name, value in values.items():
        if name == baseline or baseline not in values:
            continue
        theirs = differences[name] = round(value - values[baseline], 9)  # of printed figures
        if (found := ours["mean"]["differences"].get(name)) is None:
            agreement[name] = "not measured"
        elif theirs == 0:
            agreement[name] = "equal there"
        elif found["low"] is None or found["low"] <= 0 <= found["high"]:
            agreement[name] = found["verdict"]
        else:
            agreement[name] = "same" if (theirs * better > 0) == (found["mean"] < 0) else "opposite"
    return {**expected, "differences": differences, "agreement": agreement}


def read_scores(run: Run) -> dict[str, Any]:
    """Returns the last validation of a finished run, and under `timing` what depends on the machine."""
    records = metrics.read(run.path)
    evals = [record for record in records if record["kind"] == "eval"]
    trained = [record for record in records if record["kind"] == "train"]
    if not evals or not trained or evals[-1]["step"] != run.config.steps:
        raise DataError(f"{run.path / metrics.FILE} has no validation after the last step; remove that run")
    last, seconds, receipt = evals[-1], trained[-1]["seconds"], receipt_of(run)
    return {
        **{measure: last[measure] for measure in MEASURES},
        "domains": {name: {key: one[key] for key in MEASURES} for name, one in last["domains"].items()},
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
        for point in curve(run):
            table.writerow({"architecture": run.name, "seed": run.seed, **point})
    return text.getvalue()


def curve(run: Run) -> list[dict[str, Any]]:
    """Returns the points of a run's training and validation curves, in the order in which they were logged."""
    each, records = costs(run.config)["flops_per_token"], metrics.read(run.path)
    logged = [(record["step"], record["seconds"]) for record in records if record["kind"] == "train"]
    steps, seconds = zip((0, 0.0), *logged, strict=True)
    return [
        {key: record[key] for key in ("kind", "step", "tokens", *MEASURES) if key in record}
        | {
            "flops": round(record["tokens"] * each),
            "seconds": round(float(np.interp(record["step"], steps, seconds)), 3),
        }
        for record in records
        if record["kind"] in ("train", "eval")
    ]

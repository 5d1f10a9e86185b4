"""A comparison from its file to its report."""

import time
from pathlib import Path
from typing import Any

from moekit import files
from moekit.compare import answers
from moekit.compare import runs as of
from moekit.compare.plan import Plan
from moekit.compare.report import write_report
from moekit.compare.results import curve, write_results
from moekit.compare.runner import Watch, locked, log_of, train_all
from moekit.config.files import write_yaml
from moekit.data.shards import SYNTHETIC
from moekit.errors import ConfigError

FILE = "compare.yaml"


def compare(
    plan: Plan, out: str | Path, *, jobs: int = 1, train: bool = True, watch: Watch = lambda statuses: None
) -> dict[str, Any]:
    """Trains what is not trained yet, and returns the content of `out`/result.json; "status" is done, failed or
    interrupted.

    `out` gets compare.yaml, runs/NAME/seed-K (each a run as `moekit train` makes one), result.json, curves.csv and
    report.html. Where the data brings questions along, every run is asked them. The same call goes on with an
    interrupted comparison; more seeds or architectures may be added. With `train` False nothing is trained: the result
    is of the runs that are finished. Raises ConfigError for a directory that holds something else, or runs that were
    trained with other settings.
    """
    start, folder = time.monotonic(), Path(out)
    if folder.exists() and not (folder / FILE).is_file() and any(one.name != ".lock" for one in folder.iterdir()):
        raise ConfigError(f"{folder} holds something else; choose another --out")
    with locked(folder) as lock:
        runs = of.runs_of(plan, folder)
        fingerprint, order = of.check(runs)
        data = {"path": plan.baseline.data.path, "sha256": fingerprint, "order": order}
        files.write(folder / FILE, write_yaml(plan.comparison.model_dump()))
        ended = train_all(runs, jobs, lock, watch) if train else []
        failed = [status for status in ended if status.state == "failed"]
        if any(status.state == "stopped" for status in ended):
            return {"status": "interrupted", "out": str(folder)}
        finished = [run for run in runs if of.state(run) == "done"]
        questions = Path(plan.baseline.data.path) / SYNTHETIC / "questions.jsonl"
        kept = {run: folder / "runs" / run.name / f"seed-{run.seed}.answers.json" for run in finished}
        asked = {run: answers.ask(run, questions, kept[run]) for run in finished} if questions.is_file() else {}
        result = write_results(plan, finished, folder, data, asked) | {
            "failed": [
                {"run": status.run.label, "error": status.error, "log": str(log_of(status.run))} for status in failed
            ]
        }
        curves: dict[str, dict[int, list[dict[str, Any]]]] = {}
        for run in finished:
            curves.setdefault(run.name, {})[run.seed] = curve(run)
        report = write_report(folder, result, curves, plan.comparison.model_dump())
    return result | {
        "status": "failed" if failed else "done",
        "out": str(folder),
        "report": str(report),
        "seconds": round(time.monotonic() - start, 1),
    }

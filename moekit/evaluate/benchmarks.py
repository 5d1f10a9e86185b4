"""Benchmark tasks: the files in `tasks`, run by lm-evaluation-harness, and what of it goes into the record.

With the harness's own command, or in Python: `TaskManager(include_path=FOLDER, metadata={"task_data": [...]})`.
"""

import logging
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from moekit import files
from moekit.errors import ConfigError, nearest
from moekit.evaluate import sandbox
from moekit.evaluate.data import find
from moekit.evaluate.harness import MoekitLM

FOLDER = Path(__file__).parent / "tasks"
PREFIX = "moekit_"
"""Before a task's name in the harness, which has some of the same names."""
UNSAFE = "unsafe_code: true"
"""In the file of a task that runs what the model writes; the harness's own key."""
PROMPT = (
    "description", "doc_to_text", "doc_to_choice", "doc_to_target", "target_delimiter", "fewshot_delimiter",
    "generation_kwargs",
)  # fmt: skip


def names() -> list[str]:
    """Returns the names of the tasks."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_tasks(
    tasks: Sequence[str], task_data: Sequence[str | Path], *, allow_code_execution: bool = False
) -> dict[str, Any]:
    """Returns the harness's tasks of these names, their files read from the folders `task_data`.

    Raises ConfigError for a name that is none and for a task that would run programs without leave to do so, DataError
    for a file that is missing or of another form, UnsupportedError where programs cannot be contained.
    """
    known = names()
    for name in tasks:
        if name not in known:
            raise ConfigError(f"there is no task {name!r}{nearest(name, known)}; tasks: {', '.join(known)}")
        if UNSAFE in (FOLDER / f"{name}.yaml").read_text(encoding="utf-8"):
            if not allow_code_execution:
                raise ConfigError(f"task {name} runs what the model writes; --allow-code-execution allows it")
            sandbox.isolation()
    folders = [str(folder) for folder in task_data]
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what the task files are meant to say
    manager = TaskManager(include_path=FOLDER, include_defaults=False, metadata={"task_data": folders})
    return {name: manager.load([PREFIX + name])["tasks"][PREFIX + name] for name in tasks}


def run_tasks(harness: MoekitLM, tasks: Mapping[str, Any], limit: int | None = None) -> dict[str, dict[str, Any]]:
    """Returns, for each task, its metrics with their standard errors, and all that they depend on.

    `limit` takes the first items of each task only.
    """
    return {name: _run(harness, name, task, limit) for name, task in tasks.items()}


def _run(harness: MoekitLM, name: str, task: Any, limit: int | None) -> dict[str, Any]:
    before = harness.truncated
    # not simple_evaluate, which asks pip and the system for versions, for seconds
    found = evaluate(harness, {"tasks": {PREFIX + name: task}}, limit=limit, confirm_run_unsafe_code=True)
    assert found is not None
    results, samples = found["results"][PREFIX + name], found["samples"][PREFIX + name]
    values = {key.removesuffix(",none"): value for key, value in results.items() if key.endswith(",none")}
    metrics = {
        metric: {"value": value, "stderr": _number(values.get(f"{metric}_stderr"))}
        for metric, value in values.items()
        if not metric.endswith("_stderr")
    }
    config, first = task.config, task.instances[0]
    paths = [find(config.metadata["task_data"], file) for file in config.dataset_kwargs["files"].values()]
    return {
        "metrics": metrics,
        "n": len({sample["doc_id"] for sample in samples}),
        "limit": limit,
        "shots": config.metadata["shots"],
        "style": config.metadata["style"],
        "batch_size": harness.batch_size,
        "max_length": harness.max_length,
        "max_new_tokens": harness.generation(config.generation_kwargs)[1] if config.generation_kwargs else None,
        "truncated": harness.truncated - before,
        "by_subject": _by_subject(samples, list(metrics)),
        "prompt": {key: value for key in PROMPT if (value := getattr(config, key)) is not None},
        "example": {"prompt": first.args[0], **_expected(first)},
        "files": {path.name: files.sha256(path) for path in paths},
        "isolation": sandbox.isolation().note if config.unsafe_code else None,
        "lm_eval": version("lm_eval"),
    }


def _expected(request: Any) -> dict[str, Any]:
    """Returns what is scored after the example's prompt, or how it is continued."""
    given = request.args[1]
    return {"continuation": given} if isinstance(given, str) else {"generation": given}


def _number(value: Any) -> float | None:
    return value if isinstance(value, float) else None  # "N/A" of a single item


def _by_subject(samples: list[dict[str, Any]], metrics: list[str]) -> dict[str, dict[str, float]] | None:
    """Returns number of items and means of each subject, where the items have one."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for sample in samples:
        if "subject" in sample["doc"]:
            groups.setdefault(sample["doc"]["subject"], []).append(sample)
    return {
        subject: {"n": len(group), **{name: sum(one[name] for one in group) / len(group) for name in metrics}}
        for subject, group in sorted(groups.items())
    } or None

"""The questions that a synthetic task's data brings along, asked of every run; a solver judges the answers."""

from pathlib import Path
from typing import Any

from moekit import files
from moekit.compare.runs import Run
from moekit.data.synthetic import read_questions
from moekit.errors import CheckpointError, DataError
from moekit.evaluate.synthetic import score
from moekit.formats.checkpoint import load
from moekit.formats.directory import MANIFEST
from moekit.formats.tokenizer import load_tokenizer
from moekit.train.state import newest

MEASURE = "accuracy"


def ask(run: Run, questions: Path, kept: Path) -> dict[str, Any]:
    """Returns a finished run's share of right answers, in all and by group, as `results.analysis` takes a score.

    What was asked stays in `kept`, and is asked again only if the questions or the model are others.
    """
    folder = newest(run.path)
    if folder is None:
        raise CheckpointError(f"{run.path} has no whole checkpoint to ask; remove it, and it is trained again")
    of = {"questions": files.sha256(questions), "model": files.sha256(folder / MANIFEST)}
    if kept.is_file():
        found = files.read_json(kept, dict[str, Any], DataError)
        if found.get("of") == of:
            return dict(found["score"])
    model, tokenizer = load(folder, check_hashes=False), load_tokenizer(folder)
    ((_, result),) = score(model, tokenizer, read_questions(questions)).items()
    groups = {group: {MEASURE: share.accuracy} for group, share in result.by_group.items()}
    answered = {MEASURE: result.all.accuracy, "questions": result.all.questions, "domains": groups}
    files.write_json(kept, {"of": of, "score": answered})
    return answered

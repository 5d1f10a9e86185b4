"""A task's text and questions, and the dataset made of them."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moekit.data import shards
from moekit.data.prepare import Progress, prepare
from moekit.data.synthetic.tasks import TASKS, Question
from moekit.errors import ConfigError, DataError, nearest
from moekit.formats.tokenizer import MIN_VOCAB_SIZE

logger = logging.getLogger(__name__)

EXAMPLES, QUESTIONS, SEED = 10_000, 1_000, 0


def prepare_synthetic(
    task: str,
    out: str | Path,
    *,
    examples: int = EXAMPLES,
    questions: int = QUESTIONS,
    seed: int = SEED,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Returns the manifest of a dataset of a task; its text is `out`/synthetic/examples.jsonl and questions.jsonl.

    The questions are the validation text too. A token is a byte: every digit and every vertex is one. The same call
    gives the same bytes; on a finished `out` it changes nothing. Raises ConfigError for a task that is not known, and
    DataError for a folder of something else or of other examples.
    """
    if task not in TASKS:
        raise ConfigError(f"there is no synthetic task {task!r}{nearest(task, TASKS)}; tasks: {', '.join(TASKS)}")
    folder = Path(out) / shards.SYNTHETIC
    logger.info("drawing %s examples and %s questions of %s", f"{examples:,}", f"{questions:,}", task)
    drawn = TASKS[task].draw(seed, examples, questions)
    files = {folder / "examples.jsonl": _lines(drawn[0]), folder / "questions.jsonl": _lines(drawn[1])}
    for file, content in files.items():
        if file.exists() and file.read_bytes() != content:
            raise DataError(f"{file} holds other examples than these arguments give; choose another --out")
    if not folder.exists() and folder.parent.is_dir() and (other := sorted(folder.parent.iterdir())):
        raise DataError(f"{out} holds something else ({other[0].name}); choose another --out")
    for file, content in files.items():
        shards.write(file, content)
    train, asked = files
    made: dict[str, Any] = prepare(
        [train], out, valid_paths=[asked], vocab_size=MIN_VOCAB_SIZE, prompt_field="prompt", progress=progress
    )
    return made


def _lines(questions: Sequence[Question]) -> bytes:
    return "".join(json.dumps(question.model_dump()) + "\n" for question in questions).encode()

"""How well a model labels sentences: the task that its run learned, on any files of that format."""

from pathlib import Path
from typing import Any

from moekit import files as disk
from moekit.config import RunConfig, SentencesObjective, validate
from moekit.data.sentences import examples, files, layout
from moekit.errors import CheckpointError, ConfigError, MoekitError
from moekit.formats.tokenizer import Tokenizer
from moekit.nn.model import Model
from moekit.receipts import FILE
from moekit.train.hardware import Hardware
from moekit.train.objectives.sentences import check_labels, description_ids, encode, judge


def score_sentences(
    model: Model, tokenizer: Tokenizer, folder: Path, path: Path, sequence_length: int | None = None
) -> dict[str, Any]:
    """Returns examples, loss and metrics on a file, or on the validation files of a folder, with what they depend on.

    How they are read, and what is measured, is what the run that made the model's directory, `folder`, was told.
    """
    if model.config.num_labels is None:
        raise ConfigError(f"{folder} has no num_labels: it predicts words; train it with objective.kind sentences")
    config = _config(folder)
    assert isinstance(config.objective, SentencesObjective)
    objective = config.objective.model_copy(update={"train": None}) if path.is_file() else config.objective
    place, how = layout(objective, path)
    check_labels(how, model.config.num_labels)
    found = files(place, how.train if path.is_file() else how.valid)
    if not found:
        raise ConfigError(f"objective.valid of {folder} names no file; give --sentences a file")
    length = sequence_length or config.data.sequence_length
    encoded = encode([example for file in found for example in examples(file, how)], tokenizer, length)
    described = description_ids(objective, tokenizer)
    hardware = Hardware(model.embed_tokens.weight.device, False)
    scores = judge(model, encoded, how, hardware, tokenizer.pad_id, described)
    return {
        "source": {str(file): disk.sha256(file) for file in found},
        "task": objective.task,
        "settings": {"sequence_length": length, "labels": list(how.labels), "description": objective.description},
        "examples": scores["examples"],
        "truncated": encoded.truncated,
        "loss": scores["loss"],
        "metrics": scores["metrics"],
    }


def _config(folder: Path) -> RunConfig:
    """Returns what the run that made a model was told."""
    receipt = disk.read_json(folder / FILE, dict[str, Any], CheckpointError)
    try:
        config = validate(RunConfig, receipt.get("config"))
    except MoekitError as error:
        raise CheckpointError(f"{folder / FILE} is not that of a run: {error}") from None
    if not isinstance(config.objective, SentencesObjective):
        raise CheckpointError(f"{folder / FILE} is of a run with objective.kind {config.objective.kind}, not sentences")
    return config

"""Labels of sentences and pairs: cross-entropy of a class, or the squared error of a number."""

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from moekit import files as disk
from moekit.config import RunConfig, SentencesObjective
from moekit.data import Batch
from moekit.data.sampler import places
from moekit.data.sentences import Example, Format, examples, files, layout
from moekit.errors import ConfigError
from moekit.formats.tokenizer import Tokenizer, load_tokenizer
from moekit.nn.model import Model, ModelOutput
from moekit.ops.loss import TokenLoss
from moekit.train import health
from moekit.train.hardware import Hardware
from moekit.train.objectives.objective import Validation
from moekit.train.scores import measure

logger = logging.getLogger(__name__)

AT_ONCE = 64
"""Sequences of a batch that is only scored."""


class Encoded(NamedTuple):
    """Examples as tokens."""

    tokens: list[list[int]]
    labels: np.ndarray
    truncated: int


def encode(found: Sequence[Example], tokenizer: Tokenizer, length: int) -> Encoded:
    """Returns examples as tokens: each sentence and an end of text behind it, so a pair has one in between.

    Of what is longer than `length` the longer sentence loses its end.
    """
    texts = [part for one in found for part in (one.text, one.pair) if part is not None]
    ids = iter(tokenizer.encode_batch(texts))
    tokens, truncated = [], 0
    for one in found:
        parts = [next(ids)] + ([] if one.pair is None else [next(ids)])
        cut = _cut(parts, length - len(parts))
        truncated += cut != parts
        tokens.append([token for part in cut for token in (*part, tokenizer.eos_id)])
    return Encoded(tokens, np.array([one.label for one in found], dtype=np.float32), truncated)


def _cut(parts: list[list[int]], room: int) -> list[list[int]]:
    """Returns one or two sentences of at most `room` tokens together, the longer one cut down to the other first."""
    if len(parts) == 1:
        return [parts[0][:room]]
    first, second = parts
    kept = min(len(first), max(room - len(second), room - room // 2))
    return [first[:kept], second[: room - kept]]


def batch_of(encoded: Encoded, rows: Sequence[int], padding: int) -> Batch:
    """Returns these examples as one batch, as long as the longest; padding has document -1."""
    tokens = [encoded.tokens[row] for row in rows]
    ids = np.full((len(rows), max(map(len, tokens))), padding, dtype=np.int64)
    documents = np.full_like(ids, -1)
    for row, sequence in enumerate(tokens):
        ids[row, : len(sequence)], documents[row, : len(sequence)] = sequence, 0
    return Batch(ids, encoded.labels[list(rows)], documents)


def score(
    model: Model, part: Batch, hardware: Hardware, description: Sequence[int] | None, **options: Any
) -> ModelOutput:
    """Returns the model's output for a batch; `description` are the tokens of the task's."""
    ids, documents = (torch.from_numpy(one).to(hardware.device) for one in (part.input_ids, part.document_ids))
    if description is not None:
        options["task_ids"] = torch.tensor(description, device=hardware.device).expand(len(ids), -1)
    real = None if (part.document_ids >= 0).all() else documents >= 0
    with torch.autocast(hardware.device.type, torch.bfloat16, enabled=hardware.autocast):
        out: ModelOutput = model(ids, padding_mask=real, return_routing=True, **options)
    return out


def loss(scores: Tensor, labels: np.ndarray) -> TokenLoss:
    """Returns the summed loss of a batch: squared error where there is one score, else cross-entropy in nats."""
    wanted = torch.from_numpy(labels).to(scores.device)
    if scores.shape[1] == 1:
        total = F.mse_loss(scores.squeeze(1), wanted.to(scores.dtype), reduction="sum")
    else:
        total = F.cross_entropy(scores, wanted.long(), reduction="sum")
    return TokenLoss(total, torch.tensor(len(labels), device=scores.device))


@torch.no_grad()
def judge(
    model: Model, encoded: Encoded, how: Format, hardware: Hardware, padding: int, description: Sequence[int] | None
) -> dict[str, Any]:
    """Returns examples, loss, metrics and the load of the experts; leaves the model in the mode it was in.

    Sequences of like length share a batch, so padding is little; it changes no score but by rounding.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(encoded.tokens)), key=lambda row: len(encoded.tokens[row]))
    load, total = health.no_load(model.config, hardware.device), 0.0
    scores = np.zeros((len(order), model.config.num_labels or 0), dtype=np.float32)
    for first in range(0, len(order), AT_ONCE):
        rows = order[first : first + AT_ONCE]
        batch = batch_of(encoded, rows, padding)
        out = score(model, batch, hardware, description)
        assert out.scores is not None
        health.add_routing(load, out.routing or [])
        total += float(loss(out.scores, batch.labels).total)
        scores[rows] = out.scores.float().cpu().numpy()
    model.train(was_training)
    return {
        "examples": len(order),
        "loss": total / len(order),
        "metrics": measure(how.metrics, scores, encoded.labels),
        "tokens_per_expert": load.tokens_per_expert.tolist(),
    }


class Sentences:
    """Files of labelled sentences, in a new order every epoch; the tokenizer is that of the model to start from."""

    def __init__(self, config: RunConfig, hardware: Hardware, weights: Path | None) -> None:
        assert isinstance(config.objective, SentencesObjective)
        if weights is None:
            raise ConfigError(
                "init is missing: objective.kind sentences takes the tokenizer of the model that it names"
            )
        self.config, self.hardware = config, hardware
        self.tokenizer = load_tokenizer(weights)
        room = config.model.vocab_size - self.tokenizer.vocab_size
        if room < 0:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size} but the tokenizer of {weights} has "
                f"{self.tokenizer.vocab_size} entries; use that model's own, {self.tokenizer.vocab_size} or more"
            )
        folder, self.format = layout(config.objective, Path(config.data.path))
        check_labels(self.format, config.model.num_labels)
        named = {split: files(folder, getattr(self.format, split)) for split in ("train", "valid")}
        self.train, self.valid = (self._read(named[split]) for split in ("train", "valid"))
        self.description = description_ids(config.objective, self.tokenizer)
        hashed = {split: {str(file): disk.sha256(file) for file in found} for split, found in named.items()}
        content = [list(of.values()) for of in hashed.values()]  # wherever it lies
        told = json.dumps([content, self.format, self.tokenizer.fingerprint])
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()
        counts = {split: self._counts(getattr(self, split)) for split in named}
        self.inputs = {
            "data": {
                "path": config.data.path,
                "sha256": self.fingerprint,
                "tokenizer": self.tokenizer.fingerprint,
                "files": hashed,
                "format": self.format._asdict(),
                "examples": counts,
            }
        }
        for split, count in counts.items():
            if count["truncated"]:
                logger.warning(
                    "%d of %d examples of %s are longer than data.sequence_length %d and were cut",
                    count["truncated"], count["examples"], split, config.data.sequence_length,
                )  # fmt: skip
        self.token_counts = np.bincount(
            [token for one in self.train.tokens for token in one], minlength=config.model.vocab_size
        ).astype(np.int64)

    def _read(self, named: list[Path]) -> Encoded:
        found = [example for file in named for example in examples(file, self.format)]
        return encode(found, self.tokenizer, self.config.data.sequence_length)

    @staticmethod
    def _counts(encoded: Encoded) -> dict[str, int]:
        return {"examples": len(encoded.tokens), "truncated": encoded.truncated}

    def batch(self, step: int) -> Batch:
        rows = places(step, self.config.data.batch_size, len(self.train.tokens), self.config.seed)
        return batch_of(self.train, rows, self.tokenizer.pad_id)

    def forward(self, model: Model, part: Batch, **options: Any) -> ModelOutput:
        out = score(model, part, self.hardware, self.description, **options)
        assert out.scores is not None
        return out._replace(token_loss=loss(out.scores, part.labels))

    def validate(self, model: Model) -> Validation | None:
        if not self.valid.tokens:
            return None
        padding = self.tokenizer.pad_id
        found = judge(model, self.valid, self.format, self.hardware, padding, self.description)
        return Validation(found, {"loss": found["loss"], **found["metrics"]})


def check_labels(how: Format, num_labels: int | None) -> None:
    """Raises ConfigError unless the model has as many scores as there are labels, or one for a number."""
    if num_labels != (wanted := len(how.labels) or 1):
        what = f"{wanted} labels" if how.labels else "numbers, for which it is 1"
        raise ConfigError(f"model.num_labels is {num_labels} but the task has {what}; use --model.num_labels {wanted}")


def description_ids(objective: SentencesObjective, tokenizer: Tokenizer) -> list[int] | None:
    """Returns the tokens of the task's description, or None."""
    if objective.description is None:
        return None
    ids = tokenizer.encode(objective.description)
    if not ids:
        raise ConfigError("objective.description is empty; say in words what the task is")
    return ids

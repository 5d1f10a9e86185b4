"""What the objectives on prepared text share."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moekit.config import RunConfig
from moekit.data import Batch, Sampler, open_dataset
from moekit.errors import ConfigError
from moekit.formats.tokenizer import load_tokenizer
from moekit.nn.model import Model, ModelOutput
from moekit.train.hardware import Hardware, forward
from moekit.train.objectives.objective import Validation


class Text(ABC):
    """Prepared text, opened and checked. An objective adds what is predicted and how it is validated."""

    def __init__(self, config: RunConfig, hardware: Hardware, weights: Path | None = None) -> None:
        """Opens the data; the weights to start from say nothing of it."""
        data = config.data
        self.config, self.hardware = config, hardware
        self.dataset = open_dataset(data.path, "train", order=data.order)
        self.valid = open_dataset(data.path, "valid") if "valid" in self.dataset.manifest.splits else None
        self.tokenizer = load_tokenizer(data.path)
        self.room = config.model.vocab_size - self.dataset.vocab_size
        if self.room < 0:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size} but the tokenizer of {data.path} has "
                f"{self.dataset.vocab_size} entries; use --model.vocab_size {self.dataset.vocab_size}"
            )
        self.fingerprint = self.dataset.fingerprint
        tokenizer = self.dataset.tokenizer_fingerprint
        self.inputs = {"data": {"path": data.path, "sha256": self.fingerprint, "tokenizer": tokenizer}}
        self.token_counts = np.pad(self.dataset.token_counts(), (0, self.room))
        self.sampler = Sampler(self.dataset, data.sequence_length, data.batch_size, config.seed, data.packing)

    def batch(self, step: int) -> Batch:
        return self.sampler.batch(step)

    def forward(self, model: Model, part: Batch, **options: Any) -> ModelOutput:
        out: ModelOutput = forward(model, part, self.hardware, self.config.data.cross_document_attention, **options)
        return out

    @abstractmethod
    def validate(self, model: Model) -> Validation | None:
        """Returns the scores on unseen text, or None where there is none."""


def of_domains(scores: Mapping[str, NamedTuple], measure: str) -> Validation | None:
    """Returns the validation that scores by domain make, each with a loss and a `measure`; None without any."""
    found = {name: score._asdict() for name, score in scores.items()}
    if not found:
        return None
    means = {of: sum(one[of] for one in found.values()) / len(found) for of in ("loss", measure)}
    kept = {name: {of: one[of] for of in means} for name, one in found.items()}
    return Validation({**means, "domains": found}, kept)

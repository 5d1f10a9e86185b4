"""What the loop asks of an objective: batches, a loss, a validation."""

from typing import Any, NamedTuple, Protocol

import numpy as np

from moekit.data import Batch
from moekit.formats.tokenizer import Tokenizer
from moekit.nn.model import Model, ModelOutput


class Validation(NamedTuple):
    """What a validation found."""

    record: dict[str, Any]
    """For metrics.jsonl; its `loss` is the mean over domains."""
    scores: dict[str, Any]
    """For the receipt."""


class Objective(Protocol):
    """What a run learns, and from what. `batch` is a pure function, so a run needs no more than its step to go on."""

    tokenizer: Tokenizer
    fingerprint: str
    """Of all that batches depend on."""
    inputs: dict[str, Any]
    """What is read, for the receipt."""
    token_counts: np.ndarray
    """int64 (vocab,): how often each id occurs."""

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0; the loss is a mean over its labels that are not -100."""
        ...

    def forward(self, model: Model, part: Batch, **options: Any) -> ModelOutput:
        """Returns the model's output for rows of a batch, with the sum of their losses as `token_loss`."""
        ...

    def validate(self, model: Model) -> Validation | None:
        """Returns the scores on unseen text, or None where there is none; leaves the model in the mode it was in."""
        ...

"""Which tokens a step sees: a pure function of (seed, step), so resuming needs a step number and nothing else."""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from moekit.data.shards import TokenDataset
from moekit.errors import DataError

IGNORE = -100  # label of a position that has nothing to predict; ops.loss.IGNORED, whose import would bring torch


class Batch(NamedTuple):
    """Sequences of a step, all int64. Padding has label -100 and document -1."""

    input_ids: np.ndarray  # (batch, length)
    labels: np.ndarray  # (batch, length), the next token
    document_ids: np.ndarray  # (batch, length), of the inputs


class Sampler:
    """Windows of sequence_length + 1 tokens at stride sequence_length, in a new random order every epoch.

    Windows run over document ends; the last tokens that fill no window are never seen. A batch may span two epochs.
    """

    def __init__(self, dataset: TokenDataset, sequence_length: int, batch_size: int, seed: int):
        self.dataset, self.sequence_length, self.batch_size, self.seed = dataset, sequence_length, batch_size, seed
        self.num_windows = (dataset.num_tokens - 1) // sequence_length
        if self.num_windows < 1:
            raise DataError(
                f"{dataset.directory}: split {dataset.split} has {dataset.num_tokens} tokens, fewer than one window "
                f"of sequence_length + 1 = {sequence_length + 1}; add text or shorten data.sequence_length"
            )
        self._shuffle = lru_cache(maxsize=2)(self._shuffled)

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0."""
        return self.windows(self.order(step))

    def order(self, step: int) -> list[int]:
        """Returns the numbers of the windows that a step's batch consists of."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [int(self._shuffle(place // self.num_windows)[place % self.num_windows]) for place in places]

    def windows(self, windows: list[int]) -> Batch:
        """Returns the windows of the stream with these numbers, 0 to num_windows - 1, as one batch."""
        length = self.sequence_length
        starts = [window * length for window in windows]
        tokens = np.stack([self.dataset.read(start, length + 1) for start in starts])
        return Batch(
            input_ids=tokens[:, :-1],
            labels=tokens[:, 1:],
            document_ids=np.stack([self.dataset.document_ids(start, length) for start in starts]),
        )

    def _shuffled(self, epoch: int) -> np.ndarray:
        """Returns an epoch's permutation: raw Philox draws are fixed for ever, numpy's own shuffles may change."""
        draws = np.random.Philox(key=[self.seed, epoch]).random_raw(self.num_windows)
        return np.argsort(draws, kind="stable")


def validation_windows(
    dataset: TokenDataset, domain: str, sequence_length: int, max_tokens: int, batch_size: int
) -> Iterator[Batch]:
    """Yields batches that predict the first `max_tokens` tokens of a domain once each, except the very first token.

    Windows follow each other without overlap; the last is padded with end-of-text and the last batch may be smaller.
    Yields nothing where the split has no text of the domain; DataError when the dataset does not know it.
    """
    start, stop = dataset.domain_range(domain)
    predicted = min(max_tokens, stop - start - 1)
    for first in range(0, predicted, batch_size * sequence_length):
        count = min(predicted - first, batch_size * sequence_length)
        rows = -(-count // sequence_length)
        input_ids = np.full(rows * sequence_length, dataset.eos_id)
        labels, document_ids = np.full_like(input_ids, IGNORE), np.full_like(input_ids, -1)
        tokens = dataset.read(start + first, count + 1)
        input_ids[:count], labels[:count] = tokens[:-1], tokens[1:]
        document_ids[:count] = dataset.document_ids(start + first, count)
        yield Batch(*(flat.reshape(rows, sequence_length) for flat in (input_ids, labels, document_ids)))

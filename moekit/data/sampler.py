"""Which tokens a step sees: a pure function of (seed, step), so resuming needs a step number and nothing else."""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np

from moekit.data.shards import TokenDataset
from moekit.errors import DataError

IGNORE = -100  # label of a position that has nothing to predict; ops.loss.IGNORED, whose import would bring torch


Packing = Literal["stream", "documents"]


class Batch(NamedTuple):
    """Sequences of a step, all int64. Prompts have label -100, padding too, and that has document -1."""

    input_ids: np.ndarray  # (batch, length)
    labels: np.ndarray  # (batch, length), the next token
    document_ids: np.ndarray  # (batch, length), of the inputs


class Sampler:
    """Windows of sequence_length + 1 tokens, in a new random order every epoch. A batch may span two epochs.

    With packing "stream" they are taken at stride sequence_length and run over document ends; the last tokens that fill
    no window are never seen. With "documents" each holds as many whole documents as it has room for, and is padded.
    """

    def __init__(
        self, dataset: TokenDataset, sequence_length: int, batch_size: int, seed: int, packing: Packing = "stream"
    ):
        self.dataset, self.sequence_length, self.batch_size, self.seed = dataset, sequence_length, batch_size, seed
        self._cuts: np.ndarray | None = None  # where windows of whole documents begin, and the end
        if packing == "documents":
            self._cuts = dataset.whole_documents(0, dataset.num_tokens, sequence_length + 1)
            self.num_windows = len(self._cuts) - 1
            return
        self.num_windows = (dataset.num_tokens - 1) // sequence_length
        if self.num_windows < 1:
            raise DataError(
                f"{dataset.directory}: split {dataset.split} has {dataset.num_tokens} tokens, fewer than one window "
                f"of sequence_length + 1 = {sequence_length + 1}; add text or shorten data.sequence_length"
            )

    def batch(self, step: int) -> Batch:
        """Returns the batch of a step, counted from 0."""
        return self.windows(self.order(step))

    def order(self, step: int) -> list[int]:
        """Returns the numbers of the windows that a step's batch consists of."""
        return places(step, self.batch_size, self.num_windows, self.seed)

    def windows(self, windows: list[int]) -> Batch:
        """Returns the windows with these numbers, 0 to num_windows - 1, as one batch."""
        length = self.sequence_length
        if self._cuts is None:
            spans = [(window * length, window * length + length + 1) for window in windows]
        else:
            spans = [(int(self._cuts[window]), int(self._cuts[window + 1])) for window in windows]
        return _batch(self.dataset, spans, length)


def places(step: int, batch_size: int, count: int, seed: int) -> list[int]:
    """Returns which of `count` things a step's batch consists of: all once an epoch, each in an order of its own."""
    numbers = range(step * batch_size, (step + 1) * batch_size)
    return [int(_shuffled(seed, number // count, count)[number % count]) for number in numbers]


@lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, count: int) -> np.ndarray:
    """Returns an epoch's permutation: raw Philox draws are fixed for ever, numpy's own shuffles may change."""
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(count), kind="stable")


def _batch(dataset: TokenDataset, spans: Sequence[tuple[int, int]], length: int) -> Batch:
    """Returns the tokens of each span (start, stop) but the last as inputs, all but the first as labels, padded."""
    input_ids = np.full((len(spans), length), dataset.eos_id, dtype=np.int64)
    labels, document_ids = np.full_like(input_ids, IGNORE), np.full_like(input_ids, -1)
    for row, (start, stop) in enumerate(spans):
        count, tokens = stop - start - 1, dataset.read(start, stop - start)
        input_ids[row, :count] = tokens[:-1]
        labels[row, :count] = np.where(dataset.is_prompt(start + 1, count), IGNORE, tokens[1:])
        document_ids[row, :count] = dataset.document_ids(start, count)
    return Batch(input_ids, labels, document_ids)


def validation_windows(
    dataset: TokenDataset,
    domain: str,
    sequence_length: int,
    max_tokens: int,
    batch_size: int,
    packing: Packing = "stream",
) -> Iterator[Batch]:
    """Yields batches that predict the first `max_tokens` tokens of a domain once each, except the very first token.

    Windows follow each other without overlap; the last is padded with end-of-text and the last batch may be smaller.
    Windows of whole documents do not predict their first tokens, and are given until they hold `max_tokens` or more.
    Yields nothing where the split has no text of the domain; DataError when the dataset does not know it.
    """
    start, stop = dataset.domain_range(domain)
    if packing == "documents":
        cuts = dataset.whole_documents(start, stop, sequence_length + 1)
        windows = min(int(np.searchsorted(cuts - start, max_tokens)), len(cuts) - 1)
        spans = list(zip(cuts[:windows].tolist(), cuts[1 : windows + 1].tolist(), strict=True))
    else:
        last = start + min(max_tokens, stop - start - 1)
        spans = [(first, min(first + sequence_length, last) + 1) for first in range(start, last, sequence_length)]
    for first in range(0, len(spans), batch_size):
        yield _batch(dataset, spans[first : first + batch_size], sequence_length)

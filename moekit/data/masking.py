"""Masked language modelling (BERT, arXiv 1810.04805, section 3.1): which tokens are hidden, and behind what.

Every draw is a function of a row's key alone, so that a run goes on exactly where it stopped and a row is masked alike
in whatever batch it stands.
"""

from collections.abc import Sequence

import numpy as np

from moekit.config import MaskedObjective
from moekit.data.sampler import IGNORE, Batch

TRAINING, VALIDATION = 1, 2
"""Streams of draws, told apart by the generator's counter; the sampler's shuffles have 0."""


def masked(
    batch: Batch,
    keys: Sequence[tuple[int, int]],
    stream: int,
    objective: MaskedObjective,
    mask_id: int,
    vocabulary: int,
    kept: Sequence[int] = (),
) -> Batch:
    """Returns a next-token batch as one of masked tokens: labels are what was hidden, -100 elsewhere.

    `keys` has two numbers a row. Random tokens are of the first `vocabulary` ids. Never predicted are the ids of
    `kept`, what belongs to a prompt, padding, and the first token of a row, of which the labels do not say whether it
    belongs to a prompt.
    """
    ids, (rows, length) = batch.input_ids, batch.input_ids.shape
    draws = np.stack([_draws(key, stream, 3 * length).reshape(3, length) for key in keys], axis=1)
    chance, fate = (draws[:2] >> np.uint64(11)) * 2.0**-53
    learned = np.zeros((rows, length), dtype=bool)
    learned[:, 1:] = (batch.labels[:, :-1] != IGNORE) & (batch.document_ids[:, 1:] >= 0)
    chosen = learned & (chance < objective.mask_probability) & ~np.isin(ids, kept)
    hidden = chosen & (fate < objective.mask_share)
    swapped = chosen & ~hidden & (fate < objective.mask_share + objective.random_share)
    anything = (draws[2] % np.uint64(vocabulary)).astype(np.int64)
    shown = np.where(hidden, mask_id, np.where(swapped, anything, ids))
    return Batch(shown, np.where(chosen, ids, IGNORE), batch.document_ids)


def _draws(key: tuple[int, int], stream: int, count: int) -> np.ndarray:
    """Returns raw Philox draws, which are fixed for ever."""
    return np.asarray(np.random.Philox(key=list(key), counter=[0, 0, 0, stream]).random_raw(count))

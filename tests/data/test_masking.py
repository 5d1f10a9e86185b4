"""Masked batches: what is hidden, how often, and that it is a function of the row's key alone."""

import numpy as np

from moekit.config import MaskedObjective
from moekit.data.masking import TRAINING, VALIDATION, masked
from moekit.data.sampler import IGNORE, Batch

EOS, MASK, WORDS = 0, 50, 50


def plain(rows: int, length: int, prompt: int = 0, padding: int = 0) -> Batch:
    """Rows of random words with an end of text here and there, `prompt` tokens that are read only, and padding."""
    tokens = np.random.default_rng(0).integers(0, WORDS, (rows, length + 1))
    labels, documents = tokens[:, 1:].copy(), np.zeros((rows, length), dtype=np.int64)
    labels[:, : max(0, prompt - 1)] = IGNORE
    if padding:
        labels[:, -padding:], documents[:, -padding:] = IGNORE, -1
    return Batch(tokens[:, :-1].copy(), labels, documents)


def hidden(batch: Batch, seed: int = 3, stream: int = TRAINING, **settings: float) -> Batch:
    keys = [(seed, row) for row in range(len(batch.input_ids))]
    return masked(batch, keys, stream, MaskedObjective(**settings), MASK, WORDS, (EOS,))


def test_shares_are_berts() -> None:
    batch = plain(400, 101)
    found = hidden(batch)
    chosen = found.labels != IGNORE
    open_to_choice = batch.input_ids[:, 1:] != EOS
    share = chosen[:, 1:].sum() / open_to_choice.sum()
    assert abs(share - 0.15) < 0.006  # 5 standard deviations
    shown, was = found.input_ids[chosen], batch.input_ids[chosen]
    assert abs((shown == MASK).mean() - 0.8) < 0.026
    kept, swapped = (shown == was).mean(), ((shown != was) & (shown != MASK)).mean()
    assert abs(kept - 0.1 - 0.1 / WORDS) < 0.02
    assert abs(swapped - 0.1 * (1 - 1 / WORDS)) < 0.02
    assert len(set(shown[(shown != was) & (shown != MASK)])) == WORDS


def test_labels_are_what_was_hidden_and_the_rest_is_untouched() -> None:
    batch = plain(8, 40)
    found = hidden(batch)
    chosen = found.labels != IGNORE
    assert chosen.any()
    assert (found.labels[chosen] == batch.input_ids[chosen]).all()
    assert (found.input_ids[~chosen] == batch.input_ids[~chosen]).all()


def test_prompts_padding_ends_and_first_tokens_are_never_hidden() -> None:
    batch = plain(6, 40, prompt=9, padding=7)
    chosen = hidden(batch, mask_probability=1.0).labels != IGNORE
    wanted = np.zeros((6, 40), dtype=bool)
    wanted[:, 9:33] = True
    assert (chosen == (wanted & (batch.input_ids != EOS))).all()
    assert not (hidden(plain(6, 40), mask_probability=1.0).labels[:, 0] != IGNORE).any()


def test_a_row_is_masked_alike_in_any_batch_and_otherwise_under_another_key() -> None:
    batch = plain(4, 60)
    once, again = hidden(batch), hidden(batch)
    assert all((a == b).all() for a, b in zip(once, again, strict=True))
    third = masked(Batch(*(part[2:3] for part in batch)), [(3, 2)], TRAINING, MaskedObjective(), MASK, WORDS, (EOS,))
    assert (third.input_ids[0] == once.input_ids[2]).all()
    for other in (hidden(batch, seed=4), hidden(batch, stream=VALIDATION)):
        assert ((other.labels != IGNORE) != (once.labels != IGNORE)).any()


def test_the_draws_are_fixed_for_ever() -> None:
    same = np.full((1, 30), 7)
    found = masked(Batch(same, same, same * 0), [(3, 2)], TRAINING, MaskedObjective(mask_probability=0.4), MASK, WORDS)
    places = np.flatnonzero(found.labels[0] != IGNORE)
    assert places.tolist() == [1, 8, 13, 14, 15, 16, 21, 25]
    assert found.input_ids[0, places].tolist() == [50, 50, 50, 50, 50, 50, 27, 50]

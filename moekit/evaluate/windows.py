"""The log-likelihood of tokens: texts of any length in windows, windows in batches whose size changes no score."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from moekit.errors import ConfigError
from moekit.nn.model import Model
from moekit.ops.loss import CHUNK_BYTES


class Window(NamedTuple):
    """Tokens that the model sees at once, of which the last `predicted` are predicted from those before them."""

    tokens: Sequence[int]
    """At least `predicted` + 1, at most one more than the model has positions: the last is predicted and not seen."""
    predicted: int


class WindowScore(NamedTuple):
    """What the model says of the predicted tokens of a window."""

    log_likelihood: float
    """The sum of their log-probabilities, nats."""
    greedy: bool
    """Each of them was the likeliest token."""


def rolling(tokens: Sequence[int], prefix: int, length: int, stride: int) -> Iterator[Window]:
    """Yields windows that together predict every token once, the first from `prefix` alone.

    A window sees at most `length` tokens. The first predicts `length`, each later one the `stride` after those, from as
    many before them as fit. stride = length is lm-evaluation-harness's convention: windows of new tokens, and a last
    one that is full too. A smaller stride gives tokens more to see, at least length - stride + 1, for more compute.
    """
    assert 1 <= stride <= length
    if not len(tokens):
        return
    done = min(length, len(tokens))
    yield Window([prefix, *tokens[:done]], done)
    while done < len(tokens):
        end = min(done + stride, len(tokens))
        yield Window(tokens[end - length - 1 : end], end - done)
        done = end


@torch.no_grad()
def score_windows(model: Model, windows: Sequence[Window], batch_size: int) -> list[WindowScore]:
    """Returns the score of each window, in their order. Those of like length share a batch, padded on the right.

    The model computes in its own precision; log-probabilities are float32 and their sums float64. Padding is masked, so
    that batches differ from single windows by rounding only.
    """
    model.config.check_decoder("the likelihood of a text")
    largest, vocabulary = max((max(window.tokens) for window in windows), default=0), model.config.vocab_size
    if largest >= vocabulary:
        raise ConfigError(f"the text holds token {largest} but the vocabulary has {vocabulary}; whose tokenizer?")
    was_training, device = model.training, model.embed_tokens.weight.device
    model.eval()
    found: list[WindowScore] = [WindowScore(0.0, True)] * len(windows)
    alike: dict[tuple[int, ...], list[int]] = {}  # windows that see the same, as the answers of one letter do
    for number, window in enumerate(windows):
        alike.setdefault(tuple(window.tokens[:-1]), []).append(number)
    order = sorted(alike.items(), key=lambda group: len(group[0]), reverse=True)
    for first in range(0, len(order), batch_size):
        batch = order[first : first + batch_size]
        longest = len(batch[0][0])
        ids = torch.tensor([[*seen, *[0] * (longest - len(seen))] for seen, _ in batch], device=device)
        lengths = torch.tensor([[len(seen)] for seen, _ in batch], device=device)
        real = torch.arange(longest, device=device) < lengths
        hidden = model(ids, padding_mask=real, return_logits=False).hidden
        numbers = [number for _, group in batch for number in group]
        rows, columns, targets, owners = list[int](), list[int](), list[int](), list[int]()
        for owner, (row, number) in enumerate((row, n) for row, (_, group) in enumerate(batch) for n in group):
            tokens, predicted = windows[number]
            rows += [row] * predicted
            columns += range(len(tokens) - 1 - predicted, len(tokens) - 1)
            targets += tokens[-predicted:]
            owners += [owner] * predicted
        sums = torch.zeros(len(numbers), dtype=torch.float64, device=device)
        misses = torch.zeros(len(numbers), dtype=torch.int64, device=device)
        size = max(1, CHUNK_BYTES // (4 * model.config.vocab_size))
        places = torch.tensor([rows, columns, targets, owners], device=device)
        for row, column, target, owner in (chunk.unbind() for chunk in places.split(size, dim=1)):
            logits = model.lm_head(hidden[row, column]).float()
            log_probabilities = logits.gather(1, target.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
            sums.index_add_(0, owner, log_probabilities.double())
            misses.index_add_(0, owner, (logits.argmax(1) != target).long())
        for number, total, missed in zip(numbers, sums.tolist(), misses.tolist(), strict=True):
            found[number] = WindowScore(total, not missed)
    model.train(was_training)
    return found

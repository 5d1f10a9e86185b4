"""The log-likelihood of tokens: texts of any length in windows, windows in batches whose size changes no score."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from moekit.errors import ConfigError
from moekit.nn.model import Model
from moekit.ops.loss import CHUNK_ELEMENTS


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
    if not 1 <= stride <= length:
        raise ConfigError(f"stride is {stride} but must be 1 to {length}, the tokens that a window sees")
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
    was_training, device = model.training, model.embed_tokens.weight.device
    model.eval()
    found: list[WindowScore] = [WindowScore(0.0, True)] * len(windows)
    order = sorted(range(len(windows)), key=lambda number: len(windows[number].tokens), reverse=True)
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        longest = len(windows[numbers[0]].tokens) - 1
        ids = torch.zeros(len(numbers), longest + 1, dtype=torch.int64)
        lengths, starts = torch.empty(2, len(numbers), 1, dtype=torch.int64)
        for row, window in enumerate(windows[number] for number in numbers):
            ids[row, : len(window.tokens)] = torch.as_tensor(window.tokens)
            lengths[row] = len(window.tokens) - 1
            starts[row] = lengths[row] - window.predicted
        if (largest := int(ids.max())) >= (vocabulary := model.config.vocab_size):
            raise ConfigError(f"the text holds token {largest} but the vocabulary has {vocabulary}; whose tokenizer?")
        places = torch.arange(longest)
        real, wanted = (mask.to(device) for mask in (places < lengths, (places >= starts) & (places < lengths)))
        ids = ids.to(device)
        hidden = model(ids[:, :-1], padding_mask=real, return_logits=False).hidden[wanted]
        targets, rows = ids[:, 1:][wanted], wanted.nonzero()[:, 0]
        sums = torch.zeros(len(numbers), dtype=torch.float64, device=device)
        misses = torch.zeros(len(numbers), dtype=torch.int64, device=device)
        size = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
        for chunk, target, row in zip(hidden.split(size), targets.split(size), rows.split(size), strict=True):
            logits = model.lm_head(chunk).float()
            log_probabilities = logits.gather(1, target.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
            sums.index_add_(0, row, log_probabilities.double())
            misses.index_add_(0, row, (logits.argmax(1) != target).long())
        for number, total, missed in zip(numbers, sums.tolist(), misses.tolist(), strict=True):
            found[number] = WindowScore(total, not missed)
    model.train(was_training)
    return found

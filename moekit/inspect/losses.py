"""The loss of models that are altered by probes, on one text, window by window, so that differences are paired."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from moekit.data import Batch
from moekit.errors import ConfigError, DataError
from moekit.nn.model import Model
from moekit.nn.router import Probe
from moekit.ops.loss import IGNORED

Batches = Iterable[tuple[str, Batch]]
"""A text as (domain, windows); padding has label -100 and document -1. Read once, from the first to the last."""

MEAN = "mean over domains"
"""The row of all domains together, each counting the same, as in validation."""


class Score(NamedTuple):
    """A domain's loss under a probe, beside that of the unaltered model on the same windows."""

    loss: float
    """Nats per token."""
    ratio: float
    difference: float
    """Nats per token more than unaltered."""
    standard_error: float | None
    """Of the difference: windows are paired and taken as independent. None of a single window."""
    tokens: int
    windows: int


Scores = dict[tuple[str, Probe], dict[str, Score]]
"""Name of a model and probe -> domain, and the mean -> score."""


def measure(
    models: Mapping[str, Model],
    batches: Batches,
    probes: Mapping[str, Sequence[Probe]],
    *,
    cross_document_attention: bool = True,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Scores:
    """Returns the scores of each model under its probes, the first of which is to be the one that alters nothing.

    Models are left in the mode they were in. `progress` is told how many tokens all of them have predicted. Raises
    DataError for a text without a token to predict, ConfigError for one of another tokenizer.
    """
    cases = [(name, probe) for name in models for probe in probes[name]]
    nats: dict[str, list[Float[np.ndarray, "windows cases"]]] = {}
    tokens: dict[str, list[Int[np.ndarray, " windows"]]] = {}
    done = 0
    with ExitStack() as after:
        for model in models.values():
            after.callback(model.train, model.training)
            model.eval()
        for domain, batch in batches:
            for name, model in models.items():
                if (largest := int(batch.input_ids.max())) >= (vocab := model.config.vocab_size):
                    problem = f"the text has token {largest} but {name} has a vocabulary of {vocab}"
                    raise ConfigError(f"{problem}; the text must be tokens of the model's own tokenizer")
            found = [
                window_losses(model, batch, probes[name], cross_document_attention) for name, model in models.items()
            ]
            nats.setdefault(domain, []).append(np.concatenate(found, 1))
            tokens.setdefault(domain, []).append((batch.labels != IGNORED).sum(1))
            done += int(tokens[domain][-1].sum())
            progress(done)
    whole = {domain: (np.concatenate(nats[domain]), np.concatenate(tokens[domain])) for domain in nats}
    whole = {domain: (sums, counts) for domain, (sums, counts) in whole.items() if counts.any()}
    if not whole:
        raise DataError("the text has no token to predict; give at least two tokens")
    scores: Scores = {}
    for at, (name, probe) in enumerate(cases):
        plain = cases.index((name, probes[name][0]))
        domains = {domain: score(sums[:, at], sums[:, plain], counts) for domain, (sums, counts) in whole.items()}
        scores[name, probe] = {**domains, MEAN: mean(list(domains.values()))}
    return scores


@torch.no_grad()
def window_losses(
    model: Model, batch: Batch, probes: Sequence[Probe], cross_document_attention: bool = True
) -> Float[np.ndarray, "windows probes"]:
    """Returns the summed loss of each window under each probe, in nats."""
    ids, targets, documents = (torch.from_numpy(part).to(model.embed_tokens.weight.device) for part in batch)
    model.config.check_decoder("the loss of a text")
    within = None if cross_document_attention else documents
    sums = []
    for probe in probes:
        hidden = model(ids, padding_mask=documents >= 0, document_ids=within, return_logits=False, probe=probe).hidden
        totals = [model.token_loss(*row).total for row in zip(hidden, targets, strict=True)]
        sums.append(torch.stack(totals).double().cpu().numpy())
    return np.stack(sums, 1)


def score(
    nats: Float[np.ndarray, " windows"], plain: Float[np.ndarray, " windows"], tokens: Int[np.ndarray, " windows"]
) -> Score:
    """Returns a domain's score; the standard error is that of a ratio of sums, windows being as long as they are."""
    total, windows = int(tokens.sum()), int((tokens > 0).sum())
    loss, before = nats.sum() / total, plain.sum() / total
    spread = (nats - plain) - (loss - before) * tokens
    error = math.sqrt(windows / (windows - 1) * float(spread @ spread)) / total if windows > 1 else None
    return Score(float(loss), float(loss / before), float(loss - before), error, total, windows)


def mean(domains: Sequence[Score]) -> Score:
    """Returns the mean over the domains, each counting the same; its ratio is that of the means."""
    number = len(domains)
    loss, difference = (sum(values) / number for values in zip(*((s.loss, s.difference) for s in domains), strict=True))
    errors = [one.standard_error for one in domains]
    error = None if None in errors else math.hypot(*(e for e in errors if e is not None)) / number
    tokens, windows = sum(one.tokens for one in domains), sum(one.windows for one in domains)
    return Score(loss, loss / (loss - difference), difference, error, tokens, windows)

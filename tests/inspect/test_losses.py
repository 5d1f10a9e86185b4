"""Losses under probes: those of the logits, window by window, whatever the batch; differences with honest errors."""

import math
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moekit.config import ModelConfig
from moekit.data import Batch
from moekit.errors import ConfigError, DataError
from moekit.inspect.losses import MEAN, Score, mean, measure, score, window_losses
from moekit.nn.model import Model
from moekit.nn.router import Probe

Make = Callable[..., ModelConfig]
PROBES = [Probe(), Probe(skip_top=2), Probe(shared=False)]


def text(windows: int = 5, length: int = 12, seed: int = 0) -> Batch:
    """Random tokens of two documents a window; the last window is padded after 3 tokens."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 61, (windows, length + 1))
    documents = np.broadcast_to(np.arange(length) // 7, (windows, length)).copy()
    labels = tokens[:, 1:].copy()
    labels[-1, 3:], documents[-1, 3:] = -100, -1
    return Batch(tokens[:, :-1], labels, documents)


def cut(batch: Batch, size: int) -> Iterator[Batch]:
    return (Batch(*(part[at : at + size] for part in batch)) for at in range(0, len(batch.labels), size))


@pytest.fixture
def model(tiny_config: Make) -> Model:
    return Model(tiny_config()).double()


@pytest.mark.parametrize("across", [True, False])
def test_sums_are_those_of_the_logits_of_each_window_alone(model: Model, across: bool) -> None:
    batch = text()
    found = window_losses(model.eval(), batch, PROBES, across)
    for row in range(5):
        real = batch.document_ids[row] >= 0
        ids, targets, documents = (torch.from_numpy(part[row : row + 1, real]) for part in batch)
        for column, probe in enumerate(PROBES):
            logits = model(ids, document_ids=None if across else documents, probe=probe).logits
            expected = F.cross_entropy(logits[0], targets[0], reduction="sum")
            assert found[row, column] == pytest.approx(expected.item(), rel=1e-10)


def test_keeping_documents_apart_is_another_loss(model: Model) -> None:
    across, apart = (window_losses(model.eval(), text(), PROBES[:1], across) for across in (True, False))
    assert np.abs(across[:-1] - apart[:-1]).min() > 1e-3
    assert across[-1] == pytest.approx(apart[-1])  # its real tokens are of one document


@pytest.mark.parametrize("size", [1, 2, 3])
def test_scores_do_not_depend_on_the_size_of_batches(model: Model, size: int) -> None:
    whole, parts = (
        measure({"m": model}, [("a", part) for part in cut(text(), size)], {"m": PROBES}) for size in (5, size)
    )
    for probe in PROBES:
        for one, other in zip(whole["m", probe]["a"], parts["m", probe]["a"], strict=True):
            assert one == pytest.approx(other, rel=1e-9, abs=1e-12)


def test_unaltered_is_one_and_domains_count_the_same_however_long(model: Model) -> None:
    batches = [("a", text(5)), ("b", text(2, seed=1)), ("a", text(4, seed=2))]
    scores = measure({"m": model}, iter(batches), {"m": PROBES})
    plain, probed = scores["m", Probe()], scores["m", PROBES[1]]
    assert plain["a"][1:4] == (1, 0, 0)
    assert plain["a"].windows == 9
    assert plain["a"].tokens == 4 * 12 + 3 + 3 * 12 + 3
    for name in ("loss", "difference"):
        expected = (getattr(probed["a"], name) + getattr(probed["b"], name)) / 2
        assert getattr(probed[MEAN], name) == pytest.approx(expected)
    assert probed[MEAN].ratio == pytest.approx(probed[MEAN].loss / plain[MEAN].loss)
    assert probed[MEAN].difference == pytest.approx(probed[MEAN].loss - plain[MEAN].loss)


def test_models_side_by_side_score_as_each_alone_and_keep_their_mode(model: Model, tiny_config: Make) -> None:
    other, batch = Model(tiny_config(ffn={"n_routed_experts": 5, "num_experts_per_tok": 2})).double().eval(), text()
    model.train()
    both = measure({"m": model, "o": other}, [("a", batch)], {"m": PROBES, "o": PROBES[:2]})
    assert (model.training, other.training) == (True, False)
    alone = measure({"m": model}, [("a", batch)], {"m": PROBES}) | measure(
        {"o": other}, [("a", batch)], {"o": PROBES[:2]}
    )
    assert both == alone


def test_error_of_equal_windows_is_the_deviation_of_paired_differences_over_the_root_of_their_number() -> None:
    draw = np.random.default_rng(0)
    plain = draw.normal(50, 20, 40)  # windows differ far more than the probe changes any of them
    nats, tokens = plain + draw.normal(3, 1, 40), np.full(40, 10)
    found = score(nats, plain, tokens)
    assert found.difference == pytest.approx((nats - plain).mean() / 10)
    assert found.standard_error == pytest.approx((nats - plain).std(ddof=1) / 10 / math.sqrt(40))


def test_error_of_unequal_windows_is_close_to_that_of_leaving_one_out() -> None:
    draw = np.random.default_rng(1)
    tokens = draw.integers(5, 60, 200)
    plain = tokens * draw.normal(5, 1, 200)
    nats = plain + tokens * draw.normal(0.3, 0.2, 200)
    off = nats - plain
    left = (off.sum() - off) / (tokens.sum() - tokens)
    jackknife = math.sqrt(199 / 200 * ((left - left.mean()) ** 2).sum())
    assert score(nats, plain, tokens).standard_error == pytest.approx(jackknife, rel=0.02)


def test_a_single_window_has_no_error_and_neither_has_a_mean_with_it() -> None:
    one = score(np.array([5.0]), np.array([4.0]), np.array([2]))
    assert one == Score(2.5, 1.25, 0.5, None, 2, 1)
    assert mean([one, Score(1.0, 1.0, 0.0, 0.1, 9, 3)]).standard_error is None


def test_errors_of_domains_add_in_squares() -> None:
    domains = [Score(2.0, 1.0, 0.0, 0.3, 5, 2), Score(4.0, 2.0, 2.0, 0.4, 5, 2)]
    assert mean(domains) == Score(3.0, 3 / 2, 1.0, pytest.approx(0.25), 10, 4)


def test_progress_counts_predicted_tokens(model: Model) -> None:
    seen: list[int] = []
    batches = [("a", part) for part in cut(text(), 2)]
    measure({"m": model}, batches, {"m": PROBES[:1]}, progress=seen.append)
    assert seen == [24, 48, 51]


def test_a_text_that_says_nothing_or_is_of_another_tokenizer_is_an_error(model: Model) -> None:
    with pytest.raises(DataError, match="no token to predict"):
        measure({"m": model}, [], {"m": PROBES})
    batch = text()
    batch.input_ids[0, 0] = 61
    with pytest.raises(ConfigError, match="the text has token 61 but m has a vocabulary of 61; the text must be"):
        measure({"m": model}, [("a", batch)], {"m": PROBES})

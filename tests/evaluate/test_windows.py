"""Windows predict each token once, and a batch gives what single windows give."""

import pytest
import torch

from moekit.errors import ConfigError
from moekit.evaluate.windows import Window, rolling, score_windows
from moekit.nn.model import Model


@pytest.mark.parametrize("count", [0, 1, 2, 7, 8, 9, 16, 17, 30])
@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3), (8, 1), (1, 1)])
def test_every_token_is_predicted_once_from_those_right_before_it(count: int, length: int, stride: int) -> None:
    tokens, predicted = list(range(count)), []
    for window in rolling(tokens, 99, length, stride):
        assert window.tokens == [99, *tokens][window.tokens[-1] + 2 - len(window.tokens) : window.tokens[-1] + 2]
        assert window.predicted < len(window.tokens) <= length + 1
        predicted += window.tokens[-window.predicted :]
    assert predicted == tokens


@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
@pytest.mark.parametrize(("length", "stride"), [(8, 8), (8, 3)])
def test_windows_are_those_of_the_harness(count: int, length: int, stride: int) -> None:
    utils = pytest.importorskip("lm_eval.utils")
    tokens = list(range(count))
    theirs = utils.get_rolling_token_windows(tokens, 99, length, length - stride + 1)
    expected = [Window(context + continuation, len(continuation)) for context, continuation in
                map(utils.make_disjoint_window, theirs)]  # fmt: skip
    assert list(rolling(tokens, 99, length, stride)) == expected


def test_a_score_is_the_sum_of_log_softmax_of_that_window_alone(model: Model) -> None:
    windows = [Window(torch.randint(290, (n,)).tolist(), p) for n, p in [(2, 1), (20, 19), (49, 3), (9, 4)]]
    for batch_size in (1, 3, 8):
        for window, score in zip(windows, score_windows(model, windows, batch_size), strict=True):
            ids = torch.tensor([window.tokens])
            log_probabilities = model(ids[:, :-1]).logits[0].detach().double().log_softmax(-1)
            expected = log_probabilities.gather(1, ids[0, 1:, None])[-window.predicted :].sum()
            assert score.log_likelihood == pytest.approx(float(expected), abs=1e-4)
            assert not score.greedy


def test_greedy_is_said_of_the_likeliest_tokens_alone(model: Model) -> None:
    tokens = [5]
    for _ in range(6):
        tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    wrong = [*tokens[:-1], (tokens[-1] + 1) % 290]
    found = score_windows(model, [Window(tokens, 6), Window(wrong, 6), Window(wrong[:-1], 5)], 3)
    assert [score.greedy for score in found] == [True, False, True]


def test_the_model_is_left_in_its_mode(model: Model) -> None:
    model.train()
    score_windows(model, [Window([1, 2], 1)], 1)
    assert model.training
    model.eval()


def test_a_token_outside_of_the_vocabulary_is_an_error(model: Model) -> None:
    with pytest.raises(ConfigError, match="token 300 but the vocabulary has"):
        score_windows(model, [Window([1, 300], 1)], 1)

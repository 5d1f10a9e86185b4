"""The head that scores whole sequences: its formula, padding, counts, and how it is kept."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from moekit.config import ModelConfig, parameters
from moekit.errors import ConfigError, UnsupportedError
from moekit.formats.checkpoint import load, save
from moekit.formats.convert import convert
from moekit.formats.verify import verify
from moekit.generate import generate
from moekit.nn.model import Model

Configs = Callable[..., ModelConfig]
DENSE = {"kind": "dense", "hidden_act": "gelu"}


@pytest.fixture
def model(tiny_config: Configs) -> Model:
    return Model(tiny_config(ffn=DENSE, causal=False, num_labels=3, tie_word_embeddings=True)).eval()


def test_scores_are_of_the_mean_over_real_tokens(model: Model) -> None:
    ids = torch.randint(0, 61, (3, 7))
    real = torch.arange(7) < torch.tensor([[7], [4], [1]])
    found = model(ids, padding_mask=real)
    assert found.logits is None
    assert found.scores is not None
    for row, length in enumerate((7, 4, 1)):
        alone = model(ids[row : row + 1, :length])
        dense, out = model.score.dense, model.score.out
        inner = torch.tanh(alone.hidden[0].mean(0) @ dense.weight.T + dense.bias)
        torch.testing.assert_close(found.scores[row], inner @ out.weight.T + out.bias)
        torch.testing.assert_close(found.scores[row], alone.scores[0])


def test_a_saved_model_gives_the_same_scores(model: Model, tmp_path: Path) -> None:
    ids = torch.randint(0, 61, (2, 5))
    save(model, tmp_path / "model")
    assert verify(tmp_path / "model")["held"]
    back = load(tmp_path / "model")
    assert torch.equal(back(ids).scores, model(ids).scores)
    assert not hasattr(back, "lm_head")


@pytest.mark.parametrize("tied", [True, False])
def test_counts_are_those_of_the_built_model(tiny_config: Configs, tied: bool) -> None:
    config = tiny_config(ffn=DENSE, causal=False, num_labels=3, tie_word_embeddings=tied)
    assert config.num_parameters == sum(p.numel() for p in Model(config).parameters())
    assert parameters(config)["head"].total == 18 * 18 + 18 + 18 * 3 + 3
    once = 6 * (18 * 18 + 18 * 3)  # read once a sequence
    words = tiny_config(ffn=DENSE, causal=False, tie_word_embeddings=tied)
    assert config.flops(7) - once == words.flops(7) - 6 * 7 * 61 * 18
    with pytest.raises(ConfigError, match="that paper has no num_labels"):
        config.flops(7, "paper")


def test_what_needs_words_is_refused_in_one_line(tiny_config: Configs, tmp_path: Path) -> None:
    model = Model(
        tiny_config(attention={"num_key_value_heads": 4}, ffn={"kind": "dense"}, num_labels=2, hidden_size=24)
    )
    ids = torch.randint(0, 61, (1, 5))
    with pytest.raises(
        UnsupportedError, match="generation needs a model that predicts the next token; this one has num"
    ):
        generate(model, ids, 2)
    with pytest.raises(ConfigError, match="targets are given but the model has num_labels"):
        model(ids, targets=ids)
    with pytest.raises(UnsupportedError, match="layout llama cannot say num_labels 2"):
        save(model, tmp_path / "llama", layout="llama")
    save(model, tmp_path / "model")
    with pytest.raises(UnsupportedError, match="predicts no words"):
        convert(tmp_path / "model", tmp_path / "out", dtype="bfloat16")

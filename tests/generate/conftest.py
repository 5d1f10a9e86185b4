"""A small vocabulary that splits most characters into bytes, and models that speak it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekit.config import ModelConfig
from moekit.formats.tokenizer import Tokenizer, train_tokenizer
from moekit.nn.model import Model

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"ffn": {"kind": "dense"}},
    "moe": {"ffn": {"first_k_dense_replace": 1, "intermediate_size": 20}},
    "bias": {"ffn": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}},
    "hash": {"ffn": {"topk_method": "hash"}},
    "mla": {"attention": {"kind": "mla", "q_lora_rank": 5}},
    "mla tied": {"attention": {"kind": "mla"}, "tie_word_embeddings": True},
    "capacity": {"ffn": {"capacity_factor": 0.5}},
}
VOCABULARY = 300


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer(
        ["It was the best of times, it was the worst of times.\n" * 3, "床前明月光。疑是地上霜。"], VOCABULARY
    )


@pytest.fixture
def build(tiny_config: Callable[..., ModelConfig], device: torch.device) -> Callable[..., Model]:
    """Returns a factory of models in float64, in which a batch and its rows give the same numbers but for 1e-15."""

    def make(kind: str = "moe", **settings: Any) -> Model:
        torch.manual_seed(11)
        config = tiny_config(**{"vocab_size": VOCABULARY, **KINDS[kind], **settings})
        return Model(config).double().to(device)

    return make

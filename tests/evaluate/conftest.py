"""A small vocabulary, documents of every awkward length, and models that speak it."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekit.config import ModelConfig
from moekit.data.text import Document
from moekit.formats.tokenizer import Tokenizer, train_tokenizer
from moekit.nn.model import Model

os.environ["TOKENIZERS_PARALLELISM"] = "false"
ENGLISH = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of folly. "
CHINESE = "床前明月光，疑是地上霜。举头望明月，低头思故乡。"  # noqa: RUF001
DOCUMENTS = [
    Document(ENGLISH * 5, "long", "long:1"),  # far longer than the model's context
    Document("x", "short", "short:1"),
    Document(ENGLISH, "short", "short:2"),
    Document("naïve 🙂", "short", "short:3"),
    *(Document(CHINESE[:cut], "zh", f"zh:{cut}") for cut in range(3, 24, 4)),
    Document(ENGLISH[:40], "long", "long:2"),
]


@pytest.fixture(scope="session")
def documents() -> list[Document]:
    return DOCUMENTS


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([ENGLISH, "The 3 apples cost 12 dollars.\n"], 300)


@pytest.fixture(scope="session")
def model(tokenizer: Tokenizer, tiny_config: Callable[..., ModelConfig]) -> Model:
    """Untrained, with large weights: its probabilities are far from equal."""
    torch.manual_seed(1)
    sizes: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "max_position_embeddings": 48}
    return Model(tiny_config(**sizes)).eval()

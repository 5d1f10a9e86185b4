"""Small models on the package's text, and a model whose routing is known."""

import gzip
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moekit.config import ModelConfig
from moekit.data import prepare
from moekit.formats.checkpoint import save
from moekit.formats.tokenizer import load_tokenizer
from moekit.inspect.text import Window
from moekit.nn.model import Model

DOMAINS = ("math_en", "poetry_zh")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two domains of the package's text, twelve documents each, and a dataset of them in `data`."""
    folder = tmp_path_factory.mktemp("text")
    paths = []
    for domain in DOMAINS:
        packed = (files("moekit") / "quickstart" / "text" / f"{domain}.valid.jsonl.gz").read_bytes()
        paths.append(folder / f"{domain}.jsonl")
        paths[-1].write_bytes(b"".join(gzip.decompress(packed).splitlines(keepends=True)[:12]))
    prepare(paths, folder / "data", valid_fraction=0.4, vocab_size=300)
    return folder


@pytest.fixture(scope="session")
def model_of(
    text: Path, tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., ModelConfig]
) -> Callable[..., Path]:
    """Returns a factory of saved models with the text's tokenizer: settings as `tiny_config` takes them."""

    def make(name: str = "model", **settings: Any) -> Path:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("models") / name
        config = tiny_config(vocab_size=300, max_position_embeddings=128, **settings)
        save(Model(config), folder, load_tokenizer(text / "data"))
        return folder

    return make


@pytest.fixture
def sorted_by_domain(tiny_config: Callable[..., ModelConfig]) -> Model:
    """Four experts, one chosen: by the router, ids below 30 go to expert 0, the others to expert 1."""
    ffn = {"n_routed_experts": 4, "num_experts_per_tok": 1, "n_shared_experts": 0}
    model = Model(tiny_config(ffn=ffn, num_hidden_layers=1)).double().eval()
    with torch.no_grad():
        (block,) = model.layers
        block.self_attn.o_proj.weight.zero_()
        model.embed_tokens.weight.zero_()
        model.embed_tokens.weight[:30, 0] = 1
        model.embed_tokens.weight[30:, 1] = 1
        block.mlp.router.weight.zero_()
        block.mlp.router.weight[0, 0] = block.mlp.router.weight[1, 1] = 3
    return model


def random_windows(lengths: list[int], domains: list[str], vocab: int = 61, seed: int = 0) -> list[Window]:
    """Returns windows of random tokens, numbered in each domain; ids of the first domain are below 30."""
    draw, numbers, windows = np.random.default_rng(seed), dict.fromkeys(domains, 0), []
    for length, domain in zip(lengths, domains, strict=True):
        low, high = (0, 30) if domain == domains[0] else (30, vocab)
        windows.append(Window(domain, numbers[domain], draw.integers(low, high, length)))
        numbers[domain] += 1
    return windows

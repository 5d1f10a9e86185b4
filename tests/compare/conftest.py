"""A small dataset of the package's own text, and a comparison of two small architectures on it."""

import gzip
import os
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from moekit.config import ModelConfig
from moekit.config.files import write_yaml
from moekit.data import prepare

DOMAINS = ("math_en", "poetry_zh")


@pytest.fixture(autouse=True, scope="session")
def _quiet_tokenizers() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(scope="session")
def make_data() -> Callable[[Path, int], Path]:
    """Returns a function that prepares the first documents of two domains in a folder."""

    def make(folder: Path, documents: int) -> Path:
        texts = []
        for domain in DOMAINS:
            packed = (files("moekit") / "quickstart" / "text" / f"{domain}.valid.jsonl.gz").read_bytes()
            texts.append(folder / f"{domain}.jsonl")
            texts[-1].write_bytes(b"".join(gzip.decompress(packed).splitlines(keepends=True)[:documents]))
        prepare(texts, folder / "data", valid_fraction=0.3, vocab_size=300)
        return folder / "data"

    return make


@pytest.fixture(scope="session")
def two(tiny_config: Callable[..., ModelConfig]) -> dict[str, Any]:
    """The tree of a comparison: a dense model against a mixture of experts, two seeds, 40 steps."""
    sizes: dict[str, Any] = {"vocab_size": 300, "max_position_embeddings": 128, "initializer_range": 0.02}
    dense = tiny_config(ffn={"kind": "dense", "intermediate_size": 40}, **sizes)
    moe = tiny_config(ffn={"aux_loss_alpha": 0.01}, **sizes)
    return {
        "title": "dense against experts",
        "architectures": {"dense": {"model": dense.model_dump()}, "moe": {"model": moe.model_dump()}},
        "baseline": "dense",
        "seeds": [0, 1],
        "recipe": {
            "data": {"sequence_length": 32, "batch_size": 2},
            "optimizer": {"kind": "adamw", "lr": 3e-3},
            "schedule": {"kind": "step", "warmup_steps": 4},
            "precision": "float32",
            "device": "cpu",
            **{"steps": 40, "log_every": 4, "eval_every": 10, "eval_tokens": 256, "save_every": 4},
        },
        "expected": [
            {"measure": "loss", "source": "elsewhere", "values": {"dense": 2.0, "moe": 1.9}},
            {"measure": "score", "source": "elsewhere", "better": "higher", "values": {"dense": 40.0, "moe": 50.0}},
        ],
    }


@pytest.fixture(scope="session")
def compared(
    tmp_path_factory: pytest.TempPathFactory, make_data: Callable[[Path, int], Path], two: dict[str, Any]
) -> Path:
    """A folder with `data`, the comparison's file `two.yaml`, and nothing else."""
    folder = tmp_path_factory.mktemp("compare")
    make_data(folder, 12)
    (folder / "two.yaml").write_text(write_yaml(two), encoding="utf-8")
    return folder

"""A small dataset of the package's own text, and runs on it."""

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moekit.quickstart
from moekit.config import RunConfig
from moekit.config.load import validate
from moekit.data import prepare

TEXT = Path(moekit.quickstart.__file__).parent / "text"
DOMAINS = ("gov_en", "math_en", "poetry_zh")
BYTES = {"train": 60_000, "valid": 9_000}


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset, vocabulary 512, of the first documents of three domains; poetry_zh has no validation text."""
    folder = tmp_path_factory.mktemp("text")
    for split, limit in BYTES.items():
        for domain in DOMAINS if split == "train" else DOMAINS[:2]:
            with gzip.open(TEXT / f"{domain}.{split}.jsonl.gz", "rb") as file:
                lines = file.readlines()
            kept = [line for number, line in enumerate(lines) if sum(map(len, lines[: number + 1])) < limit]
            (folder / f"{domain}.{split}.jsonl").write_bytes(b"".join(kept or lines[:1]))
    trains, valids = (sorted(folder.glob(f"*.{split}.jsonl")) for split in BYTES)
    prepare(trains, folder / "data", valid_paths=valids, vocab_size=512)
    return folder / "data"


@pytest.fixture(scope="session")
def prompted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared dataset, in the vocabulary of `data`, of prompts and texts of many lengths."""
    folder = tmp_path_factory.mktemp("prompted")
    for split, count in (("train", 60), ("valid", 11)):
        rows = [{"prompt": "What is " * (n % 4), "text": "after " * (1 + n % 3) + str(n)} for n in range(count)]
        rows = [{**row, "domain": "asked"} for row in rows]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    valid = [folder / "valid.jsonl"]
    prepare([folder / "train.jsonl"], folder / "data", valid_paths=valid, tokenizer=data, prompt_field="prompt")
    return folder / "data"


@pytest.fixture(scope="session")
def run_config(data: Path, device: torch.device) -> Callable[..., RunConfig]:
    """Returns a factory of short runs: `ffn` and `model` are merged into the defaults, `data_...` is of the data."""

    def make(*, model: dict[str, Any] | None = None, ffn: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
        experts = {"kind": "moe", "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2}
        experts |= {"moe_intermediate_size": 16, "aux_loss_alpha": 0.01}
        attention = {"kind": "mha", "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
        shape = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 2, "initializer_range": 0.05}
        tokens = {"path": str(data), "sequence_length": 32, "batch_size": 4}
        tokens |= {key.removeprefix("data_"): settings.pop(key) for key in list(settings) if key.startswith("data_")}
        if ffn is None or ffn.get("kind", "moe") == "moe":
            ffn = {**experts, **(ffn or {})}
        tree = {
            "model": {**shape, "attention": attention, "ffn": ffn, **(model or {})},
            "data": tokens,
            "optimizer": {"lr": 3e-3},
            "schedule": {"kind": "constant"},
            "steps": 12,
            "precision": "float32",
            "device": str(device),
            "log_every": 2,
            "eval_tokens": 256,
        }
        return validate(RunConfig, {**tree, **settings})

    return make


@pytest.fixture(autouse=True)
def _quiet_tokenizers() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"

"""What all tests share: seeds, one thread, the device under test, and a factory of tiny models.

`MOEKIT_TEST_DEVICE=cuda pytest` runs the tests of `ops` and `nn` on another device.
"""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekit.config import ModelConfig

torch.set_num_threads(1)

_PARTS: dict[str, dict[str, Any]] = {
    "mha": {"kind": "mha", "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6},
    "mla": {
        "kind": "mla",
        "num_attention_heads": 3,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
    },
    "moe": {
        "kind": "moe",
        "n_routed_experts": 7,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 10,
    },
    "dense": {"kind": "dense", "intermediate_size": 26},
    "mumoe": {"kind": "mumoe", "intermediate_size": 26, "n_routed_experts": 6},
    "lory": {"kind": "lory", "n_routed_experts": 3, "intermediate_size": 10, "segment_size": 4},
}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device(os.environ.get("MOEKIT_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., ModelConfig]:
    """Returns a factory: `attention` and `ffn` are merged into the defaults of their kind, the rest is the model's.

    Sizes divide nothing, and initial weights are large, so that no term is too small to be wrong.
    """

    def make(*, attention: dict[str, Any] | None = None, ffn: dict[str, Any] | None = None, **rest: Any) -> ModelConfig:
        attention, ffn = attention or {}, ffn or {}
        parts = {
            "attention": {**_PARTS[attention.get("kind", "mha")], **attention},
            "ffn": {**_PARTS.get(ffn.get("kind", "moe"), {}), **ffn},
        }
        sizes = {"vocab_size": 61, "hidden_size": 18, "num_hidden_layers": 2, "max_position_embeddings": 64}
        return ModelConfig.model_validate({**sizes, "initializer_range": 0.25, **parts, **rest})

    return make

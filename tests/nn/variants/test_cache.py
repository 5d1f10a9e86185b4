"""What layers that merge keep while generating is what the plan counts."""

from typing import Any

import pytest
import torch

from moekit.config import ModelConfig, Variant, memory
from moekit.nn.cache import KVCache
from moekit.nn.model import Model

SIZES = {"intermediate_size": 26, "n_routed_experts": 5}
MEO = {"kind": "meo", **SIZES, "num_experts_per_tok": 3}
SETTINGS: dict[str, dict[str, Any]] = {
    "MEO by task": {**MEO, "level": "task", "description_ids": (1, 2)},
    "MEO by prefix": {**MEO, "level": "prefix", "segment_size": 4},
    "MEO by segment": {**MEO, "level": "segment", "segment_size": 4},
    "Lory": {"kind": "lory", **SIZES, "segment_size": 4},
}


@pytest.mark.parametrize("ffn", SETTINGS.values(), ids=SETTINGS.keys())
def test_the_cache_holds_the_bytes_that_are_counted(device: torch.device, ffn: dict[str, Any]) -> None:
    config = ModelConfig(
        vocab_size=61,
        hidden_size=18,
        num_hidden_layers=3,
        attention={"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 6},  # type: ignore[arg-type]
        ffn=ffn,  # type: ignore[arg-type]
    )
    model = Model(config).to(device).eval()
    batch, length = 2, 14
    cache = KVCache(config, batch, length, device)
    ids = torch.randint(61, (batch, length), device=device)
    with torch.no_grad():
        model(ids[:, :9], cache=cache)
        for position in range(9, length):
            model(ids[:, position : position + 1], cache=cache)
    held = [*cache.routing.values(), *cache.sums.values(), *(t for kept in cache.merged.values() for t in kept)]
    found = sum(tensor.nbytes for tensor in held if tensor.is_floating_point())
    assert isinstance(config.ffn, Variant)
    assert found == batch * 3 * config.ffn.cached_bytes(18, length, 4)
    assert found == memory(config, batch, length, "float32")["generation_merged_weights"]

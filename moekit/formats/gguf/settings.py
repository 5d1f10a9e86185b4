"""The settings, in: the configuration that a file's keys describe, or an error where they mean what we do not compute.

Whatever the configuration is taken from, `architecture.keys` must give the file's keys again, so that none is passed
over: neither a damaged one nor one that somebody else's model needs.
"""

import math
from collections.abc import Collection
from typing import Any, TypeVar

import numpy as np
from pydantic_core import from_json

from moekit.config import ModelConfig, validate
from moekit.errors import CheckpointError, ConfigError, UnsupportedError
from moekit.formats.gguf.architecture import MOST_LAYERS, OWN, keys, magnitude
from moekit.formats.gguf.file import Value

ARCHITECTURES = ("deepseek", "deepseek2", "llama")
_IDLE: dict[str, Value] = {
    "attention.causal": True,
    "expert_gating_func": 1,
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "expert_weights_norm": False,
    "expert_weights_scale": 1.0,
    "rope.scaling.attn_factor": 1.0,
    "rope.scaling.factor": 1.0,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
}
"""What others write and we do not, where it says only what is so without it."""
_T = TypeVar("_T", int, float, str, bool)


def read(found: dict[str, Value], tensors: Collection[str], where: str) -> ModelConfig:
    """Returns the configuration that a file's metadata describes, `tensors` being the names that it holds.

    Raises UnsupportedError for an architecture that is not read, CheckpointError for keys that contradict each other or
    that mean something which we would not compute.
    """
    name = found.get("general.architecture")
    if name not in ARCHITECTURES:
        raise UnsupportedError(f"{where} has architecture {name!r} but these are read: {', '.join(ARCHITECTURES)}")
    layers = found.get(f"{name}.block_count")
    if not isinstance(layers, int) or not 0 < layers <= MOST_LAYERS:
        raise CheckpointError(f"{where} says {name}.block_count is {layers!r} but 1 to {MOST_LAYERS} are allowed")
    try:
        config = _own(found, layers) if OWN in found else _Keys(str(name), found, where).config(tensors)
        again = keys(config)
    except (ConfigError, UnsupportedError, ValueError, ArithmeticError) as error:
        raise CheckpointError(f"{where} describes no model that is known here: {error}") from None
    without_use = {f"{name}.feed_forward_length"} if not found.get(f"{name}.leading_dense_block_count") else set()
    for key, value in found.items():
        if not key.startswith(f"{name}.") or (key not in again and key in without_use):
            continue
        if key not in again and _IDLE.get(key.removeprefix(f"{name}.")) != value:
            raise CheckpointError(f"{where} says {key!r} is {value!r}, which would not be computed")
        if key in again and not _same(value, again[key]):
            raise CheckpointError(f"{where} says {key!r} is {value!r} where the rest of it means {again[key]!r}")
    if again["general.architecture"] != name:
        raise CheckpointError(f"{where} has architecture {name!r} but describes a {again['general.architecture']!r}")
    if OWN in found and (missing := again.keys() - found.keys()):
        raise CheckpointError(f"{where} has no key {min(missing)}, which its {OWN} calls for")
    return config


def _own(found: dict[str, Value], layers: int) -> ModelConfig:
    content = from_json(str(found[OWN]))
    if not isinstance(content, dict) or content.get("num_hidden_layers") != layers:  # before it is looped over
        raise ConfigError(f"{OWN} is not a model of {layers} layers")
    return validate(ModelConfig, content)


def _same(a: Value, b: Value) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return bool(np.float32(a) == np.float32(b))
    return type(a) is type(b) and a == b


class _Keys:
    """The keys of a file that somebody else wrote; what is left out is llama.cpp's default."""

    def __init__(self, name: str, found: dict[str, Value], where: str) -> None:
        self.name, self.found, self.where = name, found, where

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        """Returns a value of the kind; a float as the shortest decimal that is it in float32."""
        value = self.found.get(f"{self.name}.{key}", default)
        if value is None:
            raise CheckpointError(f"{self.where} has no key {self.name}.{key}")
        if type(value) is not kind:
            raise CheckpointError(f"{self.where} says {self.name}.{key} is {value!r}, not one {kind.__name__}")
        return kind(str(np.float32(value))) if kind is float else value

    def config(self, tensors: Collection[str]) -> ModelConfig:
        tokens = self.found.get("tokenizer.ggml.tokens")
        content = {
            "vocab_size": self.get("vocab_size", int, len(tokens) if isinstance(tokens, list) else None),
            "hidden_size": self.get("embedding_length", int),
            "num_hidden_layers": self.get("block_count", int),
            "max_position_embeddings": self.get("context_length", int),
            "rms_norm_eps": self.get("attention.layer_norm_rms_epsilon", float),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention": self._attention(),
            "ffn": self._ffn(any(tensor.endswith(".exp_probs_b.bias") for tensor in tensors)),
        }
        return validate(ModelConfig, content)

    def _attention(self) -> dict[str, Any]:
        heads = self.get("attention.head_count", int)
        shared = {"num_attention_heads": heads, "rope": self._rope()}
        if self.name != "deepseek2":
            kv_heads = self.get("attention.head_count_kv", int, heads)
            head_dim = self.get("attention.key_length", int, self.get("embedding_length", int) // heads)
            return {"kind": "mha", "num_key_value_heads": kv_heads, "head_dim": head_dim, **shared}
        rotated = self.get("rope.dimension_count", int)
        return {
            "kind": "mla",
            "kv_lora_rank": self.get("attention.kv_lora_rank", int),
            "q_lora_rank": self.get("attention.q_lora_rank", int, 0) or None,
            "qk_nope_head_dim": self.get("attention.key_length_mla", int) - rotated,
            "qk_rope_head_dim": rotated,
            "v_head_dim": self.get("attention.value_length_mla", int),
            **shared,
        }

    def _rope(self) -> dict[str, Any]:
        theta = {"theta": self.get("rope.freq_base", float, 10000.0)}
        if self.get("rope.scaling.type", str, "none") != "yarn":
            return theta
        factor = self.get("rope.scaling.factor", float)
        all_dim = round(self.get("rope.scaling.yarn_log_multiplier", float, 0.0) / 0.1, 6)
        whole = self.get("rope.scaling.attn_factor", float, 1.0) * magnitude(factor, 1)
        yarn = {
            "factor": factor,
            "original_max_position_embeddings": self.get("rope.scaling.original_context_length", int),
            "mscale": all_dim if self.name == "deepseek2" else round((whole - 1) / (0.1 * math.log(factor)), 6),
            "mscale_all_dim": all_dim,
        }
        return {**theta, "yarn": yarn}

    def _ffn(self, biased: bool) -> dict[str, Any]:
        experts, dense_layers = self.get("expert_count", int, 0), self.get("leading_dense_block_count", int, 0)
        if not experts or dense_layers == self.get("block_count", int):
            return {"kind": "dense", "intermediate_size": self.get("feed_forward_length", int)}
        moe = {"kind": "moe", "n_routed_experts": experts, "num_experts_per_tok": self.get("expert_used_count", int)}
        if self.name == "llama":
            return {**moe, "moe_intermediate_size": self.get("feed_forward_length", int), "norm_topk_prob": True}
        groups, used = self.get("expert_group_count", int, 1), self.get("expert_group_used_count", int, 1)
        if used < groups and not biased:  # DeepSeek-V2's groups are scored by their best expert, llama.cpp takes V3's
            raise UnsupportedError("it has groups of experts and no selection bias: its groups may be of either kind")
        return {
            **moe,
            "n_shared_experts": self.get("expert_shared_count", int),
            "moe_intermediate_size": self.get("expert_feed_forward_length", int),
            "first_k_dense_replace": dense_layers,
            "intermediate_size": self.get("feed_forward_length", int) if dense_layers else None,
            "routed_scaling_factor": self.get("expert_weights_scale", float, 1.0),
            "norm_topk_prob": self.get("expert_weights_norm", bool, False),
            "scoring_func": {1: "softmax", 2: "sigmoid"}.get(self.get("expert_gating_func", int, 1), "another"),
            "topk_method": "noaux_tc" if biased else "greedy",
            **({"n_group": groups, "topk_group": used} if used < groups else {}),
        }

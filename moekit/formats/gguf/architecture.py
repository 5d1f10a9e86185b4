"""The settings, out: which of llama.cpp's architectures computes a model exactly, and the keys that it reads.

llama.cpp ignores keys that an architecture does not ask for, and computes another model without a word. So a setting is
written only where its graph was read to use it (llama.cpp of llama-cpp-python 0.3.36), and refused everywhere else:

    deepseek     MHA, DeepSeekMoE's experts: softmax over all, not renormalised, shared ones, dense layers first
    deepseek2    MLA, dense or experts of any scoring, selection bias, V3's groups
    llama        MHA, dense, or experts in every layer with renormalised weights and none shared (Mixtral)
"""

import json
import math
from typing import Any

from moekit.config import DenseConfig, MHAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig
from moekit.errors import UnsupportedError
from moekit.formats.gguf.file import Value

OWN = "moekit.config"
"""Our configuration as JSON: a key that others ignore. It brings back what only training needs."""
MOST_LAYERS, MOST_EXPERTS = 512, 1024

_TRAINING = {
    "initializer_range", "nominal_size", "hash_method", "aux_loss_alpha", "seq_aux", "global_aux",
    "device_aux_loss_alpha", "comm_aux_loss_alpha", "z_loss_alpha", "bias_update_speed", "capacity_factor",
    "drop_policy",
}  # fmt: skip
_EXPRESSED = {
    "vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "attention", "ffn", "kind", "rope", "theta", "yarn", "factor", "original_max_position_embeddings", "beta_fast",
    "beta_slow", "mscale", "mscale_all_dim", "num_attention_heads", "num_key_value_heads", "head_dim", "kv_lora_rank",
    "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "intermediate_size", "n_routed_experts",
    "n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "first_k_dense_replace", "moe_layer_freq",
    "scoring_func", "topk_method", "n_group", "topk_group", "norm_topk_prob", "routed_scaling_factor",
}  # fmt: skip
"""Settings that this file knows; one that a later version adds is refused until it is known here."""


def keys(config: ModelConfig) -> dict[str, Value]:
    """Returns a model's metadata; raises UnsupportedError, with the reason, where no architecture computes it."""
    name = _architecture(config)
    _check_known(config)
    if config.num_hidden_layers > MOST_LAYERS:
        raise UnsupportedError(f"num_hidden_layers is {config.num_hidden_layers} but llama.cpp takes {MOST_LAYERS}")
    settings: dict[str, Value] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "vocab_size": config.vocab_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **_attention(config, name),
        **_rope(config.attention.rope, name),
        **_ffn(config, name),
    }
    own = {OWN: json.dumps(config.model_dump(mode="json"))}
    return {"general.architecture": name} | {f"{name}.{key}": value for key, value in settings.items()} | own


def _architecture(config: ModelConfig) -> str:
    attention, ffn = config.attention, config.ffn
    if not isinstance(ffn, DenseConfig | MoEConfig):
        raise UnsupportedError(f"GGUF has no architecture with ffn.kind {ffn.kind}")
    if isinstance(attention, MLAConfig):
        return "deepseek2"
    if isinstance(ffn, DenseConfig):
        return "llama"
    return "llama" if ffn.norm_topk_prob and not ffn.n_shared_experts else "deepseek"


def _check_known(part: Any, path: str = "") -> None:
    """Raises for a setting that is not known here and not at its default."""
    for name, field in type(part).model_fields.items():
        value = getattr(part, name)
        if hasattr(type(value), "model_fields"):
            _check_known(value, f"{path}{name}.")
        if name not in _EXPRESSED | _TRAINING and value != field.default:
            raise UnsupportedError(f"{path}{name} is {value} but the export to GGUF knows no key for it")


def _attention(config: ModelConfig, name: str) -> dict[str, Value]:
    attention, layers = config.attention, config.num_hidden_layers
    heads: dict[str, Value] = {"attention.head_count": attention.num_attention_heads}
    if isinstance(attention, MHAConfig):
        width = attention.num_attention_heads * attention.head_dim
        if name == "deepseek" and width != config.hidden_size:
            _refuse(name, "heads that are together as wide as the model", f"{width} and {config.hidden_size}")
        return heads | {
            "attention.head_count_kv": attention.num_key_value_heads,
            "attention.key_length": attention.head_dim,
            "attention.value_length": attention.head_dim,
            "rope.dimension_count": attention.head_dim,
        }
    if attention.q_lora_rank and (layers in (26, 27) or (layers, config.vocab_size) == (48, 128256)):
        _refuse(name, f"{layers} layers for a V2-Lite, which has no q_lora_rank", str(attention.q_lora_rank))
    return heads | {  # absorbed, as it is computed: one key-value head, the latent and the rotated key
        "attention.head_count_kv": 1,
        "attention.q_lora_rank": attention.q_lora_rank or 0,
        "attention.kv_lora_rank": attention.kv_lora_rank,
        "attention.key_length": attention.kv_lora_rank + attention.qk_rope_head_dim,
        "attention.value_length": attention.kv_lora_rank,
        "attention.key_length_mla": attention.qk_nope_head_dim + attention.qk_rope_head_dim,
        "attention.value_length_mla": attention.v_head_dim,
        "rope.dimension_count": attention.qk_rope_head_dim,
    }


def _rope(rope: RopeConfig, name: str) -> dict[str, Value]:
    """Returns the rotation's keys.

    llama.cpp's own magnitude m = 0.1 ln(factor) + 1 stands on cos and sin, times attn_factor. With MHA all of a head is
    rotated, so magnitude(mscale) on q and k is all that matters, whatever part of it is in the softmax scale.
    deepseek2 takes one number, yarn_log_multiplier / 0.1, for mscale and mscale_all_dim alike.
    """
    yarn = rope.yarn
    if yarn is None:
        return {"rope.freq_base": rope.theta, "rope.scaling.type": "none"}
    if (yarn.beta_fast, yarn.beta_slow) != (32, 1):
        _refuse(name, "beta_fast 32 and beta_slow 1", f"{yarn.beta_fast:g} and {yarn.beta_slow:g}")
    scaling: dict[str, Value] = {
        "rope.freq_base": rope.theta,
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": yarn.factor,
        "rope.scaling.original_context_length": yarn.original_max_position_embeddings,
    }
    if name == "deepseek2":
        if not yarn.mscale_all_dim or yarn.mscale != yarn.mscale_all_dim:
            _refuse(name, "mscale and mscale_all_dim alike, above 0", f"{yarn.mscale:g} and {yarn.mscale_all_dim:g}")
        return scaling | {"rope.scaling.yarn_log_multiplier": 0.1 * yarn.mscale_all_dim}
    if yarn.mscale != 1:
        scaling["rope.scaling.attn_factor"] = magnitude(yarn.factor, yarn.mscale) / magnitude(yarn.factor, 1)
    return scaling


def magnitude(factor: float, mscale: float) -> float:
    """Returns YaRN's attention magnitude."""
    return 0.1 * mscale * math.log(factor) + 1


def _ffn(config: ModelConfig, name: str) -> dict[str, Value]:
    ffn = config.ffn
    if isinstance(ffn, DenseConfig):
        width: dict[str, Value] = {"feed_forward_length": ffn.intermediate_size}
        if name == "llama":
            return width
        layers = config.num_hidden_layers  # deepseek2 asks for experts even where every layer is dense
        of_none = {"expert_feed_forward_length": ffn.intermediate_size, "expert_shared_count": 0}
        return width | {"leading_dense_block_count": layers, **of_none}
    assert isinstance(ffn, MoEConfig)  # `_architecture` has looked
    _check_experts(ffn, name)
    if config.moe_layers != list(range(ffn.first_k_dense_replace, config.num_hidden_layers)):
        _refuse(name, "experts in every layer behind the first dense ones", f"moe_layer_freq {ffn.moe_layer_freq}")
    counts: dict[str, Value] = {"expert_count": ffn.n_routed_experts, "expert_used_count": ffn.num_experts_per_tok}
    if name == "llama":
        return {"feed_forward_length": ffn.moe_intermediate_size, **counts}
    if ffn.intermediate_size is not None:
        counts["feed_forward_length"] = ffn.intermediate_size
    counts |= {
        "leading_dense_block_count": ffn.first_k_dense_replace,
        "expert_feed_forward_length": ffn.moe_intermediate_size,
        "expert_shared_count": ffn.n_shared_experts,
        "expert_weights_scale": ffn.routed_scaling_factor,
    }
    if name == "deepseek2":
        counts["expert_gating_func"] = ("softmax", "sigmoid").index(ffn.scoring_func) + 1
        counts["expert_weights_norm"] = ffn.norm_topk_prob
        if ffn.topk_group < ffn.n_group:
            counts |= {"expert_group_count": ffn.n_group, "expert_group_used_count": ffn.topk_group}
    return counts


def _check_experts(ffn: MoEConfig, name: str) -> None:
    """Raises for routing that the architecture's graph does not compute."""
    limited = ffn.topk_group < ffn.n_group
    if ffn.topk_method == "hash":
        _refuse(name, "a router", "topk_method hash")
    if limited and ffn.topk_method == "group_limited_greedy":
        _refuse(name, "groups scored by the sum of their two best (noaux_tc)", "topk_method group_limited_greedy")
    if ffn.n_routed_experts > MOST_EXPERTS:
        _refuse(name, f"at most {MOST_EXPERTS} experts", f"n_routed_experts {ffn.n_routed_experts}")
    if name in ("deepseek", "deepseek2") and not ffn.n_shared_experts:
        _refuse(name, "shared experts", "n_shared_experts 0")
    if name in ("deepseek", "llama"):
        if ffn.scoring_func != "softmax":
            _refuse(name, "softmax scores", f"scoring_func {ffn.scoring_func}")
        if ffn.topk_method == "noaux_tc":
            _refuse(name, "routers without a selection bias", "topk_method noaux_tc")
    if name == "deepseek" and ffn.norm_topk_prob:
        _refuse(name, "weights that are not renormalised and ignores the key that says so", "norm_topk_prob true")
    if name == "llama" and (ffn.first_k_dense_replace or ffn.routed_scaling_factor != 1):
        found = f"{ffn.first_k_dense_replace} and {ffn.routed_scaling_factor:g}"
        _refuse(name, "first_k_dense_replace 0 and routed_scaling_factor 1", found)


def _refuse(name: str, takes: str, found: str) -> None:
    raise UnsupportedError(f"llama.cpp's {name} takes {takes}; this model has {found}, which it would not compute")

"""The tensors: their names on disk here and there, one table for both ways, and what is laid out in another way.

llama.cpp stacks a layer's experts, rotates neighbouring numbers where our multi-head attention rotates halves, and
absorbs latent attention, for which kv_b_proj is two tensors, the keys' one transposed.
"""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from moekit.config import MHAConfig, MLAConfig
from moekit.errors import UnsupportedError
from moekit.formats.gguf.blocks import numbers
from moekit.ops.quantize import Quantized

_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "self_attn.q_a_proj.weight": "attn_q_a.weight",
    "self_attn.q_a_layernorm.weight": "attn_q_a_norm.weight",
    "self_attn.q_b_proj.weight": "attn_q_b.weight",
    "self_attn.kv_a_proj_with_mqa.weight": "attn_kv_a_mqa.weight",
    "self_attn.kv_a_layernorm.weight": "attn_kv_a_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
    "mlp.gate.weight": "ffn_gate_inp.weight",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_experts.gate_proj.weight": "ffn_gate_shexp.weight",
    "mlp.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
    "mlp.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
}
_KEYS_UP, _VALUES_UP = "attn_k_b.weight", "attn_v_b.weight"


class Place(NamedTuple):
    """Where a tensor of ours, or a part of it, stands in GGUF."""

    name: str
    expert: int | None = None
    """Which of the stacked ones it is."""


def single(name: str) -> bool:
    """Returns whether a tensor of theirs is float32 always, as llama.cpp wants norms, routers and biases."""
    return name.endswith(("_norm.weight", ".ffn_gate_inp.weight", ".bias"))


def places(key: str) -> list[Place]:
    """Returns where the tensor that is `key` on disk here stands in GGUF; raises UnsupportedError for one without."""
    if key in _MODEL:
        return [Place(_MODEL[key])]
    if found := re.fullmatch(r"model\.layers\.(\d+)\.(.+)", key):
        block, rest = f"blk.{found[1]}.", found[2]
        if expert := re.fullmatch(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj\.weight", rest):
            return [Place(f"{block}ffn_{expert[2]}_exps.weight", int(expert[1]))]
        if rest == "self_attn.kv_b_proj.weight":
            return [Place(block + _KEYS_UP), Place(block + _VALUES_UP)]
        if rest in _LAYER:
            return [Place(block + _LAYER[rest])]
    raise UnsupportedError(f"the architectures of GGUF that are written have no tensor for {key}")


def apart(key: str, weight: Tensor | Quantized, attention: MHAConfig | MLAConfig) -> list[Tensor | Quantized]:
    """Returns what stands in each of the `places` of a tensor."""
    if (order := _order(key, attention)) is not None:
        rows = order.to(weight.codes.device if isinstance(weight, Quantized) else weight.device)
        return [weight.of(rows) if isinstance(weight, Quantized) else weight[rows]]
    if key.endswith(".kv_b_proj.weight") and isinstance(attention, MLAConfig):
        heads = numbers(weight).unflatten(0, (attention.num_attention_heads, -1))
        up, values = heads.split((attention.qk_nope_head_dim, attention.v_head_dim), dim=1)
        return [up.transpose(1, 2).contiguous(), values.contiguous()]
    return [weight]


def together(key: str, parts: list[Tensor], attention: MHAConfig | MLAConfig) -> Tensor:
    """Returns a tensor of ours from what stands in its `places`: undoes `apart`."""
    if (order := _order(key, attention)) is not None:
        return parts[0][order.argsort()]
    if len(parts) == 2:
        return torch.cat((parts[0].transpose(1, 2), parts[1]), dim=1).flatten(0, 1)
    return parts[0]


def _order(key: str, attention: MHAConfig | MLAConfig) -> Tensor | None:
    """Returns the row of ours that stands in each row of theirs: i and i + half of a head become neighbours."""
    if not isinstance(attention, MHAConfig) or not key.endswith((".q_proj.weight", ".k_proj.weight")):
        return None
    width = attention.head_dim
    heads = attention.num_attention_heads if key.endswith(".q_proj.weight") else attention.num_key_value_heads
    return torch.arange(heads * width).view(heads, 2, width // 2).transpose(1, 2).flatten()

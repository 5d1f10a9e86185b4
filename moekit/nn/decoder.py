"""A model's decoding step in one native call, where the model is of the kind that it knows."""

from collections.abc import Sequence

import torch
from torch import nn

from moekit.config import MHAConfig, MLAConfig
from moekit.nn.attention import Attention
from moekit.nn.block import Block
from moekit.nn.cache import KVCache
from moekit.nn.experts import Experts
from moekit.nn.ffn import SwiGLU, fit
from moekit.nn.linear import Linear, untouched
from moekit.nn.mla import MLA
from moekit.nn.model import Model
from moekit.nn.moe import MoE
from moekit.nn.norm import RMSNorm
from moekit.nn.quantized import matrices
from moekit.nn.rope import rotation, softmax_scale
from moekit.nn.router import Router
from moekit.nn.weights import MappedWeight, QuantizedWeight, operand
from moekit.ops.decode import Decoder, Heads, Layer, Projections, unavailable

QK_NORMS = ("none", "head", "full")
FULL = QK_NORMS.index("full")

KNOWN: set[type[nn.Module]] = {
    *(Model, Block, Attention, MLA, RMSNorm, Linear, SwiGLU, MoE, Router, Experts),
    *(QuantizedWeight, MappedWeight, nn.Embedding, nn.ModuleList),
}
"""What the native step stands for, each as it is."""


def decoder(model: Model, cache: KVCache) -> Decoder | None:
    """Returns the native step over this model and cache, or None: then the model itself takes the step.

    Nothing is known of a module with a hook, or with an adapter in its place. Known are multi-head, grouped-query and
    latent attention with dense, shared and routed SwiGLU experts, chosen by any router but a hash, on a CPU, weights
    of any precision. Its sums are float32 whatever the weights are, so in bfloat16 it is closer to the exact model
    than the model's own forward; beside weights in codes it rounds activations to 8 bits where the CPU multiplies
    such (`ops.reference.rounded`). Weights and cache must stay where they are.
    """
    if model.experts_backend not in ("auto", "native"):
        return None
    if not all(type(module) in KNOWN and untouched(type(module), module) for module in model.modules()):
        return None
    weights = [operand(getattr(module, name)) for _, module, name in matrices(model)]
    routers = [module.expert_bias for module in model.modules() if isinstance(module, Router)]
    kept = [cache.layer(number) for number in range(len(model.layers))]
    numbers = [*model.parameters(), *kept, *(bias for bias in routers if bias is not None)]
    if unavailable(numbers, weights):
        return None
    attention = model.config.attention
    heads, positions = _heads(attention), torch.arange(cache.max_length).unsqueeze(0)
    scale, eps = softmax_scale(attention.rope, heads.head_dim), model.config.rms_norm_eps
    latent_eps = (attention.latent_norm_eps if attention.kind == "mla" else None) or eps
    layers = [_layer(block, cache, number) for number, block in enumerate(model.layers) if isinstance(block, Block)]
    if not _told(model, layers, scale, eps, latent_eps):
        return None
    cos, sin = rotation(attention.rope, heads.rope, positions)
    return Decoder(
        layers,
        embedding=model.embed_tokens.weight,
        head=model.lm_head.matrix,
        norm=model.norm.weight,
        eps=eps,
        latent_eps=latent_eps,
        heads=heads,
        softmax_scale=scale,
        cos=cos[0],
        sin=sin[0],
    )


def _told(model: Model, layers: Sequence[Layer], scale: float, eps: float, latent_eps: float) -> bool:
    """Returns whether `Decoder` is told all that the modules do. It reads the settings, and a part may have been
    replaced by one of its own class that has another bias, epsilon or size."""
    known = [(p.q_bias, p.k_bias, p.v_bias, p.o_bias) for p in (layer.attention for layer in layers)]
    biased = [module for module in model.modules() if isinstance(module, Linear) and module.bias is not None]
    if len(biased) != sum(bias is not None for biases in known for bias in biases):
        return False
    if model.embed_tokens.max_norm is not None or model.lm_head.matrix.shape != model.embed_tokens.weight.shape:
        return False
    dim, heads = model.config.hidden_size, _heads(model.config.attention)
    for number, (block, layer) in enumerate(zip(model.layers, layers, strict=True)):
        attention = block.self_attn
        assert isinstance(attention, Attention | MLA)
        if attention.layer != number or attention.config != model.config.attention or attention.scale != scale:
            return False
        if not attention.heads.fit([w for w in layer.attention[:5] if w is not None], dim):
            return False
        if not (layer.ffn is None or fit(layer.ffn, dim)) or not (layer.routed is None or layer.routed.fit(dim)):
            return False
        if layer.shared_gate is not None and layer.shared_gate.shape != (dim,):
            return False
    each = heads.head_dim
    queries, keys = (heads.heads * each, heads.kv_heads * each) if heads.qk_norm == FULL else (each, each)
    known_widths = {"kv_a_layernorm": heads.rank, "q_a_layernorm": heads.q_rank, "q_norm": queries, "k_norm": keys}
    norms = [(name.rpartition(".")[2], m) for name, m in model.named_modules() if isinstance(m, RMSNorm)]
    return all(
        norm.eps == (latent_eps if name in ("kv_a_layernorm", "q_a_layernorm") else eps)
        and norm.weight.shape == (known_widths.get(name, dim),)
        for name, norm in norms
    )


def _heads(config: MHAConfig | MLAConfig) -> Heads:
    heads = config.num_attention_heads
    if isinstance(config, MHAConfig):
        width = config.head_dim
        norm = QK_NORMS.index(config.qk_norm)
        return Heads(heads, config.num_key_value_heads, width, width, rope=width, rank=0, q_rank=0, qk_norm=norm)
    rope, width = config.qk_rope_head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim
    return Heads(heads, 1, width, config.v_head_dim, rope, config.kv_lora_rank, config.q_lora_rank or 0, qk_norm=0)


def _projections(attention: nn.Module) -> Projections:
    if isinstance(attention, Attention):
        q, k, v, o = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        normed = attention.config.qk_norm != "none"
        q_norm, k_norm = (attention.q_norm.weight, attention.k_norm.weight) if normed else (None, None)
        biases = q.bias, k.bias, v.bias, o.bias
        return Projections(q.matrix, k.matrix, v.matrix, o.matrix, None, q_norm, k_norm, *biases)
    assert isinstance(attention, MLA)
    compressed, kv_a = attention.config.q_lora_rank is not None, attention.kv_a_proj_with_mqa
    return Projections(
        attention.q_b_proj.matrix if compressed else attention.q_proj.matrix,
        kv_a.matrix,
        attention.kv_b_proj.matrix,
        attention.o_proj.matrix,
        attention.q_a_proj.matrix if compressed else None,
        attention.q_a_layernorm.weight if compressed else None,
        attention.kv_a_layernorm.weight,
        q_bias=attention.q_a_proj.bias if compressed else None,
        k_bias=kv_a.bias,
        o_bias=attention.o_proj.bias,
    )


def _layer(block: Block, cache: KVCache, number: int) -> Layer:
    mlp, routed, gate = block.mlp, None, None
    ffn: SwiGLU | None
    if isinstance(mlp, MoE):
        ffn, routed = mlp.shared_experts, mlp.routed
        gate = None if mlp.shared_expert_gate is None else mlp.shared_expert_gate.numbers(torch.float32)[0]
    else:
        assert isinstance(mlp, SwiGLU)
        ffn = mlp
    return Layer(
        (block.input_layernorm.weight, block.post_attention_layernorm.weight),
        _projections(block.self_attn),
        None if ffn is None else (ffn.gate_proj.matrix, ffn.up_proj.matrix, ffn.down_proj.matrix),
        routed,
        cache.layer(number),
        gate,
    )

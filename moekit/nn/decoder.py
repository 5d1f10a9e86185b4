"""A model's decoding step in one native call, where the model is of the kind that it knows."""

import torch

from moekit.config import MHAConfig
from moekit.nn.attention import Attention
from moekit.nn.cache import KVCache
from moekit.nn.ffn import SwiGLU
from moekit.nn.model import Block, Model
from moekit.nn.moe import MoE
from moekit.nn.quantized import matrices
from moekit.nn.rope import rotation, softmax_scale
from moekit.nn.router import Router
from moekit.nn.weights import operand
from moekit.ops.decode import Decoder, Layer, Routed, unavailable


def decoder(model: Model, cache: KVCache) -> Decoder | None:
    """Returns the native step over this model and cache, or None: then the model itself takes the step.

    Known are multi-head and grouped-query attention, without biases or norms of queries and keys, with dense, shared
    and routed SwiGLU experts, chosen by any router but a hash, the shared ones without a gate, on a CPU, weights of any
    precision. Its sums are float32 whatever the weights are, so in bfloat16 it is closer to the exact model than the
    model's own forward. Weights and cache must stay where they are.
    """
    attention = model.config.attention
    if not isinstance(attention, MHAConfig) or model.experts_backend not in ("auto", "native"):
        return None
    if attention.attention_bias != "none" or attention.qk_norm != "none":
        return None
    if any(layer.shared_expert_gate is not None for layer in model.moe_layers):
        return None
    if any(isinstance(layer.mlp, MoE) and not isinstance(layer.mlp.router, Router) for layer in model.layers):
        return None
    weights = [operand(getattr(module, name)) for _, module, name in matrices(model)]
    if unavailable([model.embed_tokens.weight, *model.parameters(), cache.layer(0)], weights):
        return None
    positions = torch.arange(cache.max_length).unsqueeze(0)
    cos, sin = rotation(attention.rope, attention.head_dim, positions)
    return Decoder(
        [_layer(block, cache, number) for number, block in enumerate(model.layers) if isinstance(block, Block)],
        embedding=model.embed_tokens.weight,
        head=model.lm_head.matrix,
        norm=model.norm.weight,
        eps=model.config.rms_norm_eps,
        heads=attention.num_attention_heads,
        kv_heads=attention.num_key_value_heads,
        head_dim=attention.head_dim,
        softmax_scale=softmax_scale(attention.rope, attention.head_dim),
        cos=cos[0],
        sin=sin[0],
    )


def _layer(block: Block, cache: KVCache, number: int) -> Layer:
    attention, mlp, routed = block.self_attn, block.mlp, None
    assert isinstance(attention, Attention)
    ffn: SwiGLU | None
    if isinstance(mlp, MoE):
        config, router, ffn = mlp.config, mlp.router, mlp.shared_experts
        assert isinstance(router, Router)
        routed = Routed(
            operand(mlp.experts.gate_up_proj),
            operand(mlp.experts.down_proj),
            router.weight,
            router.expert_bias,
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            group_best=2 if config.topk_method == "noaux_tc" else 1,
            sigmoid=config.scoring_func == "sigmoid",
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )
    else:
        assert isinstance(mlp, SwiGLU)
        ffn = mlp
    return Layer(
        (block.input_layernorm.weight, block.post_attention_layernorm.weight),
        (
            attention.q_proj.matrix,
            attention.k_proj.matrix,
            attention.v_proj.matrix,
            attention.o_proj.matrix,
        ),
        None if ffn is None else (ffn.gate_proj.matrix, ffn.up_proj.matrix, ffn.down_proj.matrix),
        routed,
        cache.layer(number),
    )

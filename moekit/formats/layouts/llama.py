"""Llama (arXiv 2302.13971, 2407.21783), Mixtral (2401.04088) and OLMoE (2409.02060). Defaults are transformers'."""

from moekit.formats.layouts.layout import Layout
from moekit.formats.layouts.parts import (
    always,
    called,
    choice,
    heads,
    only,
    pooled_balance,
    same,
    whole_heads,
    window,
)
from moekit.formats.layouts.rope import rope

_BIAS = choice("attention.attention_bias", "attention_bias", False, {False: "none", True: "all"})
_PLAIN = only(hidden_act=("silu",), attention_dropout=(0.0,))

LLAMA = Layout(
    "llama",
    "LlamaForCausalLM",
    "mha",
    "dense",
    (
        same("", vocab_size=32000, hidden_size=4096, num_hidden_layers=32, max_position_embeddings=2048),
        same("", rms_norm_eps=1e-6, tie_word_embeddings=False, initializer_range=0.02),
        heads(32),
        _BIAS,
        rope(),
        same("ffn.", intermediate_size=11008),
        _PLAIN,
        only(mlp_bias=(False,)),
        whole_heads(),
    ),
)

MIXTRAL = Layout(
    "mixtral",
    "MixtralForCausalLM",
    "mha",
    "moe",
    (
        same("", vocab_size=32000, hidden_size=4096, num_hidden_layers=32, max_position_embeddings=131072),
        same("", rms_norm_eps=1e-5, tie_word_embeddings=False, initializer_range=0.02),
        heads(32, 8),
        rope(1e6),
        called("ffn.n_routed_experts", "num_local_experts", 8),
        called("ffn.moe_intermediate_size", "intermediate_size", 14336),
        same("ffn.", num_experts_per_tok=2),
        always({"ffn.norm_topk_prob": True}),
        pooled_balance(0.001, lambda values: values["num_hidden_layers"]),
        _PLAIN,
        only(router_jitter_noise=(0.0,)),
        window(lambda values, layer: True),
    ),
    renamed={".mlp.": ".block_sparse_moe.", ".gate_proj.": ".w1.", ".down_proj.": ".w2.", ".up_proj.": ".w3."},
    aliases={"num_experts": "num_local_experts"},
)

OLMOE = Layout(
    "olmoe",
    "OlmoeForCausalLM",
    "mha",
    "moe",
    (
        same("", vocab_size=50304, hidden_size=2048, num_hidden_layers=16, max_position_embeddings=4096),
        same("", rms_norm_eps=1e-5, tie_word_embeddings=False, initializer_range=0.02),
        heads(16, said="never"),
        _BIAS,
        always({"attention.qk_norm": "full"}),
        rope(),
        called("ffn.n_routed_experts", "num_experts", 64),
        called("ffn.moe_intermediate_size", "intermediate_size", 2048),
        same("ffn.", num_experts_per_tok=8, norm_topk_prob=False),
        pooled_balance(0.01, lambda values: values["num_hidden_layers"]),
        _PLAIN,
        only(clip_qkv=(None,)),
    ),
    aliases={"num_local_experts": "num_experts"},
)

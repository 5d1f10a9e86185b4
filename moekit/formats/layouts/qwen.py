"""Qwen2 (arXiv 2407.10671) and Qwen3 (2505.09388), dense and with experts. Defaults are transformers'."""

from moekit.config import ModelConfig
from moekit.errors import UnsupportedError
from moekit.formats.layouts.layout import Layout, Null, Ours, Part, Values, get
from moekit.formats.layouts.parts import (
    always,
    called,
    choice,
    dense_layers,
    heads,
    only,
    placement,
    pooled_balance,
    same,
    window,
)
from moekit.formats.layouts.rope import rope


def _moe_layers(values: Values) -> list[int]:
    step, dense = values["decoder_sparse_step"], values["mlp_only_layers"] or ()
    return [n for n in range(values["num_hidden_layers"]) if n not in dense and step and (n + 1) % step == 0]


def _layers(width: int) -> Part:
    """Returns where the dense layers are, and how wide."""

    def read(values: Values) -> Ours:
        moe, layers = _moe_layers(values), values["num_hidden_layers"]
        width = {"ffn.intermediate_size": values["intermediate_size"]} if len(moe) < layers else {}
        return placement(moe, layers) | width

    def write(config: ModelConfig) -> Values:
        width = get(config, "ffn.intermediate_size") or get(config, "ffn.moe_intermediate_size")
        return {"mlp_only_layers": dense_layers(config), "decoder_sparse_step": 1, "intermediate_size": width}

    return Part({"mlp_only_layers": Null(list), "decoder_sparse_step": 1, "intermediate_size": width}, read, write)


def _shared(default: int) -> Part:
    """Returns the one gated shared expert: as several of the routed ones' width where it is a multiple of that."""

    def read(values: Values) -> Ours:
        width, one = values["shared_expert_intermediate_size"], values["moe_intermediate_size"]
        if one and width % one == 0:
            return {"ffn.n_shared_experts": width // one, "ffn.shared_expert_gate": width > 0}
        shared = {"ffn.n_shared_experts": 1, "ffn.shared_expert_intermediate_size": width}
        return {**shared, "ffn.shared_expert_gate": True}

    def write(config: ModelConfig) -> Values:
        if not (width := get(config, "ffn.shared_width")):
            raise UnsupportedError("layout qwen2_moe has a shared expert, this model none; use layout moekit")
        return {"shared_expert_intermediate_size": width}

    return Part({"shared_expert_intermediate_size": default}, read, write)


def _size(vocabulary: int, width: int, layers: int) -> Part:
    return same(
        "",
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=layers,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        initializer_range=0.02,
    )


_PLAIN = only(hidden_act=("silu",), attention_dropout=(0.0,))
_BIAS = choice("attention.attention_bias", "attention_bias", False, {False: "none", True: "all"})
_HEAD_NORM = always({"attention.qk_norm": "head"})
_SWITCH = {"use_sliding_window": False, "sliding_window": Null(int, 4096)}
_LAST = window(
    lambda values, layer: values["use_sliding_window"] and layer >= values["max_window_layers"],
    **_SWITCH,
    max_window_layers=28,
    layer_types=Null(list),
)

QWEN2 = Layout(
    "qwen2",
    "Qwen2ForCausalLM",
    "mha",
    "dense",
    (
        _size(151936, 4096, 32),
        heads(32, 32, said="where unusual"),
        always({"attention.attention_bias": "qkv"}),
        rope(),
        same("ffn.", intermediate_size=22016),
        _PLAIN,
        _LAST,
    ),
)

QWEN3 = Layout(
    "qwen3",
    "Qwen3ForCausalLM",
    "mha",
    "dense",
    (
        _size(151936, 4096, 32),
        heads(32, 32, 128),
        _BIAS,
        _HEAD_NORM,
        rope(),
        same("ffn.", intermediate_size=22016),
        _PLAIN,
        _LAST,
    ),
)

QWEN2_MOE = Layout(
    "qwen2_moe",
    "Qwen2MoeForCausalLM",
    "mha",
    "moe",
    (
        _size(151936, 2048, 24),
        heads(16, 16, said="where unusual"),
        choice("attention.attention_bias", "qkv_bias", True, {False: "none", True: "qkv"}),
        rope(),
        called("ffn.n_routed_experts", "num_experts", 60),
        same("ffn.", num_experts_per_tok=4, moe_intermediate_size=1408, norm_topk_prob=False),
        _shared(5632),
        _layers(5632),
        pooled_balance(0.001, lambda values: len(_moe_layers(values))),
        _PLAIN,
        window(
            lambda values, layer: (
                values["use_sliding_window"] and layer % 2 == 0 and layer < values["max_window_layers"]
            ),
            **_SWITCH,
            max_window_layers=28,
            layer_types=Null(list),
        ),
    ),
    renamed={".mlp.shared_experts.": ".mlp.shared_expert."},
)

QWEN3_MOE = Layout(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    "mha",
    "moe",
    (
        _size(151936, 2048, 24),
        heads(32, 4),
        _BIAS,
        _HEAD_NORM,
        rope(),
        called("ffn.n_routed_experts", "num_experts", 128),
        same("ffn.", num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False),
        _layers(6144),
        pooled_balance(0.001, lambda values: len(_moe_layers(values))),
        _PLAIN,
        window(lambda values, layer: values["use_sliding_window"], **_SWITCH, max_window_layers=28),
    ),
    aliases={"num_local_experts": "num_experts"},
)

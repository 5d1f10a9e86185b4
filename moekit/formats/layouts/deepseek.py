"""DeepSeekMoE (arXiv 2401.06066), DeepSeek-V2 (2405.04434) and V3 (2412.19437).

Defaults are those of the released remote code for V1, whose sizes have none here: its class would give a model that was
never released. For V2 and V3 they are transformers', and the remote code's for what only training reads; V3's balance
factor and bias step are those of its report, as its configs leave both out.
"""

from moekit.config import ModelConfig
from moekit.errors import UnsupportedError
from moekit.formats.layouts.layout import REQUIRED, Layout, Null, Ours, Part, Values, get
from moekit.formats.layouts.parts import (
    always,
    choice,
    dense_layers,
    derived,
    heads,
    only,
    placement,
    same,
    whole_heads,
)
from moekit.formats.layouts.rope import rope


def _layers(first: int, width: int | object, *, leading: bool = False) -> Part:
    """Returns where the dense layers are and how wide; `leading`: its readers know no others."""

    def read(values: Values) -> Ours:
        first, frequency = values["first_k_dense_replace"], values["moe_layer_freq"]
        ours = {"ffn.first_k_dense_replace": first, "ffn.moe_layer_freq": frequency}
        return ours | ({"ffn.intermediate_size": values["intermediate_size"]} if first or frequency > 1 else {})

    def write(config: ModelConfig) -> Values:
        ours = placement(config.moe_layers, config.num_hidden_layers)
        first, frequency = ours.get("ffn.first_k_dense_replace", 0), ours.get("ffn.moe_layer_freq", 1)
        if not get(config, "ffn.mlp_only_layers"):  # as it is said, where there are several ways
            first, frequency = get(config, "ffn.first_k_dense_replace"), get(config, "ffn.moe_layer_freq")
        if leading and dense_layers(config) != list(range(config.moe_layers[0])):
            found = f"dense layers are {dense_layers(config)}"
            raise UnsupportedError(f"{found}, but transformers' class of this layout has leading ones only")
        width = get(config, "ffn.intermediate_size") or get(config, "ffn.moe_intermediate_size")
        return {"first_k_dense_replace": first, "moe_layer_freq": frequency, "intermediate_size": width}

    return Part({"first_k_dense_replace": first, "moe_layer_freq": 1, "intermediate_size": width}, read, write)


def _shared(default: Null, none: int | None) -> Part:
    """Returns the number of shared experts; `none` is how the layout says that there are not any."""

    def write(config: ModelConfig) -> Values:
        width, one = get(config, "ffn.shared_width"), get(config, "ffn.moe_intermediate_size")
        return {"n_shared_experts": width // one or none}

    return Part({"n_shared_experts": default}, lambda v: {"ffn.n_shared_experts": v["n_shared_experts"] or 0}, write)


def _balance(alpha: float) -> Part:
    """Returns the balance loss per sequence; without a factor it does not matter of what."""

    def read(values: Values) -> Ours:
        alpha = values["aux_loss_alpha"]
        return {"ffn.aux_loss_alpha": alpha, "ffn.seq_aux": values["seq_aux"] or not alpha}

    fields = same("ffn.", aux_loss_alpha=alpha, seq_aux=True)
    return Part(fields.defaults, read, fields.write)


def _weights(normalise: bool) -> Part:
    """Returns whether chosen weights are renormalised; the released code leaves the one of one expert as it is."""
    fields = same("ffn.", norm_topk_prob=normalise)

    def read(values: Values) -> Ours:
        return {"ffn.norm_topk_prob": values["norm_topk_prob"] and values["num_experts_per_tok"] > 1}

    return Part(fields.defaults, read, fields.write)


def _groups() -> Part:
    """Returns V2's choice of experts; greedily, groups have no meaning but to training."""

    def read(values: Values) -> Ours:
        method = values["topk_method"].replace("gready", "greedy")  # the remote code's spelling
        if method == "greedy":
            return {"ffn.topk_method": method}
        if method != "group_limited_greedy":
            raise UnsupportedError(f"topk_method is {method!r} but V2 has greedy and group_limited_greedy only")
        return {"ffn.topk_method": method, **{f"ffn.{key}": values[key] or 1 for key in ("n_group", "topk_group")}}

    fields = same("ffn.", topk_method="greedy", n_group=Null(int), topk_group=Null(int))
    return Part(fields.defaults, read, fields.write)


def _latent() -> Part:
    """Returns the epsilon of the latents' norms, which no config says: 1e-6 in all code of V2 and V3."""

    def read(values: Values) -> Ours:
        return {"attention.latent_norm_eps": None if values["rms_norm_eps"] == 1e-6 else 1e-6}

    return Part({}, read, lambda config: {})


def _key_heads() -> Part:
    """Returns the key heads, which latent attention has as many of as heads."""

    def read(values: Values) -> Ours:
        heads, keys = values["num_attention_heads"], values["num_key_value_heads"]
        if keys != heads:
            raise UnsupportedError(
                f"num_key_value_heads is {keys} but latent attention has num_attention_heads: {heads}"
            )
        return {"attention.num_attention_heads": heads}

    def write(config: ModelConfig) -> Values:
        return dict.fromkeys(("num_attention_heads", "num_key_value_heads"), config.attention.num_attention_heads)

    return Part({"num_key_value_heads": lambda values: values["num_attention_heads"]}, read, write)


def _latent_attention(heads: int) -> tuple[Part, ...]:
    sizes = same("attention.", kv_lora_rank=512, q_lora_rank=Null(int, 1536), qk_nope_head_dim=128, qk_rope_head_dim=64)
    more = same("attention.", v_head_dim=128, attention_bias=False, num_attention_heads=heads)
    return (sizes, more, _key_heads(), _latent(), derived("head_dim", "qk_head_dim"))


_PLAIN = only(hidden_act=("silu",), attention_dropout=(0.0,))

DEEPSEEK = Layout(
    "deepseek",
    "DeepseekForCausalLM",
    "mha",
    "moe",
    (
        same("", vocab_size=REQUIRED, hidden_size=REQUIRED, num_hidden_layers=REQUIRED, max_position_embeddings=2048),
        same("", rms_norm_eps=1e-6, tie_word_embeddings=False, initializer_range=0.02),
        heads(REQUIRED, said="never"),
        choice("attention.attention_bias", "attention_bias", False, {False: "none", True: "all"}),
        rope(kinds=()),
        same("ffn.", n_routed_experts=REQUIRED, num_experts_per_tok=REQUIRED, moe_intermediate_size=REQUIRED),
        _shared(Null(int), None),
        _layers(0, REQUIRED),
        _weights(False),
        _balance(0.001),
        _PLAIN,
        only(scoring_func=("softmax",)),
        only(written=False, topk_method=("greedy", "gready"), routed_scaling_factor=(1.0,)),
    ),
)

DEEPSEEK_V2 = Layout(
    "deepseek_v2",
    "DeepseekV2ForCausalLM",
    "mla",
    "moe",
    (
        same("", vocab_size=102400, hidden_size=4096, num_hidden_layers=32, max_position_embeddings=2048),
        same("", rms_norm_eps=1e-6, tie_word_embeddings=False, initializer_range=0.02),
        *_latent_attention(32),
        rope(kinds=("yarn",), deepseek=True),
        same("ffn.", n_routed_experts=64, num_experts_per_tok=REQUIRED, moe_intermediate_size=1407),
        same("ffn.", routed_scaling_factor=1.0),
        _shared(Null(int, 2), 0),
        _layers(0, 11008, leading=True),
        _groups(),
        _balance(0.001),
        _PLAIN,
        only(scoring_func=("softmax",), norm_topk_prob=(False,), mlp_bias=(False,)),
        whole_heads(),
    ),
    aliases={"num_experts": "n_routed_experts"},
)

DEEPSEEK_V3 = Layout(
    "deepseek_v3",
    "DeepseekV3ForCausalLM",
    "mla",
    "moe",
    (
        same("", vocab_size=129280, hidden_size=7168, num_hidden_layers=61, max_position_embeddings=4096),
        same("", rms_norm_eps=1e-6, tie_word_embeddings=False, initializer_range=0.02),
        *_latent_attention(128),
        rope(kinds=("yarn",), deepseek=True),
        same("ffn.", n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, norm_topk_prob=True),
        same("ffn.", routed_scaling_factor=2.5, n_group=8, topk_group=4),
        always({"ffn.scoring_func": "sigmoid", "ffn.topk_method": "noaux_tc", "ffn.bias_update_speed": 0.001}),
        _shared(Null(int, 1), 0),
        _layers(3, 18432, leading=True),
        _balance(0.0001),
        _PLAIN,
        only(scoring_func=("sigmoid",), topk_method=("noaux_tc",), rope_interleave=(True,)),
        Part({"num_nextn_predict_layers": 1}, lambda values: {}, lambda config: {"num_nextn_predict_layers": 0}),
    ),
    aliases={"num_local_experts": "n_routed_experts", "num_mtp_layers": "num_nextn_predict_layers"},
    extra_layers="num_nextn_predict_layers",
)

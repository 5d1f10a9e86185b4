"""Every model of the paper and its small families by name, with the settings they were (or are to be) trained with.

Sources: DeepSeekMoE (arXiv 2401.06066) sections 4.1, 5.1, 7.1 and Table 7; DeepSeek-V2 (arXiv 2405.04434); the released
DeepSeek-V3 config. Differs from the paper: at 2B it gives expert sizes as fractions of a standard FFN of 8/3
hidden_size, which is no integer; 3424 keeps the quarters whole and the printed 1.89B expert parameters.
"""

import re
from copy import deepcopy
from typing import Any, NamedTuple

from moekit.config.model import DenseConfig, MHAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, YarnConfig
from moekit.errors import ConfigError, nearest


class _Scale(NamedTuple):
    """One size at which the whole comparison of Tables 1 and 2 and its ablations is built."""

    layers: int
    hidden: int
    heads: int
    head_dim: int
    standard: int
    """Width of a standard FFN: a multiple of 4 close to 8/3 hidden."""
    vocab: int
    positions: int
    init: float


# The paper's 0.006 is for hidden 1280 and more. At hidden 96 to 192 it leaves the first blocks' outputs near zero, and
# hundreds of steps pass before they matter; 0.02 does not.
_SCALES = {
    "2b": _Scale(9, 1280, 10, 128, standard=3424, vocab=8192, positions=2048, init=0.006),
    "tiny": _Scale(4, 96, 3, 32, standard=256, vocab=4096, positions=256, init=0.02),
    "mini": _Scale(6, 192, 6, 32, standard=512, vocab=4096, positions=512, init=0.02),
}

# variant -> (shared experts, routed experts, chosen per token, one expert in standard FFNs)
_MOE_VARIANTS = {
    "hash": (0, 16, 1, 1),
    "switch": (0, 16, 1, 1),
    "gshard": (0, 16, 2, 1),
    "gshard-x1.2": (0, 16, 2, 1.2),
    "gshard-x1.5": (0, 16, 2, 1.5),
    "deepseekmoe": (1, 63, 7, 0.25),
    "deepseekmoe-m1": (1, 15, 1, 1),
    "deepseekmoe-m2": (1, 31, 3, 0.5),
    "deepseekmoe-shared0": (0, 64, 8, 0.25),
    "deepseekmoe-shared2": (2, 62, 6, 0.25),
    "deepseekmoe-shared4": (4, 60, 4, 0.25),
    "deepseekmoe-half": (1, 63, 3, 0.25),
}
# n always-on shared experts of standard width are one dense FFN of n times the width; x2 has the active compute of
# gshard and deepseekmoe
_DENSE_VARIANTS = {"dense": 1, "dense-x2": 2, "dense-x4": 4, "dense-x16": 16}


def _family(scale: _Scale) -> dict[str, ModelConfig]:
    """Returns all variants at one size: same depth, width, attention and vocabulary, only the FFN differs."""

    def width(size: float) -> int:
        # 1.2 and 1.5 apply to the nominal 8/3 hidden, like the parameter counts that the paper prints for them
        return int(scale.standard * size) if size * 4 in (1, 2, 4) else 4 * round(2 / 3 * scale.hidden * size)

    def model(ffn: DenseConfig | MoEConfig) -> ModelConfig:
        return ModelConfig(
            vocab_size=scale.vocab,
            hidden_size=scale.hidden,
            num_hidden_layers=scale.layers,
            max_position_embeddings=scale.positions,
            attention=_mha(scale.heads, scale.head_dim),
            ffn=ffn,
            initializer_range=scale.init,
        )

    family = {
        name: model(DenseConfig(intermediate_size=n * scale.standard, nominal_size=n))
        for name, n in _DENSE_VARIANTS.items()
    }
    for name, (shared, routed, chosen, size) in _MOE_VARIANTS.items():
        family[name] = model(
            MoEConfig(
                n_shared_experts=shared,
                n_routed_experts=routed,
                num_experts_per_tok=chosen,
                moe_intermediate_size=width(size),
                nominal_size=size,
                topk_method="hash" if name == "hash" else "greedy",
                aux_loss_alpha=0.0 if name == "hash" else 0.01,
            )
        )
    return family


def _mha(heads: int, head_dim: int = 128, kv_heads: int | None = None) -> MHAConfig:
    return MHAConfig(num_attention_heads=heads, num_key_value_heads=kv_heads or heads, head_dim=head_dim)


def _mla(heads: int, q_lora_rank: int | None, mscale: float) -> MLAConfig:
    yarn = YarnConfig(factor=40, original_max_position_embeddings=4096, mscale=mscale, mscale_all_dim=mscale)
    return MLAConfig(
        num_attention_heads=heads,
        kv_lora_rank=512,
        q_lora_rank=q_lora_rank,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope=RopeConfig(yarn=yarn),
    )


def _large(
    layers: int, hidden: int, attention: MHAConfig | MLAConfig, ffn: DenseConfig | MoEConfig, **rest: Any
) -> ModelConfig:
    return ModelConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        attention=attention,
        ffn=ffn,
        **{"vocab_size": 102400, "max_position_embeddings": 4096, **rest},
    )


def _experts(shared: int, routed: int, chosen: int, width: int, dense: int, k_dense: int = 1, **rest: Any) -> MoEConfig:
    return MoEConfig(
        n_shared_experts=shared,
        n_routed_experts=routed,
        num_experts_per_tok=chosen,
        moe_intermediate_size=width,
        intermediate_size=dense,
        first_k_dense_replace=k_dense,
        **rest,
    )


# the 145B comparison trains with each layer's experts on 4 devices, hence 4 groups; every group may be used
_ON_4_DEVICES: dict[str, Any] = {
    "n_group": 4,
    "topk_group": 4,
    "aux_loss_alpha": 0.003,
    "device_aux_loss_alpha": 0.05,
}

_LARGE = {
    # widths: the ratio of 8/3 hidden, rounded up to a multiple of 64; nominal_size where the paper's FLOPs ignore it
    "deepseekmoe-16b": _large(
        28, 2048, _mha(16), _experts(2, 64, 6, 1408, 10944, nominal_size=0.25, aux_loss_alpha=0.001)
    ),
    "deepseekmoe-145b": _large(62, 4096, _mha(32), _experts(4, 128, 12, 1408, 21888, **_ON_4_DEVICES)),
    "deepseekmoe-142b-half": _large(62, 4096, _mha(32), _experts(2, 128, 6, 1408, 10944, **_ON_4_DEVICES)),
    "gshard-137b": _large(62, 4096, _mha(32), _experts(0, 16, 2, 10944, 21888, nominal_size=1.0, **_ON_4_DEVICES)),
    "deepseek-7b": _large(30, 4096, _mha(32), DenseConfig(intermediate_size=11008, nominal_size=1.0)),
    "deepseek-67b": _large(95, 8192, _mha(64, kv_heads=8), DenseConfig(intermediate_size=22016, nominal_size=1.0)),
    "llama2-7b": _large(
        32,
        4096,
        _mha(32),
        DenseConfig(intermediate_size=11008, nominal_size=1.0),
        vocab_size=32000,
        rms_norm_eps=1e-5,
        initializer_range=0.02,
    ),
    "deepseek-v2-lite": _large(
        27,
        2048,
        _mla(16, None, 0.707),
        _experts(2, 64, 6, 1408, 10944, nominal_size=0.25, aux_loss_alpha=0.001),
        max_position_embeddings=163840,
    ),
    "deepseek-v2": _large(
        60,
        5120,
        _mla(128, 1536, 0.707),
        _experts(
            2,
            160,
            6,
            1536,
            12288,
            topk_method="group_limited_greedy",
            n_group=8,
            topk_group=3,
            routed_scaling_factor=16.0,
            aux_loss_alpha=0.003,
            device_aux_loss_alpha=0.05,
            comm_aux_loss_alpha=0.02,
        ),
        max_position_embeddings=163840,
    ),
    "deepseek-v3": _large(
        61,
        7168,
        _mla(128, 1536, 1.0),
        _experts(
            1,
            256,
            8,
            2048,
            18432,
            k_dense=3,
            scoring_func="sigmoid",
            topk_method="noaux_tc",
            n_group=8,
            topk_group=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
            aux_loss_alpha=0.0001,
            bias_update_speed=0.001,
        ),
        vocab_size=129280,
        max_position_embeddings=163840,
    ),
}

MODELS: dict[str, ModelConfig] = {
    **{re.sub(r"^(\w+)", r"\1-2b", variant): config for variant, config in _family(_SCALES["2b"]).items()},
    **_LARGE,
    **{f"{size}-{variant}": config for size in ("tiny", "mini") for variant, config in _family(_SCALES[size]).items()},
}


def _recipe(
    length: int, batch: int, lr: float, steps: int, warmup: int, every: int, kind: str = "step"
) -> dict[str, Any]:
    return {
        "data": {"sequence_length": length, "batch_size": batch},
        "optimizer": {"kind": "adamw", "lr": lr},
        "schedule": {"kind": kind, "warmup_steps": warmup},
        "steps": steps,
        "eval_every": every,
        "save_every": every,
    }


_RECIPES = {
    "tiny": _recipe(256, 16, 3e-3, 300, 30, 60) | {"eval_tokens": 8192},
    "mini": _recipe(256, 16, 1.5e-3, 2400, 100, 200),
    "2b": _recipe(2048, 2048, 1.08e-3, 25_000, 2000, 500),
    "16b": _recipe(4096, 4608, 4.2e-4, 106_449, 2000, 1000),
    "145b": _recipe(4096, 4608, 3.0e-4, 13_000, 2000, 500, "constant"),
}


def preset_names() -> list[str]:
    """Returns the names of all presets, the paper's 2B comparison first."""
    return list(MODELS)


def preset(name: str) -> ModelConfig:
    """Returns the model called `name`; `preset_names()` and `moekit presets` list them."""
    if name not in MODELS:
        raise ConfigError(f"there is no preset {name!r}{nearest(name, MODELS)}; `moekit presets` lists them")
    return MODELS[name]


def recipe(name: str) -> dict[str, Any]:
    """Returns the training settings for a preset: a run's tree without `model` and `data.path`.

    Models of the 140B comparison share one recipe. The paper gives none for the models that it only compares with;
    they start from the 16B one.
    """
    preset(name)
    parts = name.split("-")
    if parts[0] in ("tiny", "mini"):
        family = parts[0]
    elif "2b" in parts:
        family = "2b"
    else:
        family = "145b" if parts[1] in ("145b", "142b", "137b", "67b") else "16b"
    return deepcopy(_RECIPES[family])


def summary(config: ModelConfig) -> str:
    """Returns one line on a model's shape, for a list of presets."""
    ffn, attention = config.ffn, config.attention.kind.upper()
    shape = f"{config.num_hidden_layers} layers of {config.hidden_size}, {attention}"
    if ffn.kind == "dense":
        return f"{shape}; dense FFN of width {ffn.intermediate_size}"
    chosen = f"{ffn.num_experts_per_tok} of {ffn.n_routed_experts} experts of width {ffn.moe_intermediate_size}"
    shared = f" + {ffn.n_shared_experts} shared" if ffn.n_shared_experts else ""
    return f"{shape}; {chosen}{shared}{', chosen by a hash' if ffn.topk_method == 'hash' else ''}"

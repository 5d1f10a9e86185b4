"""config.json both ways: real defaults, nothing unknown, nothing that would be another model there."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moekit
from moekit.config import MLAConfig, ModelConfig, MoEConfig
from moekit.errors import CheckpointError, ConfigError, MoekitError, UnsupportedError
from moekit.formats.checkpoint import load_config
from moekit.formats.layouts import LAYOUTS
from moekit.formats.layouts.parts import placement
from moekit.formats.layouts.tensors import disk
from moekit.nn.quantized import quantize_

Make = Callable[..., ModelConfig]

COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
}
QWEN = {**COMMON, "bos_token_id": 151643, "eos_token_id": 151645, "use_sliding_window": False, "vocab_size": 151936}
RELEASED: dict[str, tuple[int, dict[str, Any]]] = {
    "Mixtral-8x7B-v0.1": (
        46_702_792_704,
        {
            **COMMON,
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.02,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
    ),
    "OLMoE-1B-7B-0924": (
        6_919_161_856,
        {
            **COMMON,
            "model_type": "olmoe",
            "attention_bias": False,
            "clip_qkv": None,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 16,
            "num_key_value_heads": 16,
            "output_router_logits": False,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
            "vocab_size": 50304,
        },
    ),
    "Qwen3-30B-A3B": (
        30_532_122_624,
        {
            **QWEN,
            "model_type": "qwen3_moe",
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
            "tie_word_embeddings": False,
        },
    ),
    "Qwen1.5-MoE-A2.7B": (
        14_315_784_192,
        {
            **QWEN,
            "model_type": "qwen2_moe",
            "decoder_sparse_step": 1,
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "max_position_embeddings": 8192,
            "max_window_layers": 21,
            "moe_intermediate_size": 1408,
            "norm_topk_prob": False,
            "num_attention_heads": 16,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "num_hidden_layers": 24,
            "num_key_value_heads": 16,
            "output_router_logits": False,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "router_aux_loss_coef": 0.001,
            "shared_expert_intermediate_size": 5632,
            "sliding_window": 32768,
            "tie_word_embeddings": False,
        },
    ),
    "Llama-3.2-1B": (
        1_235_814_400,
        {
            **COMMON,
            "model_type": "llama",
            "attention_bias": False,
            "head_dim": 64,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
    ),
    "Qwen3-0.6B": (
        596_049_920,
        {
            **QWEN,
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "max_window_layers": 28,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
        },
    ),
    "Qwen2-0.5B": (
        494_032_768,
        {
            **QWEN,
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "max_position_embeddings": 131072,
            "max_window_layers": 24,
            "num_attention_heads": 14,
            "num_hidden_layers": 24,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "sliding_window": 131072,
            "tie_word_embeddings": True,
        },
    ),
}
SMALL: dict[str, dict[str, Any]] = {
    "deepseek": {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 12,
        "intermediate_size": 20,
    },
    "deepseek_v2": {"num_experts_per_tok": 6},
    **{name: {} for name in LAYOUTS if name not in ("deepseek", "deepseek_v2")},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def read(layout: str, **changes: Any) -> ModelConfig:
    return LAYOUTS[layout].read({"model_type": layout, **SMALL[layout], **changes})


def refusal(layout: str, kind: type[MoekitError], **changes: Any) -> str:
    with pytest.raises(kind) as caught:
        read(layout, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("count", "content"), RELEASED.values(), ids=RELEASED.keys())
def test_a_released_config_is_read_whole_and_has_the_published_parameters(count: int, content: dict[str, Any]) -> None:
    layout = LAYOUTS[content["model_type"]]
    config = layout.read(content)
    assert config.num_parameters == count
    told = layout.write(config)
    unused = {"intermediate_size"} if content["model_type"] in ("qwen2_moe", "qwen3_moe") else set()  # none is dense
    kept = content.keys() & told.keys() - {"sliding_window", "rope_scaling"} - unused
    assert {key: told[key] for key in kept} == {key: content[key] for key in kept}
    assert layout.read(told) == config


@pytest.mark.parametrize(
    ("layout", "ours"),
    [
        ("deepseek", {"aux_loss_alpha": 0.001, "seq_aux": True}),
        ("deepseek_v2", {"aux_loss_alpha": 0.001, "seq_aux": True}),
        ("deepseek_v3", {"aux_loss_alpha": 0.0001, "seq_aux": True, "bias_update_speed": 0.001}),
        ("qwen2_moe", {"aux_loss_alpha": 0.001 * 4 / 24, "seq_aux": False}),
        ("qwen3_moe", {"aux_loss_alpha": 0.001 * 8 / 24, "seq_aux": False}),
        ("olmoe", {"aux_loss_alpha": 0.01 * 8 / 16, "seq_aux": False}),
        ("mixtral", {"aux_loss_alpha": 0.001 * 2 / 32, "seq_aux": False}),
    ],
)
def test_what_training_needs_and_a_config_omits_is_never_a_silent_zero(layout: str, ours: dict[str, Any]) -> None:
    found = read(layout).ffn.model_dump()
    assert {key: found[key] for key in ours} == ours


def test_a_factor_of_zero_that_is_given_stays_zero() -> None:
    for layout, key in (("deepseek_v3", "aux_loss_alpha"), ("olmoe", "router_aux_loss_coef")):
        ffn = read(layout, **{key: 0.0}).ffn
        assert isinstance(ffn, MoEConfig)
        assert (ffn.aux_loss_alpha, ffn.seq_aux) == (0.0, True)


def test_v1_takes_its_remote_codes_defaults_but_never_a_size() -> None:
    config = read("deepseek")
    assert config.model_dump(exclude={"attention", "ffn"}) == {
        "vocab_size": 61,
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "initializer_range": 0.02,
        "causal": True,
        "num_labels": None,
    }
    assert config.attention.model_dump() == {
        "kind": "mha",
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 6,
        "attention_bias": "none",
        "qk_norm": "none",
        "rope": {"theta": 10000.0, "yarn": None, "llama3": None},
    }
    ffn = config.ffn
    assert isinstance(ffn, MoEConfig)
    assert (ffn.n_shared_experts, ffn.first_k_dense_replace, ffn.moe_layer_freq) == (0, 0, 1)
    assert (ffn.norm_topk_prob, ffn.scoring_func, ffn.routed_scaling_factor) == (False, "softmax", 1.0)
    for key in SMALL["deepseek"]:
        content = {name: value for name, value in SMALL["deepseek"].items() if name != key}
        with pytest.raises(CheckpointError, match=f"^{key} is missing, and model_type deepseek has no default for it$"):
            LAYOUTS["deepseek"].read(content)


def test_latents_are_normalised_with_the_epsilon_of_the_code_whatever_the_config_says() -> None:
    for epsilon, expected in ((1e-6, None), (1e-5, 1e-6)):
        attention = read("deepseek_v3", rms_norm_eps=epsilon).attention
        assert isinstance(attention, MLAConfig)
        assert attention.latent_norm_eps == expected


@every_layout
def test_an_unknown_field_is_an_error_that_names_it_and_a_harmless_one_is_not(layout: str) -> None:
    assert read(layout, _name_or_path="x", auto_map={}, temperature=0.3) == read(layout)
    said = refusal(layout, UnsupportedError, hiden_size=9, logit_scale=2.0)
    assert said.startswith(
        f"hiden_size is 9 (and 1 more) and not known of model_type {layout} (did you mean hidden_size?)"
    )
    assert "logit_scale is None" in refusal(layout, UnsupportedError, logit_scale=None)


@pytest.mark.parametrize(
    ("layout", "changes", "said"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu' but moekit computes 'silu' only"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True but moekit computes False only"),
        ("qwen3", {"attention_dropout": 0.1}, "attention_dropout is 0.1 but moekit computes 0.0 only"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv is 8.0 but moekit computes None only"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise is 0.1"),
        ("deepseek", {"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid' but moekit computes 'softmax' only"),
        ("deepseek", {"routed_scaling_factor": 2.0}, "routed_scaling_factor is 2.0"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob is True"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func is 'softmax'"),
        ("deepseek_v3", {"topk_method": "greedy"}, "topk_method is 'greedy'"),
        ("deepseek_v3", {"rope_interleave": False}, "rope_interleave is False"),
        (
            "deepseek_v3",
            {"num_key_value_heads": 64},
            "num_key_value_heads is 64 but latent attention has num",
        ),
        ("mixtral", {"sliding_window": 4096}, "sliding_window is 4096 tokens but moekit's attention sees all"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 4096}, "sliding_window is 4096 tokens"),
        ("qwen2_moe", {"use_sliding_window": True}, "sliding_window is 4096 tokens"),
        ("qwen2", {"use_sliding_window": True}, "sliding_window is 4096 tokens"),
        ("qwen3", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "sliding_window is 4096 tokens"),
        ("qwen3", {"layer_types": ["chunked_attention"] * 32}, "layer_types is "),
        ("qwen3", {"layer_types": ["full_attention"]}, "layer_types is ['full_attention']"),
    ],
)
def test_what_moekit_does_not_compute_is_refused(layout: str, changes: dict[str, Any], said: str) -> None:
    assert refusal(layout, UnsupportedError, **changes).startswith(said)


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("mixtral", {"sliding_window": 131072}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 32768}),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": None}),
        ("qwen3_moe", {"use_sliding_window": False, "sliding_window": 16}),
        ("qwen2_moe", {"use_sliding_window": True, "max_window_layers": 0}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 32}),
        ("qwen2", {"use_sliding_window": True, "layer_types": ["full_attention"] * 32}),
        ("deepseek", {"topk_method": "gready", "routed_scaling_factor": 1.0, "n_shared_experts": None}),
    ],
)
def test_a_setting_that_has_no_effect_is_no_reason(layout: str, changes: dict[str, Any]) -> None:
    assert read(layout, **changes) == read(layout)


@pytest.mark.parametrize(
    ("layout", "changes", "said"),
    [
        ("llama", {"hidden_size": "4096"}, "hidden_size is '4096' but must be of type int"),
        ("llama", {"hidden_size": None}, "hidden_size is None but must be of type int"),
        ("llama", {"hidden_size": True}, "hidden_size is True but must be of type int"),
        ("llama", {"hidden_size": 2**40}, f"hidden_size is {2**40} but must be"),
        ("llama", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000 but at most 4096 are read"),
        ("llama", {"num_attention_heads": 0}, "model.attention.num_attention_heads is 0 but must be greater than 0"),
        ("llama", {"num_key_value_heads": 5}, "model.attention.num_key_value_heads is 5 but must divide"),
        ("qwen3_moe", {"norm_topk_prob": 1}, "norm_topk_prob is 1 but must be of type bool"),
        ("qwen3_moe", {"mlp_only_layers": 3}, "mlp_only_layers is 3 but must be of type list or null"),
        ("qwen3_moe", {"mlp_only_layers": list(range(24))}, "so no layer is MoE"),
        ("qwen3_moe", {"num_experts": 8, "num_local_experts": 9}, "num_local_experts is 9 but num_experts, the same"),
        ("qwen3_moe", {"num_experts_per_tok": 129}, "model.ffn.num_experts_per_tok is 129 but n_routed_experts is 128"),
        ("mixtral", {"num_experts_per_tok": 1}, "model.ffn.norm_topk_prob is true but takes effect only with"),
        ("deepseek_v3", {"topk_group": 9}, "model.ffn.topk_group is 9 but n_group is 8"),
    ],
)
def test_what_cannot_be_is_an_error_of_one_line(layout: str, changes: dict[str, Any], said: str) -> None:
    assert said in refusal(layout, CheckpointError, **changes)


def test_null_stands_for_what_is_derived() -> None:
    assert read("llama", num_key_value_heads=None, head_dim=None) == read("llama")
    assert read("deepseek", num_key_value_heads=None) == read("deepseek")
    assert read("mixtral", num_key_value_heads=None).attention == read("mixtral", num_key_value_heads=32).attention
    assert read("deepseek_v2", q_lora_rank=None).attention.model_dump()["q_lora_rank"] is None


V3 = {"kind": "mla"}, {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


@pytest.mark.parametrize(
    ("layout", "attention", "ffn", "said"),
    [
        ("llama", {}, {}, "layout llama has ffn.kind dense, this model moe"),
        ("olmoe", {}, {"kind": "dense"}, "layout olmoe has ffn.kind moe, this model dense"),
        ("mixtral", {"kind": "mla"}, {}, "layout mixtral has attention.kind mha, this model mla"),
        ("deepseek", {"qk_norm": "head"}, {}, "cannot say attention.qk_norm 'head': there it would be 'none'"),
        (
            "deepseek",
            {"attention_bias": "qkv"},
            {},
            "cannot say attention.attention_bias 'qkv': there it would be 'none'",
        ),
        ("deepseek", {"head_dim": 8}, {}, "cannot say attention.head_dim 8: there it would be 6"),
        ("deepseek", {}, {"scoring_func": "sigmoid"}, "cannot say ffn.scoring_func 'sigmoid'"),
        ("deepseek", {}, {"topk_method": "hash"}, "cannot say ffn.topk_method 'hash': there it would be 'greedy'"),
        ("deepseek", {}, {"topk_method": "noaux_tc"}, "cannot say ffn.topk_method 'noaux_tc'"),
        ("deepseek", {}, {"routed_scaling_factor": 2.0}, "cannot say ffn.routed_scaling_factor 2.0"),
        ("deepseek", {}, {"shared_expert_gate": True}, "cannot say ffn.shared_expert_gate True"),
        (
            "deepseek",
            {},
            {"shared_expert_intermediate_size": 13},
            "cannot say ffn.shared_width 13: there it would be 10",
        ),
        (
            "deepseek",
            {},
            {"mlp_only_layers": [2], "intermediate_size": 9},
            "cannot say ffn.moe_layers [0, 1]: there it would be [0, 1, 2]",
        ),
        ("qwen2_moe", {"attention_bias": "qkv"}, {"n_shared_experts": 0}, "has a shared expert, this model none"),
        ("qwen2_moe", {"attention_bias": "qkv"}, {}, "cannot say ffn.shared_expert_gate False: there it would be True"),
        ("qwen3_moe", {"qk_norm": "head"}, {}, "cannot say ffn.shared_width 10: there it would be 0"),
        ("qwen3_moe", {"qk_norm": "full"}, {"n_shared_experts": 0}, "cannot say attention.qk_norm 'full'"),
        ("mixtral", {}, {"n_shared_experts": 0}, "cannot say ffn.norm_topk_prob False: there it would be True"),
        ("olmoe", {"qk_norm": "full"}, {"n_shared_experts": 0, "first_k_dense_replace": 1}, "cannot say ffn."),
        ("deepseek_v2", {"kind": "mla"}, {"norm_topk_prob": True}, "cannot say ffn.norm_topk_prob True"),
        ("deepseek_v2", *V3, "layout deepseek_v2 cannot hold this model: topk_method is 'noaux_tc' but"),
        ("deepseek_v2", {"kind": "mla", "num_attention_heads": 5}, {}, "hidden_size is 24, num_attention_heads 5, but"),
        (
            "deepseek_v2",
            {"kind": "mla", "latent_norm_eps": 1e-4},
            {},
            "cannot say attention.latent_norm_eps 0.0001: there it would be 1e-06",
        ),
        ("deepseek_v3", {"kind": "mla"}, {}, "cannot say ffn.scoring_func 'softmax': there it would be 'sigmoid'"),
        (
            "deepseek_v3",
            {"kind": "mla", "rope": {"llama3": {"factor": 2.0, "original_max_position_embeddings": 32}}},
            V3[1],
            "rope_type is 'llama3' but moekit computes default, yarn only",
        ),
        (
            "deepseek",
            {"rope": {"yarn": {"factor": 2.0, "original_max_position_embeddings": 32}}},
            {},
            "rope_type is 'yarn' but",
        ),
        (
            "qwen3_moe",
            {
                "qk_norm": "head",
                "rope": {"yarn": {"factor": 2.0, "original_max_position_embeddings": 32, "mscale_all_dim": 1.0}},
            },
            {"n_shared_experts": 0},
            "cannot say attention.rope.yarn.mscale 1.0: there it would be 0.0",
        ),
    ],
)
def test_a_layout_is_not_written_where_it_would_be_another_model(
    tiny_config: Make, tmp_path: Path, layout: str, attention: dict[str, Any], ffn: dict[str, Any], said: str
) -> None:
    dense = {} if ffn.get("kind") == "dense" or not ffn.get("first_k_dense_replace") else {"intermediate_size": 9}
    config = tiny_config(hidden_size=24, num_hidden_layers=3, attention=attention, ffn={**ffn, **dense})
    with pytest.raises(UnsupportedError) as caught:
        moekit.save(moekit.Model(config), tmp_path / "m", layout=layout)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_written_as_another_type_only_when_that_is_asked_for(tiny_config: Make, tmp_path: Path) -> None:
    model = moekit.Model(tiny_config(hidden_size=24))
    moekit.save(model, tmp_path / "plain")
    receipt = moekit.save(model, tmp_path / "v1", layout="deepseek")
    told = {name: json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "v1")}
    assert (told["plain"]["model_type"], told["v1"]["model_type"]) == ("moekit", "deepseek")
    assert told["v1"]["architectures"] == ["DeepseekForCausalLM"]
    assert told["v1"]["eos_token_id"] is None  # a reader's default would be some other token
    assert receipt["config"]["layout"] == "deepseek"
    assert load_config(tmp_path / "v1") == load_config(tmp_path / "plain") == model.config
    with pytest.raises(ConfigError, match=r"layout is 'deepseek_v1' \(did you mean deepseek"):
        moekit.save(model, tmp_path / "x", layout="deepseek_v1")
    quantize_(model, "int8")
    with pytest.raises(UnsupportedError, match="layout deepseek has no int8 codes"):
        moekit.save(model, tmp_path / "x", layout="deepseek")


def test_what_is_kept_beside_a_layouts_fields_cannot_contradict_them(tiny_config: Make) -> None:
    layout = LAYOUTS["deepseek"]
    content = layout.write(tiny_config(hidden_size=24, ffn={"z_loss_alpha": 0.5, "n_group": 7, "topk_group": 7}))
    assert content["moekit"] == {"ffn": {"n_group": 7, "topk_group": 7, "z_loss_alpha": 0.5}}
    for extra, said in (
        ({"ffn": {"norm_topk_prob": True}}, "moekit says ffn.norm_topk_prob True but the fields of deepseek say False"),
        ({"ffn": {"num_experts_per_tok": 2}}, "moekit says ffn.num_experts_per_tok 2"),
        ({"ffn": {"moe_layer_freq": 2}}, "intermediate_size is missing"),
        ({"ffn": {"z_los_alpha": 2}}, "moekit has ffn.z_los_alpha, no setting of this model (did you mean ffn.z_loss"),
        ({"ffn": {"z_loss_alpha": -1.0}}, "z_loss_alpha is -1.0 but must be greater"),
        ([], "moekit has moekit, no setting"),
    ):
        with pytest.raises(CheckpointError) as caught:
            layout.read({**content, "moekit": extra})
        assert said in str(caught.value)


@pytest.mark.parametrize(
    ("moe", "layers", "expected"),
    [
        ([0, 1, 2], 3, (0, 1, ())),
        ([2, 3, 4], 5, (2, 1, ())),
        ([0, 2, 4], 6, (0, 2, ())),
        ([4, 6, 8], 9, (3, 2, ())),
        ([1, 3, 5], 6, (0, 1, (0, 2, 4))),
        ([0, 1, 3], 4, (0, 1, (2,))),
        ([3], 4, (3, 1, ())),
        ([1], 4, (0, 1, (0, 2, 3))),
    ],
)
def test_places_of_moe_layers_are_said_in_the_shortest_way(
    moe: list[int], layers: int, expected: tuple[int, int, tuple[int, ...]]
) -> None:
    keys = ("first_k_dense_replace", "moe_layer_freq", "mlp_only_layers")
    found = placement(moe, layers)
    defaults = dict(zip(keys, (0, 1, ()), strict=True))
    said = {key: found.get(f"ffn.{key}", default) for key, default in defaults.items()}
    assert tuple(said.values()) == expected
    sizes = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 4}
    wide = {"intermediate_size": 5} if len(moe) < layers else {}
    ffn = MoEConfig.model_validate({**sizes, **said, **wide})
    attention = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}
    tree = {"vocab_size": 5, "hidden_size": 2, "num_hidden_layers": layers, "attention": attention, "ffn": ffn}
    assert ModelConfig.model_validate(tree).moe_layers == moe


@every_layout
def test_no_value_of_any_field_is_more_than_an_error_of_one_line(layout: str) -> None:
    alien: list[Any] = [None, True, 0, 1, -1, 3.5, float("nan"), float("inf"), "x", [], [1], {}, {"a": 1}, 10**12]
    ropes = [{"type": ["yarn"]}, {"type": "yarn", "factor": "4"}, {"type": "yarn", "factor": 4.0, "mscale": -9.0}]
    known = {key: default for part in LAYOUTS[layout].parts for key, default in part.defaults.items()}
    content = {"model_type": layout, **SMALL[layout]}
    content |= {key: known[key] for key in known.keys() - content.keys() if isinstance(known[key], str | int | float)}
    said, read = [], 0
    for key in [*content, *known, "moekit", "quantization_config", "zzz"]:
        for value in [*alien, *(ropes if "rope" in key else [])]:
            changed = copy.deepcopy(content) | {key: value}
            try:
                LAYOUTS[layout].read(changed)
                disk(LAYOUTS[layout], changed)
                read += 1
            except MoekitError as error:
                said.append(str(error))
    assert not any("\n" in line for line in said)
    assert read > len(content)  # each field's own value, at least


def test_a_config_of_another_library_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_act": "gelu"}))
    with pytest.raises(UnsupportedError, match=r"config\.json: hidden_act is 'gelu'"):
        moekit.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek"}))
    with pytest.raises(CheckpointError, match=r"config\.json: vocab_size is missing"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": ["llama"]}))
    with pytest.raises(CheckpointError, match="has no manifest"):
        moekit.load(tmp_path)


def test_an_own_directory_without_a_manifest_is_still_refused(tiny_config: Make, tmp_path: Path) -> None:
    moekit.save(moekit.Model(tiny_config()), tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="has no manifest"):
        moekit.load(tmp_path / "m")


def test_a_layouts_directory_with_a_manifest_is_checked_against_it(tiny_config: Make, tmp_path: Path) -> None:
    moekit.save(moekit.Model(tiny_config(hidden_size=24)), tmp_path / "m", layout="deepseek")
    weights = tmp_path / "m" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(CheckpointError, match="has changed since it was written"):
        moekit.load(tmp_path / "m")
    (tmp_path / "m" / "manifest.json").unlink()
    assert isinstance(moekit.load(tmp_path / "m"), torch.nn.Module)

"""Strict types and the settings that cannot take effect."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from moekit.config import MHAConfig, MLAConfig, ModelConfig, MoEConfig, RopeConfig, dump, load_model_config, preset
from moekit.errors import ConfigError


def _refused(**changes: Any) -> str:
    """Returns what is said about tiny-deepseekmoe with these keys of its FFN changed."""
    with pytest.raises(ConfigError) as error:
        load_model_config("tiny-deepseekmoe", {f"model.ffn.{key}": str(value) for key, value in changes.items()})
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_experts_per_tok": 64}, "model.ffn.num_experts_per_tok is 64 but n_routed_experts is 63"),
        ({"n_group": 4}, "n_group is 4 but must divide n_routed_experts, 63"),
        ({"n_group": 7, "topk_group": 8}, "topk_group is 8 but n_group is 7"),
        ({"n_group": 7, "topk_group": 3}, "topk_group is 3 but topk_method greedy uses all of n_group, 7"),
        ({"bias_update_speed": 0.001}, "bias_update_speed is 0.001 but takes effect only with topk_method noaux_tc"),
        ({"topk_method": "hash"}, "aux_loss_alpha is 0.01 but takes effect only with a router, and topk_method hash"),
        (
            {"topk_method": "hash", "aux_loss_alpha": 0, "scoring_func": "sigmoid"},
            "scoring_func is sigmoid but takes effect only with a router",
        ),
        (
            {"topk_method": "hash", "aux_loss_alpha": 0, "n_group": 3, "topk_group": 3},
            "n_group is 3 but takes effect only with a router",
        ),
        ({"hash_method": "balanced"}, "hash_method is balanced but takes effect only with topk_method hash"),
        ({"global_aux": "true"}, "global_aux is true but takes effect only with seq_aux false"),
        ({"device_aux_loss_alpha": 0.05}, "device_aux_loss_alpha is 0.05 but takes effect only with n_group above 1"),
        ({"seq_aux": "false", "aux_loss_alpha": 0}, "seq_aux is false but takes effect only with aux_loss_alpha"),
        (
            {"seq_aux": "false", "aux_loss_alpha": 0, "z_loss_alpha": 0.1},
            "seq_aux is false but takes effect only with aux",
        ),
        (
            {"num_experts_per_tok": 1, "norm_topk_prob": "true"},
            "norm_topk_prob is true but takes effect only with num_experts_per_tok above 1",
        ),
        ({"drop_policy": "score"}, "drop_policy is score but takes effect only with a capacity_factor"),
        ({"intermediate_size": 256}, "intermediate_size is 256 but takes effect only with dense layers"),
        ({"first_k_dense_replace": 1}, "intermediate_size is missing"),
        ({"first_k_dense_replace": 4, "intermediate_size": 256}, "so no layer is MoE"),
        ({"mlp_only_layers": "[1]"}, "intermediate_size is missing"),
        ({"mlp_only_layers": "[9]", "intermediate_size": 9}, "mlp_only_layers has 9 but takes effect only on a layer"),
        ({"mlp_only_layers": "[-1]", "intermediate_size": 9}, "mlp_only_layers has -1 but"),
        ({"mlp_only_layers": "[1, 1]", "intermediate_size": 9}, "mlp_only_layers has 1 but"),
        ({"mlp_only_layers": "[1]", "moe_layer_freq": 2, "intermediate_size": 9}, "mlp_only_layers has 1 but"),
        ({"mlp_only_layers": "[0, 1, 2, 3]", "intermediate_size": 9}, "so no layer is MoE"),
        ({"n_shared_experts": 0, "shared_expert_gate": "true"}, "shared_expert_gate is true but takes effect only"),
        (
            {"n_shared_experts": 0, "shared_expert_intermediate_size": 9},
            "shared_expert_intermediate_size is 9 but takes effect only with n_shared_experts above 0",
        ),
        ({"capacity_factor": -1}, "capacity_factor is -1 but must be greater than 0"),
        ({"aux_loss_alpha": ".inf"}, "must be a finite number"),
    ],
)
def test_a_setting_that_cannot_take_effect_is_refused(changes: dict[str, Any], said: str) -> None:
    assert said in _refused(**changes)


def test_settings_near_those_that_are_refused_are_accepted() -> None:
    sizes = {"num_experts_per_tok": 1, "moe_intermediate_size": 8}
    assert MoEConfig(n_routed_experts=1, norm_topk_prob=True, **sizes).norm_topk_prob
    groups = {"n_routed_experts": 4, "n_group": 2, "topk_group": 2, "seq_aux": False}
    for name in ("aux_loss_alpha", "device_aux_loss_alpha", "comm_aux_loss_alpha"):
        assert not MoEConfig.model_validate({**sizes, **groups, name: 0.1}).seq_aux


def test_heads_must_fit() -> None:
    with pytest.raises(ValidationError, match="must divide num_attention_heads, 10"):
        MHAConfig(num_attention_heads=10, num_key_value_heads=3, head_dim=8)
    with pytest.raises(ValidationError, match="multiple of 2"):
        MHAConfig(num_attention_heads=2, num_key_value_heads=1, head_dim=7)
    with pytest.raises(ValidationError, match=r"qk_rope_head_dim\n.*multiple of 2"):
        MLAConfig(num_attention_heads=2, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=5, v_head_dim=4)


def test_a_config_is_frozen_and_moe_and_mha_need_not_name_their_kind() -> None:
    config = preset("tiny-deepseekmoe")
    with pytest.raises(ValidationError, match="frozen"):
        config.hidden_size = 1  # type: ignore[misc]
    tree = config.model_dump()
    del tree["attention"]["kind"], tree["ffn"]["kind"]
    assert ModelConfig.model_validate(tree) == config
    assert "kind" not in tree["ffn"]


def test_moe_layers_follow_the_rule_of_the_released_code() -> None:
    config = preset("deepseekmoe-16b")
    assert config.moe_layers == list(range(1, 28))
    assert isinstance(config.ffn, MoEConfig)
    ffn = config.ffn.model_copy(update={"first_k_dense_replace": 3, "moe_layer_freq": 2})
    assert config.model_copy(update={"ffn": ffn, "num_hidden_layers": 9}).moe_layers == [4, 6, 8]


def test_mlp_only_layers_are_dense_as_well(tmp_path: Path) -> None:
    given = {"model.ffn.mlp_only_layers": "[2]", "model.ffn.intermediate_size": "9", "model.ffn.moe_layer_freq": "2"}
    config = load_model_config("tiny-deepseekmoe", {**given, "model.num_hidden_layers": "7"})
    assert config.moe_layers == [0, 4, 6]
    (tmp_path / "m.yaml").write_text(dump(config, comments=True))
    assert load_model_config(tmp_path / "m.yaml") == config
    assert len({config, config.model_copy()}) == 1  # hashable like any other


def test_one_context_extension_at_most_and_in_order() -> None:
    scale = {"factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(ValidationError, match="llama3 is given and so is yarn"):
        RopeConfig.model_validate({"yarn": scale, "llama3": scale})
    with pytest.raises(ValidationError, match=r"low_freq_factor is 4\.0 but high_freq_factor is 4\.0"):
        RopeConfig.model_validate({"llama3": {**scale, "low_freq_factor": 4.0}})


def test_the_configuration_imports_no_torch() -> None:
    code = "import sys, moekit.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0

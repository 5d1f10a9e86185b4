"""What llama.cpp would compute as another model is not written, and the reason is said."""

import re
from collections.abc import Callable
from typing import Any

import pytest

from moekit.config import MHAConfig, ModelConfig
from moekit.errors import UnsupportedError
from moekit.formats.gguf.architecture import keys

MHA = {"kind": "mha", "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 6}  # as wide as the model, 18
MLA = {"kind": "mla", "q_lora_rank": 8}
HASH = {"topk_method": "hash", "scoring_func": "softmax"}
EVERY_OTHER = {"moe_layer_freq": 2, "intermediate_size": 20}
LIMITED = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 4, "topk_group": 2}
MIXTURE = {"norm_topk_prob": True, "n_shared_experts": 0}


def yarn(**values: float) -> dict[str, Any]:
    scaling = {"factor": 4.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}
    return {"rope": {"yarn": {**scaling, **values}}}


@pytest.mark.parametrize(
    ("attention", "ffn", "rest", "reason"),
    [
        (MHA, {"norm_topk_prob": True}, {}, "deepseek takes weights that are not renormalised and ignores the key"),
        (MHA, {"scoring_func": "sigmoid"}, {}, "deepseek takes softmax scores; this model has scoring_func sigmoid"),
        (MHA, {"topk_method": "noaux_tc"}, {}, "deepseek takes routers without a selection bias"),
        (MHA, {"n_shared_experts": 0}, {}, "deepseek takes shared experts; this model has n_shared_experts 0"),
        (MHA, HASH, {}, "deepseek takes a router; this model has topk_method hash"),
        (MHA, EVERY_OTHER, {"num_hidden_layers": 4}, "this model has moe_layer_freq 2"),
        ({**MHA, "head_dim": 8}, {}, {}, "heads that are together as wide as the model; this model has 24 and 18"),
        (MHA, {**LIMITED, "topk_method": "group_limited_greedy"}, {}, "groups scored by the sum of their two best"),
        (MLA, {**LIMITED, "topk_method": "group_limited_greedy"}, {}, "groups scored by the sum of their two best"),
        (MLA, {"n_shared_experts": 0}, {}, "deepseek2 takes shared experts"),
        (MLA, {"n_routed_experts": 1025}, {}, "at most 1024 experts; this model has n_routed_experts 1025"),
        (MLA, {}, {"num_hidden_layers": 27}, "takes 27 layers for a V2-Lite, which has no q_lora_rank"),
        (MLA, {}, {"num_hidden_layers": 26}, "takes 26 layers for a V2-Lite, which has no q_lora_rank"),
        (
            {**MLA, **yarn(mscale=0.5)},
            {},
            {},
            "takes mscale and mscale_all_dim alike, above 0; this model has 0.5 and 1",
        ),
        ({**MLA, **yarn(mscale_all_dim=0.0)}, {}, {}, "alike, above 0; this model has 1 and 0"),
        ({**MHA, **yarn(beta_fast=16.0)}, {}, {}, "takes beta_fast 32 and beta_slow 1; this model has 16 and 1"),
        (MHA, {**MIXTURE, "scoring_func": "sigmoid"}, {}, "llama takes softmax scores"),
        (MHA, {**MIXTURE, "routed_scaling_factor": 2.0}, {}, "routed_scaling_factor 1; this model has 0 and 2"),
        (MHA, {**MIXTURE, "first_k_dense_replace": 1, "intermediate_size": 20}, {}, "this model has 1 and 1"),
        (MHA, {}, {"num_hidden_layers": 513}, "num_hidden_layers is 513 but llama.cpp takes 512"),
    ],
)
def test_a_model_that_would_be_computed_otherwise_is_refused(
    tiny_config: Callable[..., ModelConfig], attention: dict[str, Any], ffn: dict[str, Any], rest: dict[str, Any],
    reason: str,
) -> None:  # fmt: skip
    with pytest.raises(UnsupportedError, match=re.escape(reason)):
        keys(tiny_config(attention=attention, ffn=ffn, **rest))


def test_what_only_training_needs_stands_in_no_way(tiny_config: Callable[..., ModelConfig]) -> None:
    training = {"aux_loss_alpha": 0.1, "seq_aux": False, "capacity_factor": 1.5, "drop_policy": "score"}
    groups = {"n_routed_experts": 8, "n_group": 4, "topk_group": 4, "device_aux_loss_alpha": 0.1}
    plain, trained = (tiny_config(attention=MHA, ffn={"n_routed_experts": 8, **ffn}) for ffn in ({}, training | groups))
    without = {key: value for key, value in keys(plain).items() if key != "moekit.config"}
    assert {key: value for key, value in keys(trained).items() if key != "moekit.config"} == without


def test_a_setting_that_is_not_known_is_refused_unless_it_is_at_its_default(
    tiny_config: Callable[..., ModelConfig],
) -> None:
    class Wider(MHAConfig):
        qk_norm: bool = False

    config = tiny_config(attention=MHA)
    for value in (False, True):
        attention = Wider.model_validate({**config.attention.model_dump(), "qk_norm": value})
        changed = config.model_copy(update={"attention": attention})
        if value:
            with pytest.raises(UnsupportedError, match=r"attention\.qk_norm is True but .* knows no key for it"):
                keys(changed)
        else:
            assert keys(changed).keys() == keys(config).keys()

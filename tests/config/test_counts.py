"""Counts against the paper's printed figures, against built models, and against what autograd keeps."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekit.config import (
    ModelConfig,
    MoEConfig,
    buffer_bytes,
    load_model_config,
    memory,
    parameters,
    plan,
    preset,
    preset_names,
)
from moekit.errors import ConfigError
from moekit.nn.model import Model
from moekit.ops.experts import BACKENDS

ROLES = {
    "embedding": r"^embed_tokens",
    "head": r"^lm_head",
    "norm": r"norm",
    "attention": r"self_attn",
    "router": r"mlp\.router",
    "routed": r"mlp\.experts",
    "shared": r"mlp\.shared_expert",
    "dense": r"mlp\.",
}


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("deepseekmoe-16b", 74.4),
        ("deepseek-7b", 183.5),
        ("llama2-7b", 187.9),
        ("deepseek-67b", 2057.5),
        ("gshard-137b", 572.7),
        ("deepseekmoe-142b-half", 374.6),
        ("dense-2b", 2.9),
        ("hash-2b", 2.9),
        ("switch-2b", 2.9),
        ("gshard-2b", 4.3),
        ("deepseekmoe-2b", 4.3),
        ("gshard-2b-x1.5", 5.8),
        ("dense-2b-x16", 24.6),
    ],
)
def test_paper_rule_gives_the_printed_flops(name: str, printed: float) -> None:
    config = preset(name)
    assert round(config.flops(config.max_position_embeddings, "paper") / 1e12, 1) == printed


def test_paper_rule_misses_the_printed_145b_flops_by_less_than_a_twentieth_of_a_percent() -> None:
    assert preset("deepseekmoe-145b").flops(4096, "paper") == pytest.approx(585.6e12, rel=5e-4)


def test_exact_flops_count_the_real_shapes() -> None:
    # at 16B: experts of 1408 instead of 1365.33, a router, one dense layer; at 67B: grouped queries, a narrower FFN
    assert round(preset("deepseekmoe-16b").flops(4096) / 1e12, 1) == 75.9
    assert preset("deepseek-67b").flops(4096) < preset("deepseek-67b").flops(4096, "paper")


def test_exact_flops_are_six_per_active_matrix_weight_plus_twelve_per_score() -> None:
    config = preset("mini-deepseekmoe")
    active = {role: count.active for role, count in parameters(config).items()}
    weights = sum(active.values()) - active["embedding"] - active["norm"]
    assert config.flops(100) == 100 * (6 * weights + 12 * 6 * 192 * 100)


def test_tying_the_head_changes_no_flops_and_counts_its_matrix_once() -> None:
    config = preset("tiny-deepseekmoe")
    tied = config.model_copy(update={"tie_word_embeddings": True})
    assert tied.flops(64) == config.flops(64)
    assert config.num_parameters - tied.num_parameters == 4096 * 96
    assert tied.num_active_parameters_without_embedding == config.num_active_parameters_without_embedding


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        ("deepseekmoe-16b", 16_375_728_128, 2_828_650_496),
        ("deepseek-v2-lite", 15_706_484_224, None),
        ("deepseekmoe-145b", 144.6e9, 22.2e9),
        ("gshard-137b", 136.5e9, 21.7e9),
        ("deepseekmoe-142b-half", 142.4e9, 13.6e9),
        ("deepseek-v2", 235.7e9, 21.4e9),
        ("deepseek-v3", 671.0e9, 37.6e9),
        ("llama2-7b", 6.7e9, 6.7e9),
        ("deepseek-7b", 6.9e9, 6.9e9),
        ("deepseek-67b", 67.4e9, 67.4e9),
    ],
)
def test_parameters_match_the_published_models(name: str, total: float, active: float | None) -> None:
    config = preset(name)
    for found, expected in ((config.num_parameters, total), (config.num_active_parameters, active)):
        assert expected is None or (found if isinstance(expected, int) else round(found, -8)) == expected


def test_active_parameters_follow_both_published_conventions() -> None:
    assert round(preset("deepseekmoe-16b").num_active_parameters / 1e9, 1) == 2.8
    assert round(preset("deepseek-v2-lite").num_active_parameters_without_embedding / 1e9, 2) == 2.45


@pytest.mark.parametrize(
    ("name", "total", "active", "digits"),
    [
        ("deepseekmoe-2b", 1.89, 0.24, 2),
        ("gshard-2b", 1.89, 0.24, 2),
        ("gshard-2b-x1.2", 2.3, 0.3, 1),
        ("gshard-2b-x1.2", 2.26, 0.28, 2),
        ("gshard-2b-x1.5", 2.83, 0.35, 2),
        ("dense-2b-x4", 0.47, 0.47, 2),
        ("dense-2b-x16", 1.89, 1.89, 2),
    ],
)
def test_expert_parameters_at_2b_match_the_tables(name: str, total: float, active: float, digits: int) -> None:
    counts = [parameters(preset(name))[role] for role in ("routed", "shared", "dense")]
    assert round(sum(count.total for count in counts) / 1e9, digits) == total
    assert round(sum(count.active for count in counts) / 1e9, digits) == active


def test_cache_bytes_match_multi_head_and_latent_attention() -> None:
    assert preset("deepseekmoe-16b").kv_cache_bytes_per_token() == 229_376
    assert preset("deepseek-v2-lite").kv_cache_bytes_per_token() == 31_104
    assert preset("deepseek-67b").kv_cache_bytes_per_token(1) == 95 * 2 * 8 * 128


OTHERS: dict[str, dict[str, Any]] = {
    "biases and a norm of each head": {"attention": {"attention_bias": "qkv", "qk_norm": "head"}},
    "all biases and a norm of all heads": {"attention": {"attention_bias": "all", "qk_norm": "full"}},
    "biases around latents": {"attention": {"kind": "mla", "attention_bias": True, "q_lora_rank": 7}},
    "biases around latents, full queries": {"attention": {"kind": "mla", "attention_bias": True}},
    "a gated shared expert of its own width, a dense layer last": {
        "ffn": {
            "shared_expert_gate": True,
            "shared_expert_intermediate_size": 26,
            "mlp_only_layers": [1],
            "intermediate_size": 22,
        }
    },
    "Lory, its first segment learned": {"ffn": {"kind": "lory", "first_segment": "learned"}},
}


@pytest.mark.parametrize(
    "name", [*(name for name in preset_names() if not name.startswith(("mini-", "meo-"))), *OTHERS]
)
def test_counts_by_role_equal_those_of_the_built_model(name: str, tiny_config: Callable[..., ModelConfig]) -> None:
    config = tiny_config(**OTHERS[name]) if name in OTHERS else preset(name)
    with torch.device("meta"):
        model = Model(config)
    built = dict.fromkeys(parameters(config), 0)
    for key, parameter in model.named_parameters():
        built[next(role for role, pattern in ROLES.items() if re.search(pattern, key))] += parameter.numel()
    assert built == {role: count.total for role, count in parameters(config).items()}
    assert buffer_bytes(config) == sum(buffer.nbytes for buffer in model.buffers())


CHOOSING = {name: parts for name, parts in OTHERS.items() if parts.get("ffn", {}).get("kind", "moe") == "moe"}


@pytest.mark.parametrize("parts", CHOOSING.values(), ids=CHOOSING.keys())
def test_exact_flops_are_of_matrices_and_not_of_vectors(
    parts: dict[str, Any], tiny_config: Callable[..., ModelConfig]
) -> None:
    all_active = {"ffn": {"num_experts_per_tok": 7, **parts.get("ffn", {})}}
    config = tiny_config(**{**parts, **all_active})
    with torch.device("meta"):
        model = Model(config)
    weights = sum(p.numel() for p in model.parameters() if p.dim() > 1) - config.vocab_size * config.hidden_size
    assert config.flops(2) - 2 * config.flops(1) == 2 * (config.flops(1) - 6 * weights)


def _kept_bytes(config: ModelConfig, batch: int, length: int, backend: str = "torch") -> int:
    """Returns the bytes of storage that autograd keeps for the backward pass, parameters and buffers apart."""
    model = Model(config).train()
    model.set_experts_backend(backend)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    ids = torch.randint(config.vocab_size, (batch, length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(ids, labels=ids)
    assert output.loss is not None
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


LORY = {"ffn.kind": "lory", "ffn.intermediate_size": "256", "ffn.n_routed_experts": "8", "ffn.segment_size": "32"}


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("tiny-dense", {}),
        ("tiny-switch", {}),
        ("tiny-deepseekmoe", {}),
        ("tiny-dense", {"attention.qk_norm": "head", "attention.attention_bias": "all"}),
        ("tiny-dense", {"attention.qk_norm": "full"}),
        ("tiny-dense", LORY),
        ("tiny-deepseekmoe", {"ffn.shared_expert_gate": "true", "ffn.shared_expert_intermediate_size": "256"}),
    ],
)
def test_activation_bytes_are_within_a_tenth_of_what_autograd_keeps(name: str, overrides: dict[str, str]) -> None:
    config = load_model_config(name, {f"model.{key}": value for key, value in overrides.items()})
    # the chunk of logits lives during the forward pass only
    counted = memory(config, 2, 128, "float32")["activations"] - 4 * config.vocab_size * 2 * 128
    assert counted == pytest.approx(_kept_bytes(config, 2, 128), rel=0.1)


def test_compiled_experts_keep_nothing_of_a_rows_width() -> None:
    """What is kept of the routed experts then is gate and up, and each token once, whatever the granularity."""
    config = preset("tiny-deepseekmoe")
    if reason := BACKENDS["native"].unavailable(torch.ones(1, 1), torch.ones(1, 2, 1), torch.ones(1, 1, 1)):
        pytest.skip(reason)
    ffn = config.ffn
    assert isinstance(ffn, MoEConfig)
    saved = _kept_bytes(config, 2, 128) - _kept_bytes(config, 2, 128, "native")
    rows = 2 * 128 * ffn.num_experts_per_tok * len(config.moe_layers)
    assert saved == pytest.approx(4 * rows * 2 * config.hidden_size, rel=0.1)


def test_memory_totals_are_the_sums_of_their_parts() -> None:
    config = preset("tiny-deepseekmoe")
    bytes_of = memory(config, 4, 256, "float32")
    n = config.num_parameters
    assert (bytes_of["weights"], bytes_of["gradients"], bytes_of["optimizer"]) == (4 * n, 4 * n, 8 * n)
    parts = ("weights", "compute_copy", "gradients", "optimizer", "activations", "buffers")
    assert bytes_of["training_total"] == sum(bytes_of[part] for part in parts)
    assert bytes_of["generation_total"] == bytes_of["generation_weights"] + bytes_of["kv_cache"]
    assert bytes_of["kv_cache"] == 4 * 256 * config.kv_cache_bytes_per_token(4)


def test_recompute_and_muon_and_bfloat16_save_memory() -> None:
    config = preset("deepseekmoe-16b")
    plain = memory(config, 1, 4096)
    assert memory(config, 1, 4096, recompute=True)["activations"] < plain["activations"] / 5
    routed = parameters(config)["routed"].total
    assert plain["optimizer"] - memory(config, 1, 4096, optimizer="muon")["optimizer"] == 4 * routed
    assert plain["activations"] < memory(config, 1, 4096, "float32")["activations"]


def test_buffers_hold_a_bias_per_expert_or_a_table_per_vocabulary() -> None:
    assert buffer_bytes(preset("deepseek-v3")) == 4 * 58 * 256
    assert buffer_bytes(preset("tiny-hash")) == 8 * 4 * 4096
    assert buffer_bytes(preset("tiny-dense")) == buffer_bytes(preset("tiny-gshard")) == 0


def test_a_plan_longer_than_the_context_and_an_unknown_rule_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sequence_length is 257 but model\.max_position_embeddings is 256"):
        plan(preset("tiny-dense"), 257)
    with pytest.raises(ConfigError, match=r"rule is 'papr' \(did you mean paper\?\)"):
        preset("tiny-dense").flops(256, "papr")  # type: ignore[arg-type]


def test_muon_without_experts_is_refused_in_a_plan_as_in_a_run() -> None:
    with pytest.raises(ConfigError, match="optimizer is muon but the model has no experts"):
        memory(preset("tiny-dense"), 1, 256, optimizer="muon")

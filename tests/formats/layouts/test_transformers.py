"""Every layout both ways against transformers' own classes: files that one writes give the other the same logits."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import moekit
from moekit.config import ModelConfig
from moekit.formats import weights
from moekit.formats.layouts import LAYOUTS
from moekit.formats.verify import verify

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "max_position_embeddings": 64}
MHA = {"num_attention_heads": 4, "num_key_value_heads": 2}
MLA = {"num_attention_heads": 3, "kv_lora_rank": 10, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5}
DENSE = {**SIZES, **MHA, "intermediate_size": 20}
FEW = {"num_experts_per_tok": 3, "moe_intermediate_size": 12, "intermediate_size": 20}
V2 = {**SIZES, **MLA, **FEW, "n_routed_experts": 8, "q_lora_rank": None, "first_k_dense_replace": 1}
V3 = {**V2, "num_key_value_heads": 3, "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "q_lora_rank": 7}
QWEN = {**SIZES, **MHA, **FEW, "num_experts": 7}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 4.0}
BOTH = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "low_freq_factor": 1.0,
    "high_freq_factor": 2.0,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", DENSE),
    "llama, heads of another width, biases, tied": (
        "llama",
        {**DENSE, "head_dim": 10, "attention_bias": True, "tie_word_embeddings": True},
    ),
    "llama 3": ("llama", {**DENSE, "rope_parameters": LLAMA3}),
    "llama, full heads, YaRN of a given magnitude": (
        "llama",
        {**DENSE, "num_key_value_heads": 4, "rope_parameters": {**YARN, "attention_factor": 1.3}},
    ),
    "qwen2": ("qwen2", DENSE),
    "qwen2, another width, YaRN of two magnitudes": ("qwen2", {**DENSE, "head_dim": 10, "rope_parameters": BOTH}),
    "qwen3": ("qwen3", {**DENSE, "head_dim": 10}),
    "qwen3, biases, tied, YaRN": (
        "qwen3",
        {**DENSE, "head_dim": 6, "attention_bias": True, "tie_word_embeddings": True, "rope_parameters": YARN},
    ),
    "mixtral": ("mixtral", {**DENSE, "num_local_experts": 5, "head_dim": 10}),
    "mixtral, all experts": ("mixtral", {**DENSE, "num_local_experts": 3, "num_experts_per_tok": 3}),
    "olmoe": ("olmoe", {**DENSE, "num_experts": 7, "num_experts_per_tok": 3}),
    "olmoe, renormalised, biases": (
        "olmoe",
        {**DENSE, "num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": True, "attention_bias": True},
    ),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 24}),
    "qwen2_moe, every second layer, a shared expert of its own width": (
        "qwen2_moe",
        {**QWEN, "num_hidden_layers": 4, "decoder_sparse_step": 2, "shared_expert_intermediate_size": 10},
    ),
    "qwen2_moe, no biases, renormalised, dense here and there": (
        "qwen2_moe",
        {**QWEN, "num_hidden_layers": 4, "mlp_only_layers": [0, 3], "qkv_bias": False, "norm_topk_prob": True},
    ),
    "qwen3_moe": ("qwen3_moe", {**QWEN, "head_dim": 10, "norm_topk_prob": True}),
    "qwen3_moe, biases, tied, a dense layer in between, Llama's rope": (
        "qwen3_moe",
        {
            **QWEN,
            "head_dim": 6,
            "attention_bias": True,
            "tie_word_embeddings": True,
            "mlp_only_layers": [1],
            "rope_parameters": LLAMA3,
        },
    ),
    "deepseek_v2": ("deepseek_v2", V2),
    "deepseek_v2, compressed queries, groups, YaRN, two dense layers": (
        "deepseek_v2",
        {
            **V2,
            "q_lora_rank": 7,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.5,
            "rope_parameters": BOTH,
            "first_k_dense_replace": 2,
        },
    ),
    "deepseek_v2, biases, another epsilon, tied, no dense layer": (
        "deepseek_v2",
        {
            **V2,
            "q_lora_rank": 7,
            "attention_bias": True,
            "rms_norm_eps": 1e-2,
            "tie_word_embeddings": True,
            "first_k_dense_replace": 0,
        },
    ),
    "deepseek_v3": ("deepseek_v3", V3),
    "deepseek_v3, raw weights, full queries, YaRN, one group, biases": (
        "deepseek_v3",
        {
            **V3,
            "norm_topk_prob": False,
            "q_lora_rank": None,
            "rope_parameters": BOTH,
            "n_group": 1,
            "topk_group": 1,
            "attention_bias": True,
        },
    ),
    "deepseek_v3, two dense layers, another epsilon": (
        "deepseek_v3",
        {**V3, "first_k_dense_replace": 2, "rms_norm_eps": 1e-3, "n_shared_experts": 2},
    ),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
CLASSES = {name: layout.architecture for name, layout in LAYOUTS.items() if name != "deepseek"}


def built(model_type: str, settings: dict[str, Any]) -> nn.Module:
    """Returns transformers' model with random weights, all of them large enough to be seen in the logits."""
    kind = getattr(transformers, CLASSES[model_type])
    theirs = kind(kind.config_class(**settings))
    for name, tensor in theirs.state_dict().items():
        if "norm" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
        else:
            nn.init.normal_(tensor, std=1.0 if "gate.weight" in name else 0.12)
    return theirs.eval()


def read(model_type: str, folder: Path) -> nn.Module:
    """Returns what transformers reads, which finds all that it wants and nothing else."""
    theirs, info = getattr(transformers, CLASSES[model_type]).from_pretrained(
        folder,
        output_loading_info=True,
        experts_implementation="eager",  # the other ones want widths of 16 bytes
    )
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert all(theirs.state_dict()[name].numel() == 0 for name in info["missing_keys"])
    return theirs.eval()


def tokens() -> torch.Tensor:
    return torch.randint(61, (3, 40), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def agree(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs(input_ids=tokens()).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(tokens()).logits, expected, rtol=0, atol=1e-5)  # measured: 6e-6, of three seeds


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@torch.no_grad()
def test_no_shared_expert_is_one_of_no_width(tmp_path: Path) -> None:
    for name, case in (("deepseek_v2", V2), ("deepseek_v3", V3)):
        theirs = built(name, {**case, "n_shared_experts": 0})
        theirs.save_pretrained(tmp_path / f"{name}.theirs")
        ours = moekit.load(tmp_path / f"{name}.theirs")
        agree(ours, theirs)
        moekit.save(ours, tmp_path / name, layout=name)
        agree(ours, read(name, tmp_path / name))


@every_case
def test_what_transformers_writes_is_read_and_written_again_to_the_bit(
    case: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    theirs = built(*case)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = moekit.load(tmp_path / "theirs")
    agree(ours, theirs)
    assert [check for check in verify(tmp_path / "theirs")["checks"] if not check["held"]] == []
    moekit.save(ours, tmp_path / "ours", layout=case[0])
    again = read(case[0], tmp_path / "ours")
    before, after = theirs.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    back = moekit.load(tmp_path / "ours")
    assert back.config == ours.config
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())


OWN: dict[str, dict[str, Any]] = {
    "llama": {"attention": {"rope": {"theta": 5e5}}, "ffn": {"kind": "dense"}, "tie_word_embeddings": True},
    "qwen2": {"attention": {"attention_bias": "qkv"}, "ffn": {"kind": "dense"}, "hidden_size": 18},
    "qwen3": {"attention": {"qk_norm": "head", "attention_bias": "all"}, "ffn": {"kind": "dense"}},
    "mixtral": {"hidden_size": 18, "ffn": {"n_shared_experts": 0, "norm_topk_prob": True, "z_loss_alpha": 0.1}},
    "olmoe": {"attention": {"qk_norm": "full"}, "ffn": {"n_shared_experts": 0, "aux_loss_alpha": 0.3}},
    "qwen2_moe": {
        "attention": {"attention_bias": "qkv"},
        "ffn": {
            "n_shared_experts": 2,
            "shared_expert_intermediate_size": 13,
            "shared_expert_gate": True,
            "moe_layer_freq": 2,
            "intermediate_size": 9,
        },
        "num_hidden_layers": 5,
    },
    "qwen3_moe": {"attention": {"qk_norm": "head"}, "ffn": {"n_shared_experts": 0, "capacity_factor": 1.2}},
    "deepseek_v2": {
        "attention": {
            "kind": "mla",
            "latent_norm_eps": 1e-6,
            "rope": {"yarn": {"factor": 3.7, "original_max_position_embeddings": 16, "mscale": 0.4}},
        },
        "rms_norm_eps": 1e-4,
        "ffn": {"n_group": 7, "topk_group": 7, "aux_loss_alpha": 0.1, "device_aux_loss_alpha": 0.2, "seq_aux": False},
    },
    "deepseek_v3": {
        "attention": {
            "kind": "mla",
            "q_lora_rank": 5,
            "rope": {"yarn": {"factor": 3.7, "original_max_position_embeddings": 16, "mscale": 0.0}},
        },
        "ffn": {
            "n_routed_experts": 8,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "bias_update_speed": 0.7,
            "mlp_only_layers": [0],
            "intermediate_size": 9,
        },
    },
}


@pytest.mark.parametrize(("layout", "parts"), OWN.items(), ids=OWN.keys())
def test_what_moekit_writes_is_read_by_transformers_and_by_itself_to_the_bit(
    layout: str,
    parts: dict[str, Any],
    tiny_config: Callable[..., ModelConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)  # so there are shards and an index
    ours = moekit.Model(tiny_config(**{"hidden_size": 24, "initializer_range": 0.12, **parts})).eval()
    for name, tensor in ours.state_dict().items():
        if tensor.dim() == 1:
            nn.init.uniform_(tensor, 0.5, 1.5) if "norm" in name else nn.init.normal_(tensor)
    moekit.save(ours, tmp_path / "m", layout=layout)
    assert (tmp_path / "m" / weights.INDEX).is_file()
    agree(ours, read(layout, tmp_path / "m"))
    back = moekit.load(tmp_path / "m")
    assert back.config == ours.config  # what only training needs included
    assert ours.state_dict().keys() == back.state_dict().keys()
    assert all(torch.equal(tensor, back.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("layout", CLASSES)
def test_an_absent_field_takes_transformers_default(layout: str) -> None:
    """Those of V2 and V3 that only training needs are not transformers'; see test_layout.py."""
    given = {"num_experts_per_tok": 6} if layout == "deepseek_v2" else {}
    full = json.loads(getattr(transformers, CLASSES[layout]).config_class(**given).to_json_string())
    assert LAYOUTS[layout].read({"model_type": layout, **given}) == LAYOUTS[layout].read(full)


@pytest.mark.parametrize("layout", ["qwen2_moe", "olmoe"])
@pytest.mark.parametrize("k", [1, 3])
def test_the_coefficient_of_balance_is_transformers_for_one_layer_and_any_load(
    layout: str, k: int, tmp_path: Path
) -> None:
    """There f is K times the paper's, and a coefficient taken as it is would be another loss (allenai/OLMoE#45)."""
    settings = {**(QWEN if layout == "qwen2_moe" else {**DENSE, "num_experts": 7}), "num_experts_per_tok": k}
    theirs = built(layout, {**settings, "num_hidden_layers": 1, "router_aux_loss_coef": 0.25})
    theirs.save_pretrained(tmp_path / "m")
    ours = moekit.load(tmp_path / "m")
    aux = ours(tokens(), labels=tokens()).aux["expert_balance"]
    expected = theirs(input_ids=tokens(), labels=tokens(), output_router_logits=True)
    torch.testing.assert_close(aux, 0.25 * expected.aux_loss, rtol=1e-5, atol=0)
    assert aux > 0.25 * k * 1.01  # what it would be, were the load even

"""The V1 layout, which transformers has no class for: against the Qwen2-MoE model that computes the same."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moekit
from moekit.config import ModelConfig, preset
from moekit.errors import UnsupportedError
from moekit.formats import weights
from moekit.formats.layouts import LAYOUTS
from moekit.formats.layouts.tensors import disk

V1: dict[str, Any] = {
    "architectures": ["DeepseekForCausalLM"],
    "model_type": "deepseek",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekConfig"},
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 20,
    "moe_intermediate_size": 12,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "n_shared_experts": 2,
    "n_routed_experts": 7,
    "num_experts_per_tok": 3,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": False,
    "scoring_func": "softmax",
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "hidden_act": "silu",
    "max_position_embeddings": 64,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": True,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pretraining_tp": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000,
    "rope_scaling": None,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "torch_dtype": "float32",
    "transformers_version": "4.36.0",
}
CASES: dict[str, dict[str, Any]] = {
    "as released": {},
    "grouped queries, tied, renormalised": {
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
        "norm_topk_prob": True,
    },
    "every second layer": {"moe_layer_freq": 2, "first_k_dense_replace": 0},
    "two dense layers, then every second": {"moe_layer_freq": 2, "first_k_dense_replace": 2, "num_hidden_layers": 7},
    "two dense layers, one shared expert, another base": {
        "first_k_dense_replace": 2,
        "n_shared_experts": 1,
        "rope_theta": 500.0,
    },
    "one expert chosen, no dense layer": {"num_experts_per_tok": 1, "norm_topk_prob": True, "first_k_dense_replace": 0},
}


def moe(content: dict[str, Any], layer: int) -> bool:
    return layer >= content["first_k_dense_replace"] and layer % content["moe_layer_freq"] == 0


def qwen(content: dict[str, Any]) -> nn.Module:
    """Returns the Qwen2-MoE model of the same shape, the gate of its shared expert wide open."""
    transformers = pytest.importorskip("transformers")
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    more = ("intermediate_size", "moe_intermediate_size", "num_experts_per_tok", "tie_word_embeddings")
    dense = [layer for layer in range(content["num_hidden_layers"]) if not moe(content, layer)]
    theirs = transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(
            **{key: content[key] for key in (*same, *more)},
            num_experts=content["n_routed_experts"],
            shared_expert_intermediate_size=content["n_shared_experts"] * content["moe_intermediate_size"],
            norm_topk_prob=content["norm_topk_prob"] and content["num_experts_per_tok"] > 1,
            mlp_only_layers=dense,
            qkv_bias=False,
            rope_parameters={"rope_type": "default", "rope_theta": float(content["rope_theta"])},
        )
    )
    for name, tensor in theirs.state_dict().items():
        if "norm" in name:
            nn.init.uniform_(tensor, 0.5, 1.5)
        else:
            nn.init.normal_(tensor, std=1.0 if "gate.weight" in name else 0.12)
    for layer in theirs.model.layers:
        if hasattr(layer.mlp, "shared_expert_gate"):
            layer.mlp.shared_expert_gate = nn.Linear(content["hidden_size"], 1)
            nn.init.zeros_(layer.mlp.shared_expert_gate.weight)
            nn.init.constant_(layer.mlp.shared_expert_gate.bias, 40.0)  # sigmoid(40) is 1 in float32
    return theirs.eval()


def released(theirs: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors under the names of the released checkpoints (their remote code's)."""
    for name, tensor in theirs.state_dict().items():
        name = name.replace("shared_expert.", "shared_experts.")
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                yield f"{name.removesuffix('gate_up_proj')}{expert}.gate_proj.weight", gate
                yield f"{name.removesuffix('gate_up_proj')}{expert}.up_proj.weight", up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(tensor):
                yield f"{name.removesuffix('down_proj')}{expert}.down_proj.weight", down
        elif "shared_expert_gate" not in name:
            yield name, tensor


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_a_v1_directory_has_the_logits_of_its_equal_and_is_written_again_to_the_bit(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    content = V1 | changes
    theirs = qwen(content)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(content))
    tensors = {name: tensor.contiguous().clone() for name, tensor in released(theirs)}
    if content["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "theirs" / "model.safetensors")

    ours = moekit.load(tmp_path / "theirs")
    ids = torch.randint(61, (3, 40))
    expected = theirs(input_ids=ids).logits
    assert expected.std() > 0.3
    torch.testing.assert_close(ours(ids).logits, expected, rtol=0, atol=1e-5)  # measured: 3e-6

    moekit.save(ours, tmp_path / "ours", layout="deepseek")
    written = load_file(tmp_path / "ours" / "model.safetensors")
    assert written.keys() == tensors.keys()
    assert all(torch.equal(written[name], tensors[name]) for name in tensors)
    told = json.loads((tmp_path / "ours" / "config.json").read_text())
    provenance = {"auto_map", "use_cache", "pretraining_tp", "transformers_version", "bos_token_id", "eos_token_id"}
    without_effect = {"norm_topk_prob", "intermediate_size"} if content["num_experts_per_tok"] == 1 else set()
    kept = content.keys() - provenance - without_effect
    assert {key: told[key] for key in kept} == {key: content[key] for key in kept}
    assert moekit.load(tmp_path / "ours").config == ours.config


def test_the_16b_has_the_released_names_and_numbers() -> None:
    config = preset("deepseekmoe-16b")
    layout = LAYOUTS["deepseek"]
    content = layout.write(config)
    facts = {
        "num_hidden_layers": 28,
        "hidden_size": 2048,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "first_k_dense_replace": 1,
        "norm_topk_prob": False,
        "aux_loss_alpha": 0.001,
        "vocab_size": 102400,
    }
    assert {key: content[key] for key in facts} == facts
    with torch.device("meta"):
        model = moekit.Model(config)
    tensors = disk(layout, content)
    shapes = {
        piece.key: tuple(tensor[piece.index].shape)
        for name, tensor in model.state_dict().items()
        for piece in tensors.pieces(name, tuple(tensor.shape))
    }
    assert len(shapes) == 5466
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 16_375_728_128
    assert shapes["model.layers.27.mlp.experts.63.down_proj.weight"] == (2048, 1408)
    assert shapes["model.layers.1.mlp.gate.weight"] == (64, 2048)
    assert shapes["model.layers.9.mlp.shared_experts.up_proj.weight"] == (2816, 2048)
    assert shapes["model.layers.0.mlp.gate_proj.weight"] == (10944, 2048)
    assert shapes["model.layers.5.self_attn.k_proj.weight"] == (2048, 2048)


def test_v2_lite_has_5291_tensors() -> None:
    config = preset("deepseek-v2-lite")
    with torch.device("meta"):
        state = moekit.Model(config).state_dict()
    tensors = disk(LAYOUTS["deepseek_v2"], LAYOUTS["deepseek_v2"].write(config))
    assert sum(len(tensors.pieces(name, tuple(tensor.shape))) for name, tensor in state.items()) == 5291


@pytest.mark.parametrize("size", ["16b", "145b"])
def test_presets_of_the_paper_are_written_and_read_again(size: str) -> None:
    config = preset(f"deepseekmoe-{size}")
    assert LAYOUTS["deepseek"].read(LAYOUTS["deepseek"].write(config)) == config


@pytest.mark.parametrize(("name", "layout"), [("v2-lite", "v2"), ("v2", "v2"), ("v3", "v3")])
def test_presets_of_v2_and_v3_are_written_and_read_again(name: str, layout: str) -> None:
    config = preset(f"deepseek-{name}")
    assert LAYOUTS[f"deepseek_{layout}"].read(LAYOUTS[f"deepseek_{layout}"].write(config)) == config


def test_the_released_v3_config_is_the_preset() -> None:
    """With what it leaves out: the balance factor and the bias step of the report."""
    content = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "ep_size": 1,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "initializer_range": 0.02,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        },
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32,
            "beta_slow": 1,
            "factor": 40,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
            "type": "yarn",
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "torch_dtype": "bfloat16",
        "v_head_dim": 128,
        "vocab_size": 129280,
    }
    wanted = preset("deepseek-v3").model_copy(update={"initializer_range": 0.02})
    assert LAYOUTS["deepseek_v3"].read(content) == wanted
    tensors = disk(LAYOUTS["deepseek_v3"], content)
    assert tensors.block == (128, 128)
    assert list(tensors.extra) == [61]


def test_the_greedy_of_the_remote_code_is_spelt_gready() -> None:
    content = {"model_type": "deepseek_v2", "num_experts_per_tok": 6, "topk_method": "gready", "n_group": 8}
    assert LAYOUTS["deepseek_v2"].read(content) == LAYOUTS["deepseek_v2"].read({**content, "topk_method": "greedy"})
    with pytest.raises(UnsupportedError, match="topk_method is 'noaux_tc' but V2 has greedy and group_limited_greedy"):
        LAYOUTS["deepseek_v2"].read({**content, "topk_method": "noaux_tc"})


@pytest.mark.parametrize("layout", ["deepseek_v2", "deepseek_v3"])
def test_dense_layers_that_transformers_would_not_see_are_not_written(
    layout: str, tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    """Its classes ignore moe_layer_freq: they would find no experts in such a layer, and draw some at random."""
    method = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"} if layout == "deepseek_v3" else {}
    ffn = {**method, "moe_layer_freq": 2, "intermediate_size": 9}
    model = moekit.Model(tiny_config(attention={"kind": "mla"}, ffn=ffn))
    with pytest.raises(
        UnsupportedError, match=r"dense layers are \[1\], but transformers' class of this layout has lead"
    ):
        moekit.save(model, tmp_path / "m", layout=layout)
    assert not (tmp_path / "m").exists()
    content = LAYOUTS[layout].write(moekit.Model(tiny_config(attention={"kind": "mla"}, ffn=method)).config)
    read = LAYOUTS[layout].read({**content, "moe_layer_freq": 2, "intermediate_size": 9})  # the remote code knows it
    assert read.moe_layers == [0]


def test_shards_are_named_and_indexed_as_the_ecosystem_does(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    config = tiny_config(hidden_size=24)
    moekit.save(moekit.Model(config), tmp_path / "m", layout="deepseek")
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    names = sorted(set(index["weight_map"].values()))
    assert names == [f"model-{n + 1:05d}-of-{len(names):05d}.safetensors" for n in range(len(names))]
    assert index["metadata"]["total_size"] == 4 * config.num_parameters
    for name in names:
        with safe_open(tmp_path / "m" / name, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            assert {key for key, at in index["weight_map"].items() if at == name} == set(file.keys())

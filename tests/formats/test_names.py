"""Names on disk are DeepSeek's, and their pieces cover every tensor exactly once."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moekit.config import ModelConfig
from moekit.formats.layouts import LAYOUTS
from moekit.formats.names import pieces
from moekit.nn.model import Model
from moekit.nn.quantized import quantize_
from moekit.ops.quantize import Codes


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("embed_tokens.weight", "model.embed_tokens.weight"),
        ("norm.weight", "model.norm.weight"),
        ("lm_head.weight", "lm_head.weight"),
        ("layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.gate_proj.weight"),
        ("layers.11.mlp.router.weight", "model.layers.11.mlp.gate.weight"),
        ("layers.11.mlp.router.expert_bias", "model.layers.11.mlp.gate.e_score_correction_bias"),
        ("layers.11.mlp.router.table", "model.layers.11.mlp.gate.hash_table"),
        ("layers.2.mlp.shared_experts.up_proj.weight", "model.layers.2.mlp.shared_experts.up_proj.weight"),
    ],
)
def test_a_whole_tensor_has_deepseeks_name(ours: str, theirs: str) -> None:
    assert pieces(ours, (4, 6)) == [(theirs, ())]


def test_each_expert_has_its_own_three_keys() -> None:
    stem = "model.layers.3.mlp.experts"
    assert pieces("layers.3.mlp.experts.gate_up_proj", (2, 10, 7)) == [
        (f"{stem}.0.gate_proj.weight", (0, slice(0, 5))),
        (f"{stem}.0.up_proj.weight", (0, slice(5, 10))),
        (f"{stem}.1.gate_proj.weight", (1, slice(0, 5))),
        (f"{stem}.1.up_proj.weight", (1, slice(5, 10))),
    ]
    assert pieces("layers.3.mlp.experts.down_proj", (2, 7, 5)) == [
        (f"{stem}.0.down_proj.weight", (0,)),
        (f"{stem}.1.down_proj.weight", (1,)),
    ]


def test_codes_have_the_matrix_s_name_and_scales_stand_beside_them() -> None:
    assert pieces("layers.0.self_attn.q_proj.weight.codes", (4, 32)) == [("model.layers.0.self_attn.q_proj.weight", ())]
    assert pieces("lm_head.weight.scales", (4, 1)) == [("lm_head.weight_scale", ())]
    stem = "model.layers.3.mlp.experts"
    assert pieces("layers.3.mlp.experts.gate_up_proj.scales", (1, 10, 2)) == [
        (f"{stem}.0.gate_proj.weight_scale", (0, slice(0, 5))),
        (f"{stem}.0.up_proj.weight_scale", (0, slice(5, 10))),
    ]
    assert pieces("layers.3.mlp.experts.down_proj.codes", (1, 7, 32)) == [(f"{stem}.0.down_proj.weight", (0,))]


@pytest.mark.parametrize("codes", [None, "int8", "int4"])
@pytest.mark.parametrize(
    "settings",
    [
        {"ffn": {"kind": "dense"}},
        {"ffn": {"first_k_dense_replace": 1, "intermediate_size": 20}},
        {"ffn": {"topk_method": "noaux_tc"}, "attention": {"kind": "mla", "q_lora_rank": 5}},
        {"ffn": {"topk_method": "hash"}},
    ],
)
def test_pieces_cover_every_tensor_once_and_share_no_key(
    tiny_config: Callable[..., ModelConfig], settings: dict[str, Any], codes: Codes | None
) -> None:
    keys: Counter[str] = Counter()
    model = Model(tiny_config(**settings))
    if codes is not None:
        quantize_(model, codes)
    for name, tensor in model.state_dict().items():
        covered = torch.zeros(tensor.shape, dtype=torch.int64)
        for key, index in pieces(name, tuple(tensor.shape)):
            covered[index] += 1
            keys[key] += 1
        assert (covered == 1).all(), name
    assert max(keys.values()) == 1


def test_another_layouts_names_are_replaced_and_the_parts_stay() -> None:
    renamed = LAYOUTS["mixtral"].renamed
    assert pieces("layers.0.mlp.router.weight", (2, 4), renamed) == [
        ("model.layers.0.block_sparse_moe.gate.weight", ())
    ]
    assert pieces("layers.0.mlp.experts.gate_up_proj", (1, 6, 4), renamed) == [
        ("model.layers.0.block_sparse_moe.experts.0.w1.weight", (0, slice(0, 3))),
        ("model.layers.0.block_sparse_moe.experts.0.w3.weight", (0, slice(3, 6))),
    ]
    down = pieces("layers.0.mlp.experts.down_proj", (1, 4, 3), renamed)
    assert down == [("model.layers.0.block_sparse_moe.experts.0.w2.weight", (0,))]
    assert pieces("layers.0.self_attn.q_proj.weight", (4, 4), renamed) == pieces(
        "layers.0.self_attn.q_proj.weight", (4, 4)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_gives_two_tensors_one_name(layout: str) -> None:
    names = [f"layers.{n}.mlp.{part}" for n in (0, 1) for part in ("experts.gate_up_proj", "experts.down_proj")]
    names += [f"layers.0.mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj", "router")]
    names += [f"layers.0.mlp.shared_experts.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")]
    names += ["layers.0.mlp.shared_expert_gate.weight", "embed_tokens.weight", "lm_head.weight", "norm.weight"]
    keys = [piece.key for name in names for piece in pieces(name, (3, 4, 5), LAYOUTS[layout].renamed)]
    assert len(keys) == len(set(keys))

"""Another library's tensors: nothing missing, nothing left over without a reason, 8 bits by their blocks' scales."""

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import moekit
from moekit.config import ModelConfig
from moekit.errors import CheckpointError, MoekitError, UnsupportedError
from moekit.ops.scaled import Scaled

Make = Callable[..., ModelConfig]
Change = Callable[[dict[str, Tensor]], Any]

EXPERT = "model.layers.1.mlp.experts.{}.{}_proj.weight"
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [8, 4]}
V3 = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}


def bare(model: moekit.Model, folder: Path, layout: str, **config: Any) -> Path:
    """Returns a directory as another library leaves it: a config.json with changes, and weights."""
    moekit.save(model, folder, layout=layout)
    for name in ("manifest.json", "receipt.json"):
        (folder / name).unlink()
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | config))
    return folder


def change(folder: Path, how: Change) -> None:
    tensors = load_file(folder / "model.safetensors")
    how(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def refusal(folder: Path, kind: type[MoekitError] = CheckpointError, mapped: bool = False) -> str:
    with pytest.raises(kind) as caught:
        moekit.load(folder, mapped=mapped)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def v1(tiny_config: Make, tmp_path: Path) -> Path:
    config = tiny_config(hidden_size=24, ffn={"first_k_dense_replace": 1, "intermediate_size": 20})
    return bare(moekit.Model(config), tmp_path / "v1", "deepseek")


@pytest.fixture
def v3(tiny_config: Make, tmp_path: Path) -> Path:
    model = moekit.Model(tiny_config(hidden_size=24, attention={"kind": "mla"}, ffn=V3)).bfloat16()
    return bare(model, tmp_path / "v3", "deepseek_v3", quantization_config=FP8, num_nextn_predict_layers=1)


def fuse(tensors: dict[str, Tensor]) -> None:
    """Puts one layer's experts in one tensor, as some writers do."""
    halves = [torch.cat([tensors.pop(EXPERT.format(e, part)) for part in ("gate", "up")]) for e in range(7)]
    tensors["model.layers.1.mlp.experts.gate_up_proj"] = torch.stack(halves)


def lose(tensors: dict[str, Tensor], experts: Iterable[int]) -> None:
    """Takes experts out of a layer, as a writer does that sees one rank's only."""
    for expert in experts:
        for part in ("gate", "up", "down"):
            del tensors[EXPERT.format(expert, part)]


def prune(tensors: dict[str, Tensor]) -> None:
    """Takes the last expert out of a layer, its router's row too, and says so nowhere."""
    lose(tensors, [6])
    tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"][:6].clone()


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda t: t.pop(EXPERT.format(3, "up")), "has no tensor model.layers.1.mlp.experts.3.up_proj.weight"),
        (lambda t: lose(t, range(7)), "has no tensor model.layers.1.mlp.experts.0.gate_proj.weight"),
        (lambda t: lose(t, range(4, 7)), "has no tensor model.layers.1.mlp.experts.4.gate_proj.weight"),
        (fuse, "has no tensor model.layers.1.mlp.experts.0.gate_proj.weight"),
        (prune, "mlp.gate.weight"),
        (lambda t: t.update({EXPERT.format(7, "up"): t[EXPERT.format(6, "up")] + 1}), "experts.7.up_proj.weight"),
        (lambda t: t.update({EXPERT.format(2, "up"): torch.ones(9, 24)}), "has shape (9, 24) but the config asks for"),
        (lambda t: t.update({"model.layers.2.input_layernorm.weight": torch.ones(24)}), "no place for, the first"),
        (lambda t: t.update({"model.layers.1.mlp.gate.weight_scale_inv": torch.ones(1, 1)}), "no place for"),
        (lambda t: t.update({"lm_head.bias": torch.ones(61)}), "no place for, the first lm_head.bias"),
    ],
    ids=["one expert's part", "all experts", "one rank's experts", "fused", "pruned", "an expert more", "a shape",
         "a layer more", "a scale", "a bias"],
)  # fmt: skip
def test_a_model_with_anything_missing_or_left_over_is_never_loaded(v1: Path, how: Change, said: str) -> None:
    """Elsewhere experts that were not found stayed random, and success was reported (NVIDIA/Megatron-LM#5844)."""
    change(v1, how)
    assert said in refusal(v1)


def test_buffers_that_follow_from_the_config_are_dropped_and_that_is_logged(
    v1: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = moekit.load(v1).state_dict()
    change(v1, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}))
    with caplog.at_level(logging.INFO, "moekit"):
        found = moekit.load(v1).state_dict()
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    assert "model.layers.0.self_attn.rotary_emb.inv_freq dropped: a buffer that follows" in caplog.text


def test_a_tied_head_may_be_there_again_if_it_is_the_embedding(tiny_config: Make, tmp_path: Path) -> None:
    config = tiny_config(ffn={"kind": "dense"}, attention={"attention_bias": "qkv"}, tie_word_embeddings=True)
    folder = bare(moekit.Model(config), tmp_path / "m", "qwen2")
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert moekit.load(folder).config == config
    change(folder, lambda t: t["lm_head.weight"].add_(1))
    assert "lm_head.weight differs from model.embed_tokens.weight but tie_word_embeddings is true" in refusal(folder)


def test_layers_for_multi_token_prediction_are_dropped_on_purpose_and_no_others(
    v3: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def more(tensors: dict[str, Tensor]) -> None:
        for name in ("enorm.weight", "eh_proj.weight", "shared_head.head.weight", "mlp.experts.0.up_proj.weight"):
            tensors[f"model.layers.2.{name}"] = torch.ones(3, 2)

    expected = moekit.load(v3).state_dict()
    change(v3, more)
    with caplog.at_level(logging.INFO, "moekit"):
        found = moekit.load(v3).state_dict()
    assert found.keys() == expected.keys()
    assert "model.layers.2.eh_proj.weight dropped: multi-token prediction" in caplog.text
    change(v3, lambda t: t.update({"model.layers.3.enorm.weight": torch.ones(3)}))
    assert "no place for, the first model.layers.3.enorm.weight" in refusal(v3)


def test_a_selection_bias_in_bf16_is_held_in_float32(v3: Path) -> None:
    key = "model.layers.1.mlp.gate.e_score_correction_bias"
    change(v3, lambda t: t.update({key: torch.arange(7).bfloat16()}))
    bias = moekit.load(v3).moe_layers[1].router.expert_bias
    assert bias is not None
    assert bias.dtype == torch.float32
    assert bias.tolist() == list(range(7))


# weights in 8 bits


def encode(weight: Tensor, block: tuple[int, int] = (8, 4)) -> tuple[Tensor, Tensor]:
    """Returns codes and scales, block by block."""
    rows, columns = (-(-n // size) for n, size in zip(weight.shape, block, strict=True))
    codes, scales = torch.empty(weight.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns)
    for i in range(rows):
        for j in range(columns):
            at = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[at].abs().max().float() / 448
            codes[at] = (weight[at].float() / scales[i, j]).to(torch.float8_e4m3fn)
    return codes, scales


def decode(codes: Tensor, scales: Tensor) -> Tensor:
    """Returns the numbers, one by one."""
    return torch.stack(
        [torch.stack([w.float() * scales[i // 8, j // 4] for j, w in enumerate(row)]) for i, row in enumerate(codes)]
    )


def in_8_bits(tensors: dict[str, Tensor]) -> None:
    for key in [key for key in tensors if "_proj" in key]:
        tensors[key], tensors[f"{key}_scale_inv"] = encode(tensors[key])


def test_weights_in_8_bits_are_their_codes_times_their_blocks_scales(v3: Path) -> None:
    plain = load_file(v3 / "model.safetensors")
    change(v3, in_8_bits)
    coded = load_file(v3 / "model.safetensors")
    for dtype, kind in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        state = moekit.load(v3, dtype=dtype).state_dict()
        key = EXPERT.format(4, "up")
        exact = decode(coded[key], coded[f"{key}_scale_inv"])
        found = state["layers.1.mlp.experts.gate_up_proj"][4, 10:]
        assert found.dtype == kind
        assert torch.equal(found, exact.to(kind))
        assert (found.float() - plain[key].float()).norm() < 0.04 * plain[key].float().norm()  # three bits of mantissa
        assert state["layers.0.self_attn.o_proj.weight"].dtype == kind
        assert torch.equal(state["norm.weight"], plain["model.norm.weight"].to(kind))


def test_blocks_may_be_cut_off_at_both_edges() -> None:
    codes, scales = encode(torch.randn(13, 7), (8, 4))
    assert scales.shape == (2, 2)
    assert torch.equal(Scaled(codes, scales, (8, 4), torch.float32).numbers(), decode(codes, scales))


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (
            lambda t: t.pop(EXPERT.format(4, "up") + "_scale_inv"),
            "found torch.float8_e4m3fn without model.layers.1",
        ),
        (
            lambda t: t.update({EXPERT.format(4, "up") + "_scale_inv": torch.ones(1, 6)}),
            "_scale_inv has shape (1, 6) but its weight (10, 24) has (2, 6) blocks of (8, 4)",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(24).to(torch.float8_e4m3fn)}),
            "model.norm.weight is in 8 bits",
        ),
        (lambda t: t.update({EXPERT.format(4, "up"): torch.ones(10, 24).bfloat16()}), "no place for, the first model"),
        (
            lambda t: t.update({EXPERT.format(4, "up"): torch.ones(10, 24).to(torch.float8_e5m2)}),
            "found torch.float8_e5m2 with",
        ),
    ],
)
def test_codes_without_their_scales_are_never_taken_for_numbers(v3: Path, how: Change, said: str) -> None:
    change(v3, in_8_bits)
    change(v3, how)
    assert said in refusal(v3)
    assert said in refusal(v3, mapped=True)


def test_other_codes_are_refused(v3: Path, v1: Path) -> None:
    content = json.loads((v3 / "config.json").read_text())
    for codes, said in (
        (
            {"quant_method": "awq", "bits": 4},
            "quantization_config is {'quant_method': 'awq', 'bits': 4} but of codes only",
        ),
        ({**FP8, "fmt": "e5m2"}, "but of codes only fp8, e4m3, is read"),
        ({**FP8, "weight_block_size": None}, "weight_block_size is None but fp8 is read with scales of blocks only"),
        ({**FP8, "weight_block_size": [0, 4]}, "weight_block_size is [0, 4]"),
        ("fp8", "quantization_config is 'fp8'"),
    ):
        (v3 / "config.json").write_text(json.dumps(content | {"quantization_config": codes}))
        assert said in refusal(v3, UnsupportedError)
    change(v1, lambda t: t.update({"model.norm.weight": torch.ones(24).to(torch.float8_e4m3fn)}))
    assert "found torch.float8_e4m3fn without model.norm.weight_scale_inv and quantization_config" in refusal(v1)


def test_an_own_directory_has_no_excuses(tiny_config: Make, tmp_path: Path) -> None:
    """What another library may leave behind, nobody leaves in a directory of ours; 8 bits neither."""
    moekit.save(moekit.Model(tiny_config()), tmp_path / "m")
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change(tmp_path / "m", lambda t: t.update({key: torch.ones(3)}))
    with pytest.raises(CheckpointError, match="no place for"):
        moekit.load(tmp_path / "m", check_hashes=False)
    change(tmp_path / "m", lambda t: t.pop(key))
    change(tmp_path / "m", lambda t: t.update({"model.norm.weight": torch.ones(18).to(torch.float8_e4m3fn)}))
    with pytest.raises(CheckpointError, match="in 8 bits"):
        moekit.load(tmp_path / "m", check_hashes=False)

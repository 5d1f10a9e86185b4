"""A converted model is the same model but for what its precision costs, and the receipt says exactly what that is."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from moekit.config import ModelConfig
from moekit.errors import CheckpointError, ConfigError, DataError, UnsupportedError
from moekit.formats import convert as converting
from moekit.formats.checkpoint import load, save
from moekit.formats.convert import Precision, convert
from moekit.formats.directory import check_directory
from moekit.formats.tokenizer import load_tokenizer, train_tokenizer
from moekit.formats.verify import verify
from moekit.nn.model import Model
from moekit.ops.scaled import Scaled

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
TEXT = "the quick brown fox jumps over the lazy dog 0123456789\n"


@pytest.fixture
def source(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> Path:
    config = tiny_config(vocab_size=280, ffn={"topk_method": "noaux_tc", "scoring_func": "sigmoid"})
    save(Model(config), tmp_path / "source", train_tokenizer([TEXT], 280))
    return tmp_path / "source"


def keys(folder: Path) -> dict[str, str]:
    """Returns every tensor on disk with its type."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {key: file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(("first", "second"), list(itertools.product(PRECISIONS, PRECISIONS)))
def test_every_tensor_of_source_and_target_is_accounted_for_and_its_error_is_true(
    source: Path, tmp_path: Path, first: Precision, second: Precision
) -> None:
    convert(source, tmp_path / "first", first)
    account = convert(tmp_path / "first", tmp_path / "second", second)["tensors"]
    before, after = keys(tmp_path / "first"), keys(tmp_path / "second")
    assert account["used"].keys() | account["dropped"].keys() == before.keys()
    assert account["used"].keys() | account["created"].keys() == after.keys()
    assert not account["used"].keys() & (account["dropped"].keys() | account["created"].keys())
    if first == second:
        assert before == after
        assert not any(used["relative_rms"] for used in account["used"].values())
        ours, theirs = (load(tmp_path / name).state_dict() for name in ("first", "second"))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_the_error_in_the_receipt_is_the_tensors(source: Path, tmp_path: Path, dtype: Precision) -> None:
    used = convert(source, tmp_path / "target", dtype)["tensors"]["used"]
    plain, target = load(source), load(tmp_path / "target")
    a, b = plain.lm_head.weight.detach(), target.lm_head.numbers(torch.float32).detach().float()
    assert used["lm_head.weight"]["relative_rms"] == pytest.approx(float((b - a).norm() / a.norm()), abs=1e-9)
    low, high = {"float32": (0, 0), "bfloat16": (1e-3, 2**-8), "int8": (3e-3, 6e-3), "int4": (0.05, 0.1)}[dtype]
    matrices = [used[key]["relative_rms"] for key in used if "_proj" in key]
    assert len(matrices) == 2 * (4 + 3 * 7 + 3)
    assert all(low <= error <= high for error in matrices)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert used[bias] == {"from": "float32", "to": "float32", "relative_rms": 0.0}


def test_bfloat16_in_float32_is_the_same_model_computed_finer(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "half", "bfloat16")
    receipt = convert(tmp_path / "half", tmp_path / "whole", "float32")
    assert [check["held"] for check in receipt["checks"]] == [True, True, True]
    assert [check["bound"] for check in receipt["checks"]] == ["<= 0", "<= 0.02", ">= 0.85"]


def test_the_target_is_a_whole_directory_with_its_tokenizer_and_receipt(source: Path, tmp_path: Path) -> None:
    receipt = convert(source, tmp_path / "target", "int4", text=TEXT)
    assert receipt["action"] == "convert"
    assert receipt["inputs"] == check_directory(source)
    told = {"source": str(source), "from": "float32", "dtype": "int4", "layout": "moekit", "compared_on": "text"}
    assert receipt["config"] == told
    assert load_tokenizer(tmp_path / "target").fingerprint == load_tokenizer(source).fingerprint
    assert {"config.json", "model.safetensors", "receipt.json"} <= check_directory(tmp_path / "target").keys()
    assert load(tmp_path / "target").quantization == "int4"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_out_of_codes_come_their_numbers_and_a_note(source: Path, tmp_path: Path, dtype: Precision) -> None:
    convert(source, tmp_path / "codes", "int4")
    receipt = convert(tmp_path / "codes", tmp_path / "back", dtype)
    assert receipt["config"]["note"].startswith("made of the numbers that int4 codes stand for")
    codes, back = load(tmp_path / "codes"), load(tmp_path / "back")
    ids = torch.randint(280, (1, 20))
    with torch.no_grad():
        difference = (back(ids).logits.float() - codes(ids).logits).norm() / codes(ids).logits.norm()
    assert float(difference) < {"float32": 1e-6, "bfloat16": 0.3, "int8": 0.3}[dtype]


def test_another_layout_and_back_is_equal_to_the_bit_with_every_tensor_named(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    config = tiny_config(vocab_size=280, initializer_range=0.02, ffn={"norm_topk_prob": True, "n_shared_experts": 0})
    save(Model(config), tmp_path / "ours", train_tokenizer([TEXT], 280))
    receipt = convert(tmp_path / "ours", tmp_path / "theirs", layout="mixtral")
    assert (receipt["config"]["layout"], receipt["config"]["dtype"]) == ("mixtral", "float32")
    assert all(check["held"] for check in receipt["checks"])
    used = receipt["tensors"]["used"]
    assert used.keys() == keys(tmp_path / "theirs").keys()
    expert = used["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    assert expert["source"] == "model.layers.0.mlp.experts.3.down_proj.weight"
    assert {entry.get("source", key) for key, entry in used.items()} == keys(tmp_path / "ours").keys()
    (tmp_path / "theirs" / "manifest.json").unlink()  # as it comes from elsewhere
    back = convert(tmp_path / "theirs", tmp_path / "back", layout="moekit")
    assert {"config.json", "model.safetensors"} <= back["inputs"].keys()
    assert (tmp_path / "back" / "model.safetensors").read_bytes() == (
        tmp_path / "ours" / "model.safetensors"
    ).read_bytes()


def test_hf_takes_the_layout_that_fits_or_says_why_none_does(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    for name, config in {
        "deepseek": tiny_config(hidden_size=24),
        "llama": tiny_config(hidden_size=24, ffn={"kind": "dense"}),
    }.items():
        save(Model(config), tmp_path / f"from-{name}")
        assert convert(tmp_path / f"from-{name}", tmp_path / name, layout="hf")["config"]["layout"] == name
    save(Model(tiny_config(hidden_size=24, ffn={"topk_method": "hash"})), tmp_path / "hash")
    with pytest.raises(UnsupportedError, match=r"no other library's layout can hold this model.*topk_method 'hash'"):
        convert(tmp_path / "hash", tmp_path / "none", layout="hf")
    with pytest.raises(UnsupportedError, match="layout deepseek has no int8 codes; convert to bfloat16 first"):
        convert(tmp_path / "from-deepseek", tmp_path / "none", "int8", layout="deepseek")
    assert not (tmp_path / "none").exists()


def test_a_difference_beyond_the_bound_is_told_and_not_hidden(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def checks() -> list[dict[str, Any]]:
        return convert(source, tmp_path / "target", "float32")["checks"]

    assert [check["held"] for check in checks()] == [True, True, True]
    monkeypatch.setitem(converting.BOUNDS, "int8", converting.BOUNDS["float32"])
    found = convert(source, tmp_path / "int8", "int8")["checks"]
    assert [check["held"] for check in found[:2]] == [False, False]
    assert found[0]["bound"] == "<= 0"
    assert found[0]["of"] in keys(source)


def test_what_cannot_be_converted_is_one_clear_line_and_leaves_nothing(
    source: Path, tmp_path: Path, tiny_config: Callable[..., ModelConfig]
) -> None:
    with pytest.raises(CheckpointError, match="source exists already; choose another directory"):
        convert(source, source, "int8")
    model = load(source)
    with torch.no_grad():
        model.lm_head.weight[3, 4] = torch.inf
    save(model, tmp_path / "infinite")
    with pytest.raises(CheckpointError, match=r"lm_head.weight in .*infinite has a value that is not finite"):
        convert(tmp_path / "infinite", tmp_path / "target", "int8")
    with pytest.raises(ConfigError, match=r"--text needs a tokenizer and the source has no tokenizer.json"):
        convert(tmp_path / "infinite", tmp_path / "target", "int8", text=TEXT)
    with pytest.raises(DataError, match="the text to compare on is empty"):
        convert(source, tmp_path / "target", "int8", text="")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["infinite", "source"]


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_of_8_bit_floating_point_the_numbers_are_converted_and_the_scales_accounted_for(
    fp8: Path, tmp_path: Path, dtype: Precision
) -> None:
    """To the bit what comes of the loaded model."""
    save(load(fp8), tmp_path / "loaded")
    found, wanted = (
        convert(source, tmp_path / target, dtype)["tensors"]
        for source, target in ((fp8, "target"), (tmp_path / "loaded", "again"))
    )
    one, other = (tmp_path / name / "model.safetensors" for name in ("target", "again"))
    assert one.read_bytes() == other.read_bytes()
    assert (found["used"], found["created"]) == (wanted["used"], wanted["created"])
    assert found["used"]["model.layers.1.mlp.experts.2.up_proj.weight"]["from"] == "bfloat16"
    scales = [key for key in keys(fp8) if key.endswith("_scale_inv")]
    assert found["dropped"] == {key: f"scales, multiplied into {key.removesuffix('_scale_inv')}" for key in scales}


def test_of_8_bit_floating_point_two_matrices_are_numbers_at_a_time(
    fp8: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gate and up of one expert, or one that is written and the next; beside `kv_b_proj`, which decoding absorbs."""
    alive: list[tuple[StorageWeakRef, int]] = []
    most, whole, numbers = 0, 0, Scaled.numbers

    def counted(matrix: Scaled) -> Tensor:
        nonlocal most, whole
        made = numbers(matrix)
        if matrix.shape == kv_b:
            return made
        whole += made.nbytes
        alive[:] = [entry for entry in alive if not entry[0].expired()]
        alive.append((StorageWeakRef(made.untyped_storage()), made.nbytes))
        most = max(most, sum(size for _, size in alive))
        return made

    state = load(fp8).state_dict()
    kv_b = state["layers.0.self_attn.kv_b_proj.weight"].shape
    largest = max(tensor[0].nbytes if ".experts." in name else tensor.nbytes for name, tensor in state.items())
    monkeypatch.setattr(Scaled, "numbers", counted)
    convert(fp8, tmp_path / "target", "int8")
    assert 0 < most <= 2 * largest
    assert whole > 10 * most


def predicting(folder: Path) -> dict[str, Tensor]:
    """Puts a layer for multi-token prediction behind the model, in 8 bits where the others are; returns its tensors."""
    tensors = load_file(folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    layer = content["num_hidden_layers"]
    more = {
        key.replace(f"layers.{layer - 1}.", f"layers.{layer}."): tensor.clone()
        for key, tensor in tensors.items()
        if f"layers.{layer - 1}." in key
    }
    more[f"model.layers.{layer}.eh_proj.weight"] = torch.randn(24, 48).bfloat16()
    more[f"model.layers.{layer}.enorm.weight"] = torch.ones(24).bfloat16()
    save_file(tensors | more, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content | {"num_nextn_predict_layers": 1}))
    return more


def test_layers_for_multi_token_prediction_are_left_out_or_go_along_on_purpose(fp8: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"mtp is keep but .* has no layers for multi-token prediction"):
        convert(fp8, tmp_path / "none", "bfloat16", layout="deepseek_v3", mtp="keep")
    more = predicting(fp8)
    block, scale = (8, 4), "_scale_inv"
    expected = {
        key: Scaled(tensor, more[f"{key}{scale}"], block, torch.bfloat16).numbers()
        if f"{key}{scale}" in more
        else tensor
        for key, tensor in more.items()
        if not key.endswith(scale)
    }
    dropped = convert(fp8, tmp_path / "dropped", layout="deepseek_v3")
    reason = "multi-token prediction, which moekit does not do"
    assert {key for key, why in dropped["tensors"]["dropped"].items() if why == reason} == more.keys()
    assert json.loads((tmp_path / "dropped" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    kept = convert(fp8, tmp_path / "kept", layout="deepseek_v3", mtp="keep")
    written = load_file(tmp_path / "kept" / "model.safetensors")
    assert written.keys() == load_file(tmp_path / "dropped" / "model.safetensors").keys() | expected.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in expected.items())
    assert expected.keys() <= kept["tensors"]["used"].keys()
    assert all(key.endswith(scale) for key in kept["tensors"]["dropped"])
    assert [check for check in verify(tmp_path / "kept", tmp_path / "dropped")["checks"] if not check["held"]] == []
    again = convert(tmp_path / "kept", tmp_path / "again", "float32", layout="deepseek_v3", mtp="keep")
    assert all(check["held"] for check in again["checks"])
    wide = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(wide[key], tensor.float()) for key, tensor in expected.items())
    with pytest.raises(UnsupportedError, match="layout moekit has no place for multi-token prediction"):
        convert(fp8, tmp_path / "ours", mtp="keep")
    assert not (tmp_path / "ours").exists()

"""`verify` holds for what save and convert write, and names the check that falls for whatever is changed by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moekit import files, receipts
from moekit.config import ModelConfig
from moekit.errors import CheckpointError, ConfigError
from moekit.formats import weights
from moekit.formats.checkpoint import load, save
from moekit.formats.convert import convert
from moekit.formats.directory import MANIFEST
from moekit.formats.tokenizer import train_tokenizer
from moekit.formats.verify import verify
from moekit.nn.model import Model

Configs = Callable[..., ModelConfig]
WEIGHTS = "model.safetensors"
BIAS = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}


@pytest.fixture
def folder(tiny_config: Configs, tmp_path: Path) -> Path:
    config = tiny_config(vocab_size=280, ffn={"first_k_dense_replace": 1, "intermediate_size": 20, **BIAS})
    save(Model(config), tmp_path / "model", train_tokenizer(["the quick brown fox\n"], 280))
    return tmp_path / "model"


def reseal(folder: Path) -> None:
    """Makes receipt and manifest fit the files, so that what is tested is not the hashes."""
    if (folder / receipts.FILE).is_file():
        receipt = json.loads((folder / receipts.FILE).read_text())
        names = [entry.name for entry in folder.iterdir() if entry.name not in (MANIFEST, receipts.FILE)]
        files.write_json(folder / receipts.FILE, receipt | {"outputs": files.hashes(folder, names)})
    names = [entry.name for entry in folder.iterdir() if entry.name != MANIFEST]
    files.write_json(folder / MANIFEST, {"format": 1, "files": files.hashes(folder, names)})


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object], name: str = WEIGHTS) -> None:
    tensors = load_file(folder / name)
    tensors = {key: tensor.clone() for key, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / name)
    reseal(folder)


def fell(folder: Path, **options: Any) -> dict[str, list[str]]:
    """Returns the checks that did not hold, each with the places that it names."""
    document = verify(folder, **options)
    json.dumps(document, allow_nan=False)
    assert document["held"] == all(check["held"] for check in document["checks"])
    return {check["name"]: check.get("of", []) for check in document["checks"] if not check["held"]}


@pytest.mark.parametrize(
    ("attention", "ffn", "rest"),
    [
        ({}, {"kind": "dense"}, {}),
        ({}, {"first_k_dense_replace": 1, "intermediate_size": 20}, {"tie_word_embeddings": True}),
        ({}, {"topk_method": "hash", "n_shared_experts": 0}, {}),
        ({"kind": "mla", "q_lora_rank": 5}, BIAS, {}),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_every_check_holds_for_what_save_and_convert_write(
    tiny_config: Configs,
    tmp_path: Path,
    attention: dict[str, Any],
    ffn: dict[str, Any],
    rest: dict[str, Any],
    dtype: Any,
) -> None:
    model = Model(tiny_config(attention=attention, ffn=ffn, **rest))
    save(model, tmp_path / "saved")
    convert(tmp_path / "saved", tmp_path / "converted", dtype)
    for folder in (tmp_path / "saved", tmp_path / "converted"):
        assert fell(folder) == {}
    document = verify(tmp_path / "converted")
    assert document["parameters_by_role"] == {
        role: n for role, n in receipts.make("x", model.config, config={})["parameters_by_role"].items() if n
    }
    assert "tensors on disk or in the receipt, but not in both" in {check["name"] for check in document["checks"]}


def test_shards_hold_too_and_a_missing_one_is_named(
    tiny_config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    save(Model(tiny_config()), tmp_path / "m")
    assert fell(tmp_path / "m") == {}
    shard = sorted((tmp_path / "m").glob("*.safetensors"))[1]
    shard.unlink()
    found = fell(tmp_path / "m")
    assert found["files missing or changed since they were written"] == [shard.name]
    assert shard.name in found["outputs in the receipt that are not the files"][0]
    assert f"{shard} cannot be read as safetensors" in found["tensors, shapes and types against the config"][0]


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json", "receipt.json", "generation_config.json"])
def test_a_bit_flipped_in_any_file_is_a_changed_file(folder: Path, name: str) -> None:
    content = bytearray((folder / name).read_bytes())
    place = content.index(b"1", 100) if name == "config.json" else len(content) * 3 // 4
    content[place] ^= 2
    (folder / name).write_bytes(content)
    assert fell(folder)["files missing or changed since they were written"] == [name]


def test_without_a_manifest_or_with_a_broken_one_the_check_falls(folder: Path) -> None:
    (folder / MANIFEST).write_text("{")
    assert "Invalid JSON" in fell(folder)["files missing or changed since they were written"][0]
    (folder / MANIFEST).unlink()
    assert "cannot be read" in fell(folder)["files missing or changed since they were written"][0]


def test_a_file_put_there_later_is_told(folder: Path) -> None:
    (folder / "README.md").write_text("fine")
    shutil.copy(folder / "config.json", folder / "other.json")
    assert fell(folder) == {
        "files that the manifest does not list": ["other.json"],
        "outputs in the receipt that are not the files": ["other.json"],
    }


CHECK = {"name": "a", "value": 2.0, "bound": "<= 1", "held": False}


@pytest.mark.parametrize(
    ("change", "name", "place"),
    [
        ({"parameters_by_role": {"routed": 3}}, "roles whose parameters are not the receipt's", "routed: "),
        ({"trained_by_role": {"routed": 10**9}}, "faults in the receipt", "routed: more is trained than there is"),
        ({"checks": [{**CHECK, "held": True}]}, "faults in the receipt", "the check 'a' says that 2.0 <= 1 is True"),
        ({"checks": [{**CHECK, "value": None}]}, "checks in the receipt that did not hold", "a"),
        ({"checks": [CHECK]}, "checks in the receipt that did not hold", "a"),
        ({"checks": [{"name": "a"}]}, "faults in the receipt", "the check 'a' has no value or no bound"),
        ({"tensors": {"used": {"a": {}}, "created": {}}}, "tensors on disk or in the receipt, but not in both", "a"),
        ({"tensors": {"used": {"a": 1}, "created": {"a": 1}}}, "faults in the receipt", "a is created and used"),
        ({"outputs": {}}, "outputs in the receipt that are not the files", "config.json"),
        ({"colour": "red"}, "faults in the receipt", "colour"),
        ({"action": None}, "faults in the receipt", "action"),
    ],
)
def test_an_edited_receipt_is_found_even_under_a_manifest_that_fits(
    folder: Path, change: dict[str, Any], name: str, place: str
) -> None:
    reseal(folder)
    receipt = json.loads((folder / receipts.FILE).read_text())
    files.write_json(folder / receipts.FILE, receipt | change)
    listed = json.loads((folder / MANIFEST).read_text())
    listed["files"] |= files.hashes(folder, [receipts.FILE])
    files.write_json(folder / MANIFEST, listed)
    assert any(place in one for one in fell(folder)[name])


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_size", 16, "has shape"),
        ("vocab_size", 281, "has shape"),
        ("num_hidden_layers", 3, "has no tensor model.layers.2."),
        ("tie_word_embeddings", True, "the first lm_head.weight"),
    ],
)
def test_a_config_that_says_other_sizes_is_told_by_the_first_tensor(
    folder: Path, field: str, value: object, message: str
) -> None:
    content = json.loads((folder / "config.json").read_text())
    content["moekit"][field] = value
    files.write_json(folder / "config.json", content)
    reseal(folder)
    found = fell(folder)
    assert list(found) == ["tensors, shapes and types against the config"]
    assert message in found["tensors, shapes and types against the config"][0]


def test_weights_of_another_type_than_the_config_says_are_told(tiny_config: Configs, tmp_path: Path) -> None:
    save(Model(tiny_config()).to(torch.bfloat16), tmp_path / "m")
    content = json.loads((tmp_path / "m" / "config.json").read_text())
    files.write_json(tmp_path / "m" / "config.json", content | {"dtype": "float16"})
    reseal(tmp_path / "m")
    (places,) = fell(tmp_path / "m").values()
    assert places[0].endswith("is bfloat16, not float16")


STEM = "model.layers.1.mlp.experts"


GATE, ONE, OTHER = "model.layers.1.mlp.gate", f"{STEM}.1.down_proj.weight", f"{STEM}.4.down_proj.weight"
INFINITE = "tensors with a value that is not finite"


@pytest.mark.parametrize(
    ("change", "name", "places"),
    [
        (lambda t: t["model.norm.weight"].fill_(torch.nan), INFINITE, ["model.norm.weight"]),
        (lambda t: t[OTHER][2:3].fill_(-torch.inf), INFINITE, [OTHER]),
        (
            lambda t: t[f"{GATE}.e_score_correction_bias"][0].fill_(torch.inf),
            INFINITE,
            [f"{GATE}.e_score_correction_bias"],
        ),
        (lambda t: t[ONE].zero_(), "matrices of one value", [ONE]),
        (lambda t: t["lm_head.weight"].fill_(0.5), "matrices of one value", ["lm_head.weight"]),
        (lambda t: t[OTHER].copy_(t[ONE]), "experts' matrices that are another one's copy", [f"{OTHER} of {ONE}"]),
        (
            lambda t: t[f"{GATE}.weight"][2:4].zero_(),
            "router rows of zeros",
            [f"{GATE}.weight[2]", f"{GATE}.weight[3]"],
        ),
    ],
)
def test_a_value_that_cannot_be_is_found_where_it_is(
    folder: Path, change: Callable[[Any], object], name: str, places: list[str]
) -> None:
    rewrite(folder, change)
    assert fell(folder) == {name: places}


def test_copies_in_another_layer_or_with_one_number_changed_are_none(folder: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        copy = tensors[f"{STEM}.1.up_proj.weight"].clone()
        copy[-1, -1] += 1
        tensors[f"{STEM}.2.up_proj.weight"] = copy
        tensors["model.layers.0.mlp.up_proj.weight"][:10] = tensors[f"{STEM}.1.up_proj.weight"]

    rewrite(folder, change)
    assert fell(folder) == {}


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_scales_and_codes_that_do_not_belong_together_are_found(folder: Path, tmp_path: Path, dtype: Any) -> None:
    key = f"{STEM}.2.gate_proj.weight"

    def largest_code_lost(tensors: dict[str, Tensor]) -> None:
        tensors[key][3] = 1 if dtype == "int8" else 0x99

    def scale_lost(tensors: dict[str, Tensor]) -> None:
        tensors[f"{key}_scale"][1] = 0

    def scale_infinite(tensors: dict[str, Tensor]) -> None:
        tensors[f"{key}_scale"][1] = float("inf")

    for number, change in enumerate((largest_code_lost, scale_lost)):
        convert(folder, tmp_path / f"{number}", dtype)
        rewrite(tmp_path / f"{number}", change)
        assert fell(tmp_path / f"{number}") == {"matrices in codes whose scales do not fit": [key]}
    convert(folder, tmp_path / "infinite", dtype)
    rewrite(tmp_path / "infinite", scale_infinite)
    assert fell(tmp_path / "infinite") == {"tensors with a value that is not finite": [key]}


def test_a_table_that_was_never_filled_is_found(tiny_config: Configs, tmp_path: Path) -> None:
    model = Model(tiny_config(ffn={"topk_method": "hash", "hash_method": "balanced"}))
    save(model, tmp_path / "m")
    tables = [f"model.layers.{layer}.mlp.gate.hash_table" for layer in range(2)]
    assert fell(tmp_path / "m") == {"hash tables with an expert that does not exist": tables}
    model.balance_hash(torch.arange(61))
    save(model, tmp_path / "m", overwrite=True)
    assert fell(tmp_path / "m") == {}


def test_against_another_precision_its_own_bounds_hold(folder: Path, tmp_path: Path) -> None:
    for dtype in ("bfloat16", "int8"):
        convert(folder, tmp_path / dtype, dtype)  # type: ignore[arg-type]
        document = verify(tmp_path / dtype, folder, text="the quick brown fox jumps over the lazy dog")
        checks = {check["name"]: check for check in document["checks"]}
        assert 0 < checks["largest relative RMS difference of a tensor"]["value"] < 0.02
        assert checks["mean KL divergence of the next token, nats"]["logits_max"] > 0
        assert len(checks["tokens with the same experts, in the worst layer"]["by_layer"]) == 1
        assert document["held"]
    assert fell(folder, against=folder) == {}


def test_against_a_model_of_another_shape_only_what_it_computes_is_compared(
    folder: Path, tiny_config: Configs, tmp_path: Path
) -> None:
    save(Model(tiny_config(vocab_size=280, ffn={"n_routed_experts": 5})), tmp_path / "other")
    document = verify(folder, tmp_path / "other")
    assert any("other tensors" in note for note in document["notes"])
    assert any("other layers of experts" in note for note in document["notes"])
    assert "mean KL divergence of the next token, nats" in fell(folder, against=tmp_path / "other")
    save(Model(tiny_config(vocab_size=61)), tmp_path / "small")
    assert fell(folder, against=tmp_path / "small") == {"vocabularies of different size": ["280 and 61"]}


@pytest.mark.parametrize(
    ("layout", "attention", "ffn"),
    [
        ("deepseek", {}, {"first_k_dense_replace": 1, "intermediate_size": 20}),
        ("deepseek_v2", {"kind": "mla", "q_lora_rank": 5}, {}),
        (
            "deepseek_v3",
            {"kind": "mla", "q_lora_rank": 5},
            {"norm_topk_prob": True, **BIAS},
        ),
        ("mixtral", {}, {"n_shared_experts": 0, "norm_topk_prob": True}),
        ("qwen2_moe", {"attention_bias": "qkv"}, {"shared_expert_gate": True}),
        ("llama", {}, {"kind": "dense"}),
    ],
)
def test_another_librarys_directory_holds_with_and_without_what_only_moekit_writes(
    tiny_config: Configs, tmp_path: Path, layout: str, attention: dict[str, Any], ffn: dict[str, Any]
) -> None:
    model = Model(tiny_config(hidden_size=24, attention=attention, ffn=ffn))
    save(model, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "theirs", layout=layout)
    assert fell(tmp_path / "theirs", against=tmp_path / "ours") == {}
    (tmp_path / "theirs" / MANIFEST).unlink()
    assert "files missing or changed since they were written" in fell(tmp_path / "theirs")
    (tmp_path / "theirs" / receipts.FILE).unlink()
    document = verify(tmp_path / "theirs", tmp_path / "ours")
    assert document["held"]
    assert document["notes"][:2] == [
        f"there is no {name}; only moekit writes one" for name in (MANIFEST, receipts.FILE)
    ]
    assert fell(tmp_path / "ours", against=tmp_path / "theirs") == {}


def test_weights_in_8_bit_floating_point_are_verified_and_compared(fp8: Path, tmp_path: Path) -> None:
    convert(fp8, tmp_path / "bf16", "bfloat16")
    assert fell(fp8) == {}
    assert fell(fp8, against=fp8) == {}
    assert fell(fp8, against=tmp_path / "bf16") == {}
    tensors = {key: tensor.clone() for key, tensor in load_file(fp8 / WEIGHTS).items()}
    stem = "model.layers.1.mlp.experts"
    for behind in ("", "_scale_inv"):
        tensors[f"{stem}.5.down_proj.weight{behind}"] = tensors[f"{stem}.4.down_proj.weight{behind}"].clone()
    tensors["model.layers.0.mlp.up_proj.weight_scale_inv"][0, 0] = torch.inf
    save_file(tensors, fp8 / WEIGHTS)
    assert fell(fp8) == {
        "tensors with a value that is not finite": ["model.layers.0.mlp.up_proj.weight"],
        "experts' matrices that are another one's copy": [f"{stem}.5.down_proj.weight of {stem}.4.down_proj.weight"],
    }


def test_tensors_are_told_by_the_names_that_they_have_on_disk(tiny_config: Configs, tmp_path: Path) -> None:
    model = Model(tiny_config(ffn={"n_shared_experts": 0, "norm_topk_prob": True}))
    with torch.no_grad():
        model.moe_layers[1].experts.down_proj[3] = model.moe_layers[1].experts.down_proj[2]
        model.moe_layers[0].router.weight[4] = 0
    save(model, tmp_path / "m", layout="mixtral")
    stem = "model.layers.1.block_sparse_moe.experts"
    assert fell(tmp_path / "m") == {
        "experts' matrices that are another one's copy": [f"{stem}.3.w2.weight of {stem}.2.w2.weight"],
        "router rows of zeros": ["model.layers.0.block_sparse_moe.gate.weight[4]"],
    }


def test_what_cannot_be_read_at_all_is_an_error(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nothing is not a directory"):
        verify(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="nothing is not a directory"):
        verify(folder, tmp_path / "nothing")
    with pytest.raises(ConfigError, match="--text is what the two models are compared on; it needs --against"):
        verify(folder, text="a")
    (folder / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="says model_type None"):
        verify(folder)


def test_progress_comes_to_the_end_of_files_and_weights(folder: Path) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}
    verify(folder, progress=lambda phase, done, total: seen.setdefault(phase, []).append((done, total)))
    assert list(seen) == ["files", "weights"]
    for steps in seen.values():
        assert steps == sorted(steps)
        assert steps[-1][0] == steps[-1][1] > 0
    model = load(folder)
    assert seen["weights"][-1][1] == sum(t.nbytes for t in model.state_dict().values())

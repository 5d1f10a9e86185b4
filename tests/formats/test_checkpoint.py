"""load(save(x)) is x to the bit, with DeepSeek's names on disk; whatever is wrong on disk is a clear error."""

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moekit import files, receipts
from moekit.config import ModelConfig
from moekit.errors import CheckpointError
from moekit.formats import weights
from moekit.formats.checkpoint import load, load_config, save
from moekit.formats.directory import MANIFEST, check_directory
from moekit.formats.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from moekit.formats.weights import INDEX
from moekit.nn.model import Model
from moekit.nn.quantized import quantize_
from moekit.ops.quantize import Codes

Configs = Callable[..., ModelConfig]

KINDS: dict[str, dict[str, Any]] = {
    "dense": {"ffn": {"kind": "dense"}},
    "moe": {"ffn": {"first_k_dense_replace": 1, "intermediate_size": 20}},
    "no shared": {"ffn": {"n_shared_experts": 0}},
    "hash random": {"ffn": {"topk_method": "hash"}},
    "hash balanced": {"ffn": {"topk_method": "hash", "hash_method": "balanced"}},
    "bias": {"ffn": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "bias_update_speed": 0.1}},
    "mla": {"attention": {"kind": "mla", "q_lora_rank": 5}},
    "tied": {"tie_word_embeddings": True},
}


def built(config: ModelConfig, device: torch.device | str = "cpu") -> Model:
    """Returns a model whose every tensor has been moved from where it began, bias and hash table included."""
    model = Model(config)
    model.balance_hash(torch.arange(config.vocab_size) % 7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_()
    return model.to(device).eval()


def assert_same(a: Model, b: Model) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name


def reseal(folder: Path) -> None:
    """Writes a manifest that fits the files, so that what is tested is not the hashes."""
    names = [entry.name for entry in folder.iterdir() if entry.name != MANIFEST]
    files.write_json(folder / MANIFEST, {"format": 1, "files": files.hashes(folder, names)})


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the quick brown fox jumps over the lazy dog 0123456789\n", "床前明月光"], 280)


@pytest.fixture
def moe(tiny_config: Configs, tmp_path: Path) -> Path:
    """A small MoE model on disk."""
    save(built(tiny_config(**KINDS["moe"])), tmp_path / "moe")
    return tmp_path / "moe"


@pytest.mark.parametrize("kind", KINDS)
def test_load_gives_back_what_save_took_to_the_bit(
    tiny_config: Configs, tmp_path: Path, device: torch.device, kind: str
) -> None:
    model = built(tiny_config(**KINDS[kind]), device)
    save(model, tmp_path / "m")
    again = load(tmp_path / "m", device)
    assert again.config == model.config
    assert not again.training
    assert {p.device.type for p in again.parameters()} == {device.type}
    assert all(p.requires_grad for p in again.parameters())
    assert_same(model, again)
    ids = torch.randint(0, model.config.vocab_size, (2, 9), device=device)
    assert torch.equal(model(ids).logits, again(ids).logits)


def test_tied_embeddings_are_one_tensor_on_disk_and_one_parameter_after(tiny_config: Configs, tmp_path: Path) -> None:
    save(built(tiny_config(tie_word_embeddings=True)), tmp_path / "m")
    assert "lm_head.weight" not in load_file(tmp_path / "m" / "model.safetensors")
    again = load(tmp_path / "m")
    assert again.lm_head.weight is again.embed_tokens.weight


def test_bfloat16_weights_stay_and_the_selection_bias_stays_float32(tiny_config: Configs, tmp_path: Path) -> None:
    model = built(tiny_config(**KINDS["bias"])).to(torch.bfloat16)
    save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    assert_same(model, load(tmp_path / "m"))
    bias = load(tmp_path / "m").moe_layers[0].router.expert_bias
    assert bias is not None
    assert bias.dtype == torch.float32
    assert (bias != 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_converts_all_but_the_bias_and_the_table(
    tiny_config: Configs, tmp_path: Path, dtype: torch.dtype
) -> None:
    for kind, kept in (("bias", "expert_bias"), ("hash random", "table")):
        model = built(tiny_config(**KINDS[kind]))
        save(model, tmp_path / kind)
        again = load(tmp_path / kind, dtype=dtype).state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(again[name], value if name.endswith(kept) else value.to(dtype)), name


@pytest.mark.parametrize("shard_bytes", [1, 3000])
def test_shards_and_their_index_hold_the_same_model(
    tiny_config: Configs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    model = built(tiny_config())
    save(model, tmp_path / "one")
    monkeypatch.setattr(weights, "SHARD_BYTES", shard_bytes)
    save(model, tmp_path / "many")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert [file.name for file in shards] == [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)
    ]
    whole = load_file(tmp_path / "one" / "model.safetensors")
    index = json.loads((tmp_path / "many" / INDEX).read_text())
    found = {}
    for file in shards:
        part = load_file(file)
        assert len(part) == 1 or sum(t.numel() * t.element_size() for t in part.values()) <= shard_bytes
        found |= dict.fromkeys(part, file.name)
        for key, value in part.items():
            assert torch.equal(value, whole[key])
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in whole.values())
    assert_same(model, load(tmp_path / "many"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("codes", ["int8", "int4"])
def test_a_model_in_codes_comes_back_to_the_bit_whatever_dtype_is_asked_for(
    tiny_config: Configs, tmp_path: Path, kind: str, codes: Codes
) -> None:
    model = built(tiny_config(**KINDS[kind]))
    quantize_(model, codes)
    save(model, tmp_path / "model")
    again = load(tmp_path / "model")
    assert again.quantization == codes
    assert not any(parameter.requires_grad for parameter in again.parameters())
    assert_same(model, again)
    assert_same(model.to(torch.bfloat16), load(tmp_path / "model", dtype=torch.bfloat16))


def test_in_codes_each_matrix_of_an_expert_has_its_scales(tiny_config: Configs, tmp_path: Path) -> None:
    model = built(tiny_config())
    quantize_(model, "int4")
    save(model, tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    stem = "model.layers.1.mlp.experts.3.up_proj.weight"
    experts = model.layers[1].mlp.experts.gate_up_proj  # 10 wide, dim 18: one group
    assert torch.equal(weights[stem], experts.codes[3, 10:])
    assert torch.equal(weights[f"{stem}_scale"], experts.scales[3, 10:])
    assert (weights[stem].shape, weights[stem].dtype) == ((10, 16), torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (None, "tensors that the config has no place for|has shape"),
        ({"dtype": "int8", "group_size": 32}, "has shape|has dtype"),
        ({"dtype": "int2", "group_size": 32}, "dtype"),
        ({"dtype": "int4", "group_size": 64}, "group_size"),
        ({"dtype": "int4", "group_size": 32, "zero": True}, "zero"),
    ],
)
def test_another_quantization_in_the_config_is_refused(
    tiny_config: Configs, tmp_path: Path, change: dict[str, Any] | None, message: str
) -> None:
    model = built(tiny_config())
    quantize_(model, "int4")
    save(model, tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    content["quantization"] = change
    if change is None:
        del content["quantization"]
    files.write_json(tmp_path / "model" / "config.json", content)
    reseal(tmp_path / "model")
    assert re.search(message, refusal(tmp_path / "model"))


def test_on_disk_each_expert_has_deepseeks_three_matrices(tiny_config: Configs, tmp_path: Path) -> None:
    model = built(tiny_config(**KINDS["bias"]))
    save(model, tmp_path / "m")
    disk = load_file(tmp_path / "m" / "model.safetensors")
    ff = model.config.ffn.moe_intermediate_size  # type: ignore[union-attr]
    for i, layer in enumerate(model.moe_layers):
        stem = f"model.layers.{i}.mlp"
        for e in range(layer.config.n_routed_experts):
            assert torch.equal(disk[f"{stem}.experts.{e}.gate_proj.weight"], layer.experts.gate_up_proj[e, :ff])
            assert torch.equal(disk[f"{stem}.experts.{e}.up_proj.weight"], layer.experts.gate_up_proj[e, ff:])
            assert torch.equal(disk[f"{stem}.experts.{e}.down_proj.weight"], layer.experts.down_proj[e])
        assert torch.equal(disk[f"{stem}.gate.weight"], layer.router.weight)
        assert torch.equal(disk[f"{stem}.gate.e_score_correction_bias"], layer.router.expert_bias)
        assert torch.equal(disk[f"{stem}.shared_experts.up_proj.weight"], layer.shared_experts.up_proj.weight)
    assert torch.equal(disk["lm_head.weight"], model.lm_head.weight)
    assert torch.equal(disk["model.embed_tokens.weight"], model.embed_tokens.weight)
    assert len(disk) == 3 + 2 * (6 + 3 * 7 + 5)  # ends; per layer: attention and norms, experts, gate and shared


def test_transformers_reads_the_tokenizer(tiny_config: Configs, tmp_path: Path, tokenizer: Tokenizer) -> None:
    save(built(tiny_config(vocab_size=280)), tmp_path / "m", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    text = "the lazy fox 明月 42 <|endoftext|> é\n"
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.decode(tokenizer.encode(text)) == text
    assert theirs.encode("the lazy fox 明月 42") == tokenizer.encode("the lazy fox 明月 42")
    assert load_tokenizer(tmp_path / "m").fingerprint == tokenizer.fingerprint
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_id


def test_the_receipt_lists_what_was_written(tiny_config: Configs, tmp_path: Path, tokenizer: Tokenizer) -> None:
    receipt = save(built(tiny_config()), tmp_path / "m", tokenizer=tokenizer)
    assert receipt == json.loads((tmp_path / "m" / receipts.FILE).read_text())
    files = check_directory(tmp_path / "m")
    assert set(receipt["outputs"]) == set(files) - {receipts.FILE}
    assert {"model.safetensors", "config.json", "tokenizer.json", "generation_config.json"} <= set(receipt["outputs"])
    assert receipt["outputs"].items() <= files.items()
    assert set(files) == {*receipt["outputs"], "generation_config.json", receipts.FILE}


def test_a_missing_tensor_is_named(moe: Path) -> None:
    tensors = load_file(moe / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.3.up_proj.weight"]
    save_file(tensors, moe / "model.safetensors")
    reseal(moe)
    assert "has no tensor model.layers.1.mlp.experts.3.up_proj.weight" in refusal(moe)


def test_a_left_over_tensor_is_named(moe: Path) -> None:
    tensors = load_file(moe / "model.safetensors")
    tensors["model.layers.1.mlp.experts.7.up_proj.weight"] = torch.zeros(10, 18)
    save_file(tensors, moe / "model.safetensors")
    reseal(moe)
    assert "1 tensors that the config has no place for" in refusal(moe)
    assert "experts.7.up_proj" in refusal(moe)


@pytest.mark.parametrize(
    "key", ["model.norm.weight", "model.layers.1.mlp.experts.0.down_proj.weight", "model.layers.1.mlp.gate.weight"]
)
def test_a_wrong_shape_or_kind_is_named(moe: Path, key: str) -> None:
    tensors = load_file(moe / "model.safetensors")
    good = tensors[key]
    for wrong, message in (
        (good[..., 1:].contiguous(), f"{key} in .* has shape .* but the config asks for"),
        (good[None].contiguous(), f"{key} in .* has shape .* but the config asks for"),
        (good.to(torch.int64), f"{key} in .* has dtype torch.int64 but the model holds torch.float32"),
    ):
        save_file({**tensors, key: wrong}, moe / "model.safetensors")
        reseal(moe)
        with pytest.raises(CheckpointError, match=message):
            load(moe)


def test_experts_of_two_precisions_are_refused_not_rounded(moe: Path) -> None:
    tensors = load_file(moe / "model.safetensors")
    key = "model.layers.1.mlp.experts.0.gate_proj.weight"  # the first piece would decide for all
    save_file({**tensors, key: tensors[key].bfloat16()}, moe / "model.safetensors")
    reseal(moe)
    assert "has dtype torch.float32 but the model holds torch.bfloat16" in refusal(moe)


def test_a_config_that_is_not_ours_is_refused(moe: Path) -> None:
    good = json.loads((moe / "config.json").read_text())
    for change, message in (
        ({"model_type": "llame"}, "says model_type 'llame' (did you mean llama?) but only moekit, deepseek"),
        ({"moekit": None}, "model is null but must be a mapping of settings"),
        ({"moekit": {**good["moekit"], "n_layers": 3}}, "n_layers"),
        ({"moekit": {**good["moekit"], "hidden_sise": 3}}, "did you mean hidden_size?"),
        ({"moekit": {**good["moekit"], "hidden_size": "18"}}, "hidden_size"),
        ({"moekit": {k: v for k, v in good["moekit"].items() if k != "attention"}}, "attention"),
    ):
        (moe / "config.json").write_text(json.dumps(good | change))
        reseal(moe)
        assert message in refusal(moe)
        assert str(moe / "config.json") in refusal(moe)


def test_a_config_of_another_size_is_never_another_model(moe: Path) -> None:
    good = json.loads((moe / "config.json").read_text())
    for key, value in (("hidden_size", 16), ("num_hidden_layers", 1), ("num_hidden_layers", 3), ("vocab_size", 60)):
        (moe / "config.json").write_text(json.dumps({**good, "moekit": {**good["moekit"], key: value}}))
        reseal(moe)
        refusal(moe)


def test_a_byte_changed_anywhere_in_any_file_is_an_error(
    tiny_config: Configs, tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    folder = tmp_path / "m"
    save(built(tiny_config()), folder, tokenizer=tokenizer)
    names = sorted(entry.name for entry in folder.iterdir())
    assert len(names) >= 9
    draw = random.Random(7)
    for name in names:
        content = (folder / name).read_bytes()
        for place in {0, len(content) - 2, *(draw.randrange(len(content) - 1) for _ in range(4))}:
            changed = bytearray(content)
            changed[place] ^= 1 << draw.randrange(8)
            (folder / name).write_bytes(changed)
            refusal(folder)
        (folder / name).write_bytes(content[: draw.randrange(len(content) - 1)])
        refusal(folder)
        (folder / name).unlink()
        refusal(folder)
        (folder / name).write_bytes(content)
    load(folder)


def test_a_cut_weight_file_is_an_error_even_under_a_manifest_that_fits(moe: Path) -> None:
    content = (moe / "model.safetensors").read_bytes()
    for length in (0, 7, 100, len(content) - 1):
        (moe / "model.safetensors").write_bytes(content[:length])
        reseal(moe)
        assert "cannot be read as safetensors" in refusal(moe)


def test_an_index_cannot_lead_elsewhere(moe: Path) -> None:
    shutil.copy(moe / "model.safetensors", moe.parent / "evil.safetensors")
    files.write_json(moe / INDEX, {"weight_map": {"model.norm.weight": "../evil.safetensors"}})
    assert "is not listed in manifest.json" in refusal(moe)
    reseal(moe)
    assert "weight_map.model.norm.weight: String should match pattern" in refusal(moe)
    assert "found '../evil.safetensors'" in refusal(moe)
    files.write_json(moe / INDEX, {"weight_map": ["model.safetensors"]})
    reseal(moe)
    assert "weight_map: Input should be an object, found ['model.safetensors']" in refusal(moe)


def test_a_tensor_that_is_in_two_shards_is_refused(moe: Path) -> None:
    shutil.copy(moe / "model.safetensors", moe / "other.safetensors")
    files.write_json(moe / INDEX, {"weight_map": {"a": "model.safetensors", "b": "other.safetensors"}})
    reseal(moe)
    assert "is in other.safetensors and again in another file" in refusal(moe)


def test_a_folder_that_is_no_checkpoint_is_one_clear_line(tmp_path: Path) -> None:
    assert "is not a directory" in refusal(tmp_path / "nothing")
    assert "has no manifest.json" in refusal(tmp_path)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_config(tmp_path)


def test_save_refuses_a_directory_that_exists_and_load_still_reads_it(tiny_config: Configs, tmp_path: Path) -> None:
    first, second = built(tiny_config()), built(tiny_config())
    save(first, tmp_path / "m")
    with pytest.raises(CheckpointError, match="exists already"):
        save(second, tmp_path / "m")
    assert_same(first, load(tmp_path / "m"))
    save(second, tmp_path / "m", overwrite=True)
    assert_same(second, load(tmp_path / "m"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_leaves_nothing_behind_and_the_older_checkpoint_whole(
    tiny_config: Configs, small_disk: Path
) -> None:
    old = built(tiny_config(hidden_size=8))
    save(old, small_disk / "old")
    before = shutil.disk_usage(small_disk).free
    new = built(tiny_config(hidden_size=48))
    for name, overwrite in (("new", False), ("old", True)):
        with pytest.raises(
            CheckpointError, match=f"{name} could not be written: .*; nothing was left behind"
        ) as caught:
            save(new, small_disk / name, overwrite=overwrite)
        assert "\n" not in str(caught.value)
    assert [entry.name for entry in small_disk.iterdir()] == ["old"]
    assert shutil.disk_usage(small_disk).free == before
    assert_same(old, load(small_disk / "old"))


@pytest.mark.parametrize("limit", [500, 5_000, 40_000])
def test_a_file_size_limit_leaves_nothing_behind(
    tiny_config: Configs, tmp_path: Path, tokenizer: Tokenizer, limit: int
) -> None:
    model = built(tiny_config(hidden_size=24))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # python ignores the signal that comes with it
    try:
        with pytest.raises(CheckpointError, match="m could not be written") as caught:
            save(model, tmp_path / "m", tokenizer=tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, sys, torch
from pathlib import Path
from moekit.config import ModelConfig
from moekit.formats.checkpoint import save
from moekit.nn.model import Model
from moekit.nn.quantized import quantize_
from moekit.ops.quantize import Codes

torch.set_num_threads(1)
out = Path(sys.argv[1])
model = Model(ModelConfig.model_validate_json(sys.argv[2]))
for line in sys.stdin:  # a number per line: a process that saves again and again, its models filled with that number
    child = os.fork()
    if child == 0:
        for tensor in model.parameters():
            tensor.data.fill_(float(line))
        sys.stdout.write(f"{os.getpid()}\\n")
        sys.stdout.flush()
        while True:
            save(model, out, overwrite=True)
    os.waitpid(child, 0)
    sys.stdout.write("dead\\n")
    sys.stdout.flush()
"""


def test_a_save_killed_at_any_moment_leaves_a_directory_that_loads_or_none(
    tiny_config: Configs, tmp_path: Path
) -> None:
    config = tiny_config(tie_word_embeddings=True)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "m"), config.model_dump_json()]
    draw, found = random.Random(3), 0
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number in range(1, 21):
            process.stdin.write(f"{number}\n")
            process.stdin.flush()
            child = int(process.stdout.readline())
            time.sleep(draw.uniform(0, 0.06 * 1.1**number))  # longer and longer, for a slow machine
            os.kill(child, signal.SIGKILL)
            assert process.stdout.readline() == "dead\n"
            if (tmp_path / "m").exists():
                found += 1
                values = {v for p in load(tmp_path / "m").parameters() for v in p.detach().unique().tolist()}
                assert len(values) == 1  # one save's tensors, never a mixture of two
                assert values <= set(range(1, number + 1))
        process.stdin.close()
    assert found  # a slow machine may lose some, not all


def test_a_head_that_is_tied_no_more_is_not_lost(tiny_config: Configs, tmp_path: Path) -> None:
    model = Model(tiny_config(tie_word_embeddings=True))
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    with pytest.raises(CheckpointError, match=r"lm_head.weight is another than the embedding, but tie_word_embeddings"):
        save(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()

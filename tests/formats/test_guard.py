"""A stranger's directory: whatever lies in it is refused in one line that says what to do, at once and in no memory."""

import json
import os
import pickle
import resource
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moekit.config import ModelConfig
from moekit.errors import CheckpointError
from moekit.formats import weights
from moekit.formats.checkpoint import load, load_config, save
from moekit.formats.directory import MANIFEST
from moekit.formats.safetensors import HEADER_BYTES, Safetensors
from moekit.formats.tokenizer import load_tokenizer, train_tokenizer
from moekit.formats.weights import INDEX
from moekit.nn.model import Model


@pytest.fixture
def folder(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> Path:
    """A small model with its tokenizer and without a manifest, so that what is tested is not the hashes."""
    tokenizer = train_tokenizer(["the quick brown fox\n"], 280)
    save(Model(tiny_config(vocab_size=280)), tmp_path / "model", tokenizer)
    (tmp_path / "model" / MANIFEST).unlink()
    return tmp_path / "model"


def refusal(folder: Path, read: Callable[..., Any] = load, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        read(folder, **({"check_hashes": False} | options if read is load else options))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def header(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites a safetensors header under its right length."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    entries = json.loads(content[8 : 8 + length])
    change(entries)
    text = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json", "receipt.json"])
def test_a_link_out_of_the_directory_is_refused_by_every_reader(folder: Path, name: str) -> None:
    (folder / name).rename(folder.parent / name)
    (folder / name).symlink_to(folder.parent / name)
    message = f"{folder / name} is a link that leads out of its directory, to {folder.parent / name}; put a copy there"
    assert refusal(folder) == refusal(folder, load_config) == message
    if name == "tokenizer.json":
        assert refusal(folder, load_tokenizer) == message
    else:
        load_tokenizer(folder)  # the shards of prepared data may well lie on another disk
    (folder / name).unlink()
    (folder / name).symlink_to(Path("..") / name)
    assert "leads out of its directory" in refusal(folder)


def test_a_link_inside_and_a_link_to_the_directory_itself_are_fine(folder: Path) -> None:
    (folder / "config.json").rename(folder / "real.json")
    (folder / "config.json").symlink_to("real.json")
    (folder.parent / "link").symlink_to(folder)
    load(folder.parent / "link", check_hashes=False)


def test_a_snapshot_in_a_hugging_face_cache_may_link_to_its_blobs_and_nowhere_else(folder: Path) -> None:
    cache = folder.parent / "models--me--model"
    snapshot = cache / "snapshots" / "0123abcd"
    (cache / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(cache / "blobs" / str(number))
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    load(snapshot, check_hashes=False)
    (folder.parent / "secret.json").write_text("{}")
    (snapshot / "extra.json").symlink_to("../../../secret.json")
    assert "extra.json is a link that leads out of its directory" in refusal(snapshot)
    (snapshot / "extra.json").unlink()
    cache.rename(folder.parent / "no-cache")  # the same links where no cache is
    assert "leads out of its directory" in refusal(folder.parent / "no-cache" / "snapshots" / "0123abcd")


def test_links_in_a_circle_pipes_and_links_to_nothing_are_no_files(folder: Path) -> None:
    (folder / "a.json").symlink_to("b.json")
    (folder / "b.json").symlink_to("a.json")
    assert "cannot be followed to a file" in refusal(folder)
    (folder / "a.json").unlink()  # b leads to nothing now, and nobody wants it
    load(folder, check_hashes=False)
    (folder / "tokenizer.json").unlink()
    os.mkfifo(folder / "tokenizer.json")  # a reader would wait for ever
    assert "tokenizer.json is neither a file nor a directory" in refusal(folder, load_tokenizer)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "last.ckpt"])
def test_pickles_are_refused_with_the_way_out(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"a": torch.zeros(2)}, folder / name)
    assert f"{name}: a pickle, which can run any code" in refusal(folder)
    assert "ask for the model in safetensors, or where you trust it" in refusal(folder)
    assert f"{name} is a pickle" in refusal(folder / name)


@pytest.mark.parametrize("kind", ["zip", "legacy", "plain 2", "plain 4", "plain 5"])
def test_a_pickle_named_safetensors_is_known_by_its_content_and_never_run(folder: Path, kind: str) -> None:
    file = folder / "model.safetensors"
    if kind.startswith("plain"):
        file.write_bytes(pickle.dumps(_Trap(), protocol=int(kind[-1])))
    else:
        torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=kind == "zip")
    assert f"{file} is not safetensors but a pickle, which can run any code" in refusal(folder)
    assert not _Trap.sprung


class _Trap:
    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return setattr, (_Trap, "sprung", True)


def test_a_pickle_beside_safetensors_is_left_alone(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"whatever")
    load(folder, check_hashes=False)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**62, 2**63, 2**64 - 1])
def test_a_header_of_any_length_is_refused_at_once(folder: Path, length: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    assert "cannot be read as safetensors" in refusal(folder)


def test_a_header_as_long_as_its_file_allows_is_not_parsed(folder: Path) -> None:
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 90_000_000))
        file.truncate(90_000_008)
    assert f"a header of 90000000 bytes, more than the {HEADER_BYTES} allowed" in refusal(folder)


KEY, OTHER = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h: h[KEY].update(data_offsets=h[OTHER]["data_offsets"]), "invalid offset"),
        (lambda h: h[KEY].update(data_offsets=[h[KEY]["data_offsets"][0] + 4, h[KEY]["data_offsets"][1]]), "invalid"),
        (lambda h: h.pop(KEY), "invalid offset|not fully covered"),
        (lambda h: h[KEY].update(shape=[2**62, 4]), "overflow"),
        (lambda h: h[KEY].update(shape=[-1]), "invalid"),
        (lambda h: h[KEY].update(dtype="F64"), "invalid shape"),
        (lambda h: h[KEY].update(dtype="I32"), f"{KEY} in .* has dtype torch.int32 but the model holds torch.float32"),
        (lambda h: h[KEY].update(dtype="C64", shape=[24, 9]), f"{KEY} in .* has type C64; read are F64, F32"),
        (lambda h: h[KEY].update(dtype="F6_E2M3", shape=[24, 96]), f"{KEY} in .* has type F6_E2M3; read are F64"),
        (lambda h: h[KEY].update(dtype="F4", shape=[24, 144]), f"{KEY} in .* has type F4"),
        (lambda h: h.update({"../x": h.pop(KEY)}), f"has no tensor {KEY}"),
        (lambda h: h.update({"x\n\x1b[31m": h.pop(KEY)}), r"names a tensor 'x\\n\\x1b\[31m', which is no name"),
        (lambda h: h.update({"": h.pop(KEY)}), "names a tensor '', which is no name"),
    ],
)
def test_a_header_that_lies_is_refused(folder: Path, change: Callable[[Any], object], message: str) -> None:
    header(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        load(folder, check_hashes=False)


def test_two_tensors_of_one_name_are_refused_where_the_library_takes_the_last(tmp_path: Path) -> None:
    one = '"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    two = '"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    text = f"{{{one},{two}}}".encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    assert list(load_file(tmp_path / "x.safetensors")) == ["a"]
    with pytest.raises(CheckpointError, match="cannot be read as safetensors: the key 'a' is there twice"):
        Safetensors(tmp_path / "x.safetensors")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a file of this size would take that much disk")
def test_a_file_larger_than_the_memory_is_mapped(tmp_path: Path) -> None:
    size = 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    text = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    with (tmp_path / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + size)
        file.seek(-1, os.SEEK_END)
        file.write(b"\7")
    tensor = Safetensors(tmp_path / "x.safetensors").tensor("a")
    assert tensor.shape == (size,)
    assert tensor[-2:].tolist() == [0, 7]


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_a_key_that_is_twice_in_a_file_of_json_is_refused(folder: Path, name: str) -> None:
    text = (folder / name).read_text()
    key = "vocab_size" if name == "config.json" else "eos_token"
    (folder / name).write_text(text.replace(f'"{key}"', f'"{key}": 3, "{key}"', 1))
    read = load if name == "config.json" else load_tokenizer
    assert f"{name}: the key '{key}' is there twice" in refusal(folder, read)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("key", [KEY, "model.norm.weight", "model.layers.1.mlp.experts.3.up_proj.weight"])
def test_a_weight_that_is_not_finite_is_named(folder: Path, key: str, value: float) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[key].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors")
    assert f"{key} in {folder} has a value that is not finite" in refusal(folder)
    load(folder, check_hashes=False, mapped=True)  # reads no values yet


@pytest.mark.parametrize("entry", [7, -2, 2**40])
def test_a_hash_table_with_an_expert_that_does_not_exist_is_refused(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path, entry: int
) -> None:
    save(Model(tiny_config(ffn={"topk_method": "hash"})), tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors["model.layers.1.mlp.gate.hash_table"][3, 1] = entry
    save_file(tensors, tmp_path / "m" / "model.safetensors")
    for mapped in (False, True):
        message = refusal(tmp_path / "m", mapped=mapped)
        assert f"has entries from {min(0, entry)} to {max(6, entry)} but the experts are 0 to 6" in message


def test_half_of_one_kind_read_as_the_other_is_refused(tiny_config: Callable[..., ModelConfig], tmp_path: Path) -> None:
    save(Model(tiny_config()).to(torch.bfloat16), tmp_path / "m")
    header(tmp_path / "m" / "model.safetensors", lambda h: h[KEY].update(dtype="F16"))
    assert f"{KEY} in {tmp_path / 'm'} is torch.float16 but others are torch.bfloat16" in refusal(tmp_path / "m")


FIELDS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "attention.num_attention_heads", "attention.head_dim",
    "ffn.n_routed_experts", "ffn.n_shared_experts", "ffn.moe_intermediate_size",
)  # fmt: skip


@pytest.mark.parametrize("huge", [10**6, 10**12, 10**30])
@pytest.mark.parametrize("field", FIELDS)
def test_a_config_that_claims_more_than_the_files_hold_costs_nothing(folder: Path, field: str, huge: int) -> None:
    content = json.loads((folder / "config.json").read_text())
    *parents, leaf = field.split(".")
    part = content["moekit"]
    for key in parents:
        part = part[key]
    part[leaf] = huge
    (folder / "config.json").write_text(json.dumps(content))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    message = refusal(folder)
    assert "but its config claims" in message or "num_hidden_layers is" in message
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


def test_a_json_file_of_any_size_is_not_read(folder: Path) -> None:
    for name, read in (("config.json", load), ("tokenizer.json", load_tokenizer)):
        with (folder / name).open("ab") as file:
            file.truncate(10**12)
        assert f"{name} has 1000000000000 bytes, more than" in refusal(folder, read)


def test_a_tokenizer_whose_ids_would_fill_the_memory_is_refused(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["zz"] = 2**32 - 1
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert "tokens with ids up to 4294967295, which no model has" in refusal(folder, load_tokenizer)


def test_an_index_that_points_to_the_wrong_shard_is_refused(
    tiny_config: Callable[..., ModelConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "SHARD_BYTES", 20_000)
    save(Model(tiny_config()), tmp_path / "m")
    content = json.loads((tmp_path / "m" / INDEX).read_text())
    names = sorted(set(content["weight_map"].values()))
    for change, message in (
        ({KEY: names[-1]}, f"says that '{KEY}' is in {names[-1]}, where it is not"),
        ({"model.no.weight": names[0]}, "says that 'model.no.weight' is in"),
        ({KEY: "model-9.safetensors"}, "model-9.safetensors cannot be read as safetensors"),
        ({KEY: "a/b.safetensors"}, "String should match pattern"),
        ({KEY: "..\\b.safetensors"}, "String should match pattern"),
    ):
        (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": content["weight_map"] | change}))
        assert message in refusal(tmp_path / "m")
    (tmp_path / "m" / INDEX).write_text(json.dumps(content))
    save_file({"a": torch.zeros(1)}, tmp_path / "m" / "model.safetensors")
    assert "has model.safetensors beside model.safetensors.index.json, which does not name it" in refusal(
        tmp_path / "m"
    )

"""llama.cpp computes our files as we compute the models, each in its own code; nothing is left half-written."""

import hashlib
import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from moekit.errors import CheckpointError, UnsupportedError
from moekit.formats.checkpoint import load, save
from moekit.formats.convert import convert
from moekit.formats.gguf.blocks import decode
from moekit.formats.gguf.export import KINDS, Precision, export_gguf, save_gguf
from moekit.formats.gguf.file import GGUF
from moekit.formats.gguf.restore import import_gguf
from moekit.formats.gguf.tensors import single
from moekit.formats.tokenizer import Tokenizer
from moekit.nn.model import Model
from moekit.nn.quantized import dequantize_

Logits = Callable[[Any, Tensor], Tensor]
Make = Callable[..., Model]


def test_llama_cpp_gives_the_logits_of_every_architecture(
    make: Make, parts: dict[str, Any], tokenizer: Tokenizer, ids: Tensor, llama_logits: Logits, our_logits: Logits,
    tmp_path: Path,
) -> None:  # fmt: skip
    """In float32, at 120 positions; the largest difference that was seen is 4e-5, with logits up to 7."""
    model = make(parts)
    receipt = save_gguf(model, tmp_path / "model.gguf", tokenizer)
    assert all(check["held"] for check in receipt["checks"])
    ours, theirs = our_logits(model, ids), llama_logits(tmp_path / "model.gguf", ids)
    assert ours.abs().max() > 1
    torch.testing.assert_close(theirs, ours, atol=2e-4, rtol=0)


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 0.015), ("bfloat16", 0.05), ("q8_0", 0.15), ("q4_0", 0.15)])
@pytest.mark.parametrize("name", ["whole blocks", "whole blocks, MLA"])
def test_in_other_types_llama_cpp_differs_by_what_it_rounds_activations_to(
    make: Make, name: str, dtype: Precision, bound: float, ids: Tensor, llama_logits: Logits, our_logits: Logits,
    tmp_path: Path,
) -> None:  # fmt: skip
    """Against the file's own numbers in float32; relative RMS differences of 0.005, 0.017, 0.05 and 0.05 were seen."""
    save_gguf(make(name), tmp_path / "model.gguf", dtype=dtype)
    kinds = {info.kind.name for name, info in GGUF(tmp_path / "model.gguf").tensors.items() if not single(name)}
    assert kinds == {KINDS[dtype].name}
    import_gguf(tmp_path / "model.gguf", tmp_path / "model", "float32")
    ours, theirs = our_logits(load(tmp_path / "model"), ids), llama_logits(tmp_path / "model.gguf", ids)
    assert 1e-5 < (theirs - ours).norm() / ours.norm() < bound


@pytest.mark.parametrize("dtype", list(KINDS))
@pytest.mark.parametrize("name", ["whole blocks, MLA", "deepseek2 groups"])
def test_the_gguf_package_reads_the_same_numbers(make: Make, name: str, dtype: Precision, tmp_path: Path) -> None:
    gguf, quants = pytest.importorskip("gguf"), pytest.importorskip("gguf.quants")
    save_gguf(make(name), tmp_path / "model.gguf", dtype=dtype)
    ours = GGUF(tmp_path / "model.gguf")
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert theirs.keys() == ours.tensors.keys()
    for tensor_name, (shape, kind, _) in ours.tensors.items():
        found = torch.tensor(quants.dequantize(theirs[tensor_name].data, theirs[tensor_name].tensor_type))
        assert found.shape == shape
        assert torch.equal(decode(ours.tensor(tensor_name), kind).float().view(shape), found)


def test_codes_go_over_as_they_are(make: Make, tmp_path: Path) -> None:
    save(make("whole blocks, MLA"), tmp_path / "model")
    for dtype, kind in (("int8", "Q8_0"), ("int4", "Q4_0")):
        convert(tmp_path / "model", tmp_path / dtype, dtype)
        receipt = export_gguf(tmp_path / dtype, tmp_path / f"{dtype}.gguf")
        used = {key: entry for key, entry in receipt["tensors"]["used"].items() if entry["from"] == dtype}
        assert {entry["to"] for entry in used.values()} == {kind}
        assert not any(entry["relative_rms"] for entry in receipt["tensors"]["used"].values())
        with safe_open(tmp_path / dtype / "model.safetensors", "pt") as file:
            assert receipt["tensors"]["used"].keys() == set(file.keys())
        import_gguf(tmp_path / f"{dtype}.gguf", tmp_path / f"{dtype} again")
        coded, plain = load(tmp_path / dtype), load(tmp_path / f"{dtype} again")
        dequantize_(coded, torch.float32)
        assert all(torch.equal(tensor, coded.state_dict()[name]) for name, tensor in plain.state_dict().items())


def test_rows_that_are_not_whole_blocks_stay_in_numbers(make: Make, tmp_path: Path) -> None:
    save(make("deepseek"), tmp_path / "model")  # rows of 36, 14, 28 and 50
    convert(tmp_path / "model", tmp_path / "int8", "int8")
    receipt = export_gguf(tmp_path / "int8", tmp_path / "int8.gguf")
    used, dropped = receipt["tensors"]["used"], receipt["tensors"]["dropped"]
    assert {entry["to"] for entry in used.values()} == {"F32"}
    assert {key.removesuffix("_scale") for key in dropped} == {k for k, e in used.items() if e["from"] == "int8"}
    half = make("deepseek").bfloat16()
    assert {e["to"] for e in save_gguf(half, tmp_path / "half.gguf", dtype="q8_0")["tensors"]["used"].values()} == {
        "BF16", "F32",
    }  # fmt: skip


def test_the_receipt_accounts_for_the_file_and_every_tensor(make: Make, tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = make("deepseek2 groups")
    save(model, tmp_path / "model", tokenizer)
    seen: list[tuple[str, int, int]] = []
    target = tmp_path / "model.gguf"
    receipt = export_gguf(tmp_path / "model", target, "bfloat16", progress=lambda *now: seen.append(now))
    assert json.loads((tmp_path / "model.gguf.receipt.json").read_text()) == receipt
    content = target.read_bytes()
    hashed = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert receipt["outputs"] == {"model.gguf": hashed}
    assert receipt["inputs"]["model.safetensors"]["bytes"] == (tmp_path / "model" / "model.safetensors").stat().st_size
    with safe_open(tmp_path / "model" / "model.safetensors", "pt") as file:
        assert receipt["tensors"]["used"].keys() == set(file.keys())
    named = {name for entry in receipt["tensors"]["used"].values() for name in entry["as"]}
    assert named == GGUF(target).tensors.keys()
    assert all(check["held"] for check in receipt["checks"])
    phases, done, total = zip(*seen, strict=True)
    assert set(phases) == {"convert"}
    assert done[-1] == total[-1]
    assert sorted(done) == list(done)


def test_8_bit_floating_point_is_exported_as_its_numbers_from_where_it_lies(fp8: Path, tmp_path: Path) -> None:
    receipt = export_gguf(fp8, tmp_path / "model.gguf")
    save_gguf(load(fp8), tmp_path / "loaded.gguf")
    assert (tmp_path / "model.gguf").read_bytes() == (tmp_path / "loaded.gguf").read_bytes()
    with safe_open(fp8 / "model.safetensors", "pt") as file:
        assert receipt["tensors"]["used"].keys() | receipt["tensors"]["dropped"].keys() == set(file.keys())
    key = "model.layers.1.mlp.experts.2.up_proj.weight"
    assert receipt["tensors"]["used"][key]["from"] == "bfloat16"
    assert receipt["tensors"]["dropped"][f"{key}_scale_inv"] == f"scales, multiplied into {key}"


def test_a_file_that_exists_stays(make: Make, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(CheckpointError, match=r"model\.gguf exists already"):
        save_gguf(make("llama"), tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"


@pytest.mark.parametrize("limit", [100, 30_000, 100_000])
def test_a_full_disk_leaves_nothing_behind(make: Make, tmp_path: Path, limit: int) -> None:
    model = make("deepseek")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # python ignores the signal that comes with it
    try:
        with pytest.raises(CheckpointError, match="nothing was left behind"):
            save_gguf(model, tmp_path / "model.gguf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


KILLED = """
import os, signal, sys, torch
from pathlib import Path
from moekit.config import ModelConfig
from moekit.formats.gguf.export import save_gguf
from moekit.nn.model import Model

def stop(phase, done, total):
    if done > total / 2:
        os.kill(os.getpid(), signal.SIGKILL)

save_gguf(Model(ModelConfig.model_validate_json(sys.argv[2])), Path(sys.argv[1]), progress=stop)
"""


def test_a_kill_leaves_no_file_and_the_next_export_is_whole(make: Make, tmp_path: Path) -> None:
    model = make("deepseek")
    words = [sys.executable, "-c", KILLED, str(tmp_path / "model.gguf"), model.config.model_dump_json()]
    assert subprocess.run(words).returncode == -signal.SIGKILL
    assert not (tmp_path / "model.gguf").exists()
    save_gguf(model, tmp_path / "model.gguf")
    assert {file.name for file in tmp_path.iterdir()} == {"model.gguf", "model.gguf.receipt.json"}


def test_a_value_that_is_not_finite_is_refused(make: Make, tmp_path: Path) -> None:
    model = make("deepseek")
    with torch.no_grad():
        model.layers[2].mlp.experts.down_proj[3, 1, 1] = 1e30
    with pytest.raises(UnsupportedError, match=r"experts\.3\.down_proj\.weight .*beyond float16's range"):
        save_gguf(model, tmp_path / "model.gguf", dtype="float16")
    with torch.no_grad():
        model.layers[2].mlp.experts.down_proj[3, 1, 1] = torch.nan
    with pytest.raises(CheckpointError, match=r"experts\.3\.down_proj\.weight has a value that is not finite"):
        save_gguf(model, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())

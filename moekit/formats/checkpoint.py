"""A model as a directory: config.json, model.safetensors (or shards and an index), tokenizer, receipt, manifest."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from moekit import files, receipts
from moekit.config import ModelConfig, Strict, validate
from moekit.errors import CheckpointError, ConfigError
from moekit.formats.directory import MANIFEST, atomic_directory, check_directory
from moekit.formats.tokenizer import Tokenizer
from moekit.formats.weights import INDEX, SINGLE, Reader, held, map_experts_, read, split, write
from moekit.nn.model import Model
from moekit.nn.quantized import quantize_
from moekit.ops.quantize import GROUP, Codes

MODEL_TYPE = "moekit"


class Quantization(Strict):
    """What config.json says, beside the model's settings, of matrices in codes."""

    dtype: Codes
    group_size: Literal[32]


def save(
    model: Model,
    path: str | os.PathLike[str],
    tokenizer: Tokenizer | None = None,
    *,
    receipt: dict[str, Any] | None = None,
    extra: Callable[[Path], None] | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Writes the model directory in one atomic step and returns its receipt.

    `receipt` replaces the plain "save" receipt; `extra` may write more files into the directory before it is sealed.
    Raises CheckpointError if the directory exists (unless `overwrite`) or the disk is full; nothing half-written stays.
    """
    hashed: dict[str, Any] = {}
    with atomic_directory(Path(path), overwrite, hashed) as folder:
        stored = [entry for name, weight in held(model).items() for entry in split(name, weight)]
        write(folder, stored, (tensor for _, tensor in stored))
        weight = model.embed_tokens.weight
        describe(folder, model.config, weight.dtype, model.quantization, tokenizer)
        if extra is not None:
            extra(folder)
        if receipt is None:
            config = model.config.model_dump(mode="json")
            receipt = receipts.make("save", model.config, config=config, device=str(weight.device))
        return seal(folder, hashed, receipt)


def describe(
    folder: Path, config: ModelConfig, dtype: torch.dtype, codes: Codes | None, tokenizer: Tokenizer | None
) -> None:
    """Writes what a model directory holds beside its weights."""
    content = {
        "architectures": ["MoekitForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": config.vocab_size,
        "moekit": config.model_dump(mode="json"),
    }
    if codes is not None:
        content["quantization"] = Quantization(dtype=codes, group_size=GROUP).model_dump()
    files.write_json(folder / "config.json", content)
    if tokenizer is not None:
        tokenizer.save(folder)
        ids = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "pad": tokenizer.pad_id}
        files.write_json(folder / "generation_config.json", {f"{key}_token_id": ids[key] for key in ids})


def seal(folder: Path, hashed: dict[str, Any], receipt: dict[str, Any]) -> dict[str, Any]:
    """Returns the receipt with all files of the folder among its outputs, after writing it there."""
    hashed |= files.hashes(folder, [entry.name for entry in folder.iterdir()])
    receipt = {**receipt, "outputs": {**receipt["outputs"], **hashed}}
    files.write_json(folder / receipts.FILE, receipt)
    return receipt


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Returns the configuration of a model directory."""
    return _load_config(Path(path))[0]


def _load_config(folder: Path) -> tuple[ModelConfig, Codes | None]:
    """Returns the configuration of a model directory and what its matrices are kept in."""
    file = folder / "config.json"
    content = files.read_json(file, dict[str, Any], CheckpointError)
    if content.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{file} says model_type {content.get('model_type')!r} but only {MODEL_TYPE!r} is read")
    try:
        codes = validate(Quantization, content["quantization"]).dtype if "quantization" in content else None
        return validate(ModelConfig, content.get("moekit")), codes
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    check_hashes: bool = True,
    mapped: bool = False,
) -> Model:
    """Returns the model in a directory, in evaluation mode. `dtype` None keeps each tensor's own; codes stay codes.

    Strict: every tensor must be there once, in its shape, and none may be left over. Files are checked against the
    manifest first (`check_hashes` False skips that), so a changed byte is an error and never another model.
    `mapped` leaves the weights in their files, to be read as they are needed: for inference with a model that may be
    larger than memory. Its experts stay there whatever `device` and `dtype` say, and the files must stay as they are.
    """
    folder = Path(path)
    if check_hashes:
        listed = check_directory(folder)
        for name in ("config.json", INDEX, SINGLE):
            if name not in listed and (folder / name).exists():
                raise CheckpointError(f"{folder / name} is not listed in {MANIFEST}; it was put there later, remove it")
    config, codes = _load_config(folder)
    with torch.device("meta"):
        model = Model(config)
    if codes is not None:
        quantize_(model, codes)
    reader = Reader(folder)
    if mapped:
        map_experts_(model, reader)
    state = read(model, reader, torch.device(device), dtype)
    reader.finish()
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if codes is not None or mapped:
        model.requires_grad_(False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()

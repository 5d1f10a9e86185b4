"""A model as a directory: config.json, model.safetensors (or shards and an index), tokenizer, receipt, manifest."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moekit import receipts
from moekit.config import ModelConfig, validate
from moekit.errors import CheckpointError, ConfigError, nearest
from moekit.formats.directory import MANIFEST, atomic_directory, check_directory, read_json
from moekit.formats.names import pieces
from moekit.formats.tokenizer import Tokenizer
from moekit.nn.model import Model

MODEL_TYPE = "moekit"
SHARD_BYTES = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


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
    with atomic_directory(Path(path), overwrite) as folder:
        _write_weights(model, folder)
        dtype = str(model.embed_tokens.weight.dtype).removeprefix("torch.")
        receipts.write_json(folder / "config.json", describe(model.config, dtype))
        if tokenizer is not None:
            tokenizer.save(folder)
            generation = {
                "eos_token_id": tokenizer.eos_id,
                "bos_token_id": tokenizer.bos_id,
                "pad_token_id": tokenizer.pad_id,
            }
            receipts.write_json(folder / "generation_config.json", generation)
        if extra is not None:
            extra(folder)
        if receipt is None:
            device = str(model.embed_tokens.weight.device)
            config = model.config.model_dump(mode="json")
            receipt = receipts.make("save", config=config, model=model.config, device=device)
        files = receipts.file_hashes(folder, [entry.name for entry in folder.iterdir()])
        receipt = {**receipt, "outputs": {**receipt["outputs"], **files}}
        receipts.write_json(folder / receipts.FILE, receipt)
    return receipt


def describe(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """Returns the content of config.json."""
    return {
        "architectures": ["MoekitForCausalLM"],
        "model_type": MODEL_TYPE,
        "dtype": dtype,
        "vocab_size": config.vocab_size,
        "moekit": config.model_dump(mode="json"),
    }


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Returns the configuration of a model directory."""
    file = Path(path) / "config.json"
    content = read_json(file)
    if content.get("model_type") != MODEL_TYPE or not isinstance(content.get("moekit"), dict):
        raise CheckpointError(f"{file} says model_type {content.get('model_type')!r} but only {MODEL_TYPE!r} is read")
    try:
        return validate(ModelConfig, content["moekit"])
    except ConfigError as error:
        raise CheckpointError(f"{file}: {error}") from error


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    check_hashes: bool = True,
) -> Model:
    """Returns the model in a directory, in evaluation mode. `dtype` None keeps each tensor's own.

    Strict: every tensor must be there once, in its shape, and none may be left over. Files are checked against the
    manifest first (`check_hashes` False skips that), so a changed byte is an error and never another model.
    """
    folder = Path(path)
    if check_hashes:
        listed = check_directory(folder)
        for name in ("config.json", INDEX, SINGLE):
            if name not in listed and (folder / name).exists():
                raise CheckpointError(f"{folder / name} is not listed in {MANIFEST}; it was put there later, remove it")
    config = load_config(folder)
    with torch.device("meta"):
        model = Model(config)
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not _tied(config, name)}
    state = _read_weights(folder, wanted, torch.device(device), dtype)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def _tied(config: ModelConfig, name: str) -> bool:
    return config.tie_word_embeddings and name == "lm_head.weight"


def _write_weights(model: Model, folder: Path) -> None:
    """Writes one key an expert, in shards of at most SHARD_BYTES."""
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for name, tensor in model.state_dict().items():
        if _tied(model.config, name):
            continue
        for key, index in pieces(name, tuple(tensor.shape)):
            part = tensor[index] if index else tensor
            nbytes = part.numel() * part.element_size()
            if shards[-1] and size + nbytes > SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append((key, part))
            size += nbytes
    if len(shards) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards, strict=True):
        # copies, a shard at a time: safetensors refuses views of one storage
        content = {key: part.detach().cpu().contiguous().clone() for key, part in shard}
        save_file(content, folder / file, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {key: file for file, shard in zip(names, shards, strict=True) for key, _ in shard}
        total = sum(part.numel() * part.element_size() for shard in shards for _, part in shard)
        receipts.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _read_weights(
    folder: Path, wanted: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Returns the state dict, assembled tensor by tensor from the files' pieces."""
    where = _weight_files(folder)
    state: dict[str, Tensor] = {}
    used: set[str] = set()
    handles: dict[Path, Any] = {}
    for name, meta in wanted.items():
        for key, index in pieces(name, tuple(meta.shape)):
            if key not in where:
                raise CheckpointError(f"{folder} has no tensor {key}{nearest(key, where.keys() - used)}")
            file = where[key]
            if file not in handles:
                handles[file] = safe_open(file, framework="pt")
            part = handles[file].get_tensor(key)
            used.add(key)
            expected = tuple(meta[index].shape) if index else tuple(meta.shape)
            if tuple(part.shape) != expected:
                raise CheckpointError(
                    f"{key} in {file} has shape {tuple(part.shape)} but the config asks for {expected}"
                )
            of = state.get(name, meta)  # all pieces of a tensor have one dtype
            if part.is_floating_point() != of.is_floating_point() or (name in state and part.dtype != of.dtype):
                raise CheckpointError(f"{key} in {file} has dtype {part.dtype} but the model holds {of.dtype} there")
            if not index:
                state[name] = part.clone()  # not a map of a file that may be removed or written over
            else:
                if name not in state:
                    state[name] = torch.empty(meta.shape, dtype=part.dtype)
                state[name][index] = part
        keep = dtype is None or not meta.is_floating_point() or name.endswith("expert_bias")
        state[name] = state[name].to(device=device, dtype=None if keep else dtype)
    left = sorted(where.keys() - used)
    if left:
        raise CheckpointError(
            f"{folder} holds {len(left)} tensors that the config has no place for, the first {left[0]}"
        )
    return state


def _weight_files(folder: Path) -> dict[str, Path]:
    """Returns the file of every tensor on disk."""
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CheckpointError(f"{folder / INDEX} has no weight_map")
        names = sorted(set(map(str, weight_map.values())))
        if foreign := [name for name in names if Path(name).name != name]:
            raise CheckpointError(
                f"{folder / INDEX} names {foreign[0]!r}, which is not the plain name of a file beside it"
            )
    else:
        names = [SINGLE]
    where: dict[str, Path] = {}
    for name in names:
        file = folder / name
        try:
            with safe_open(file, framework="pt") as tensors:
                keys = list(tensors.keys())
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{file} cannot be read as safetensors: {error}") from error
        for key in keys:
            if key in where:
                raise CheckpointError(f"tensor {key} is in {where[key].name} and again in {name}")
            where[key] = file
    return where

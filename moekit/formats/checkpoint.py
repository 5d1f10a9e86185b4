"""A model as a directory: config.json, model.safetensors (or shards and an index), tokenizer, receipt, manifest."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moekit import files, receipts
from moekit.config import ModelConfig, Strict, validate
from moekit.errors import CheckpointError, ConfigError, nearest
from moekit.formats.directory import MANIFEST, PlainName, atomic_directory, check_directory
from moekit.formats.names import pieces
from moekit.formats.tokenizer import Tokenizer
from moekit.nn.model import Model
from moekit.nn.quantized import quantize_
from moekit.ops.quantize import GROUP, Codes

MODEL_TYPE = "moekit"
SHARD_BYTES = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Index(BaseModel):
    """What is read of model.safetensors.index.json."""

    weight_map: dict[str, PlainName]


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
    with atomic_directory(Path(path), overwrite) as folder:
        _write_weights(model, folder)
        config, weight = model.config.model_dump(mode="json"), model.embed_tokens.weight
        content = {
            "architectures": ["MoekitForCausalLM"],
            "model_type": MODEL_TYPE,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "vocab_size": model.config.vocab_size,
            "moekit": config,
        }
        if model.quantization is not None:
            content["quantization"] = Quantization(dtype=model.quantization, group_size=GROUP).model_dump()
        files.write_json(folder / "config.json", content)
        if tokenizer is not None:
            tokenizer.save(folder)
            ids = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id, "pad": tokenizer.pad_id}
            files.write_json(folder / "generation_config.json", {f"{key}_token_id": ids[key] for key in ids})
        if extra is not None:
            extra(folder)
        if receipt is None:
            receipt = receipts.make("save", model.config, config=config, device=str(weight.device))
        written = files.hashes(folder, [entry.name for entry in folder.iterdir()])
        receipt = {**receipt, "outputs": {**receipt["outputs"], **written}}
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
) -> Model:
    """Returns the model in a directory, in evaluation mode. `dtype` None keeps each tensor's own; codes stay codes.

    Strict: every tensor must be there once, in its shape, and none may be left over. Files are checked against the
    manifest first (`check_hashes` False skips that), so a changed byte is an error and never another model.
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
    wanted = {name: tensor for name, tensor in model.state_dict().items() if not tied(config, name)}
    state = _read_weights(folder, wanted, torch.device(device), dtype)
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if codes is not None:
        model.requires_grad_(False)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight
    return model.eval()


def tied(config: ModelConfig, name: str) -> bool:
    """Returns whether a tensor of the state dict is another one's again, and so not on disk."""
    return config.tie_word_embeddings and name == "lm_head.weight"


def _write_weights(model: Model, folder: Path) -> None:
    """Writes one key an expert, in shards of at most SHARD_BYTES."""
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in model.state_dict().items():
        if tied(model.config, name):
            continue
        for key, index in pieces(name, tuple(tensor.shape)):
            part = tensor[index]
            if shards[-1] and size + part.nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][key] = part
            size, total = size + part.nbytes, total + part.nbytes
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        # copies, a shard at a time: safetensors refuses views of one storage
        content = {key: part.detach().cpu().contiguous().clone() for key, part in shard.items()}
        save_file(content, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _read_weights(
    folder: Path, wanted: dict[str, Tensor], device: torch.device, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Returns the state dict, assembled tensor by tensor from the files' pieces."""
    opened = _open_weights(folder)
    left = opened.keys() - {key for name, meta in wanted.items() for key, _ in pieces(name, tuple(meta.shape))}
    state: dict[str, Tensor] = {}
    for name, meta in wanted.items():
        for key, index in pieces(name, tuple(meta.shape)):
            if key not in opened:
                raise CheckpointError(f"{folder} has no tensor {key}{nearest(key, left)}")
            part, of = opened[key].get_tensor(key), state.get(name, meta)  # all pieces of a tensor have one dtype
            if part.shape != meta[index].shape:
                shapes = f"{tuple(part.shape)} but the config asks for {tuple(meta[index].shape)}"
                raise CheckpointError(f"{key} in {folder} has shape {shapes}")
            exact = name in state or not of.is_floating_point() or name.endswith(".scales")
            if part.dtype != of.dtype if exact else not part.is_floating_point():
                raise CheckpointError(f"{key} in {folder} has dtype {part.dtype} but the model holds {of.dtype} there")
            if name not in state:
                state[name] = torch.empty(meta.shape, dtype=part.dtype)  # a map of a file would not survive it
            state[name][index] = part
        keep = dtype is None or not meta.is_floating_point() or name.endswith(("expert_bias", ".scales"))
        state[name] = state[name].to(device=device, dtype=None if keep else dtype)
    if left:
        raise CheckpointError(
            f"{folder} holds {len(left)} tensors that the config has no place for, the first {min(left)}"
        )
    return state


def _open_weights(folder: Path) -> dict[str, Any]:
    """Returns, for every tensor on disk, the open file that holds it."""
    names = {SINGLE}
    if (folder / INDEX).is_file():
        names = set(files.read_json(folder / INDEX, Index, CheckpointError).weight_map.values())
    opened: dict[str, Any] = {}
    for name in sorted(names):
        try:
            file = safe_open(folder / name, framework="pt")
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{folder / name} cannot be read as safetensors: {error}") from error
        for key in file.keys():  # noqa: SIM118  not a dictionary
            if key in opened:
                raise CheckpointError(f"tensor {key} is in {name} and again in another file of {folder}")
            opened[key] = file
    return opened

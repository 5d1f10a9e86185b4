"""A model as a directory: config.json, model.safetensors (or shards and an index), tokenizer, receipt, manifest."""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from moekit import files, receipts
from moekit.config import ModelConfig, Strict, validate
from moekit.errors import CheckpointError, ConfigError, UnsupportedError, nearest
from moekit.formats.directory import MANIFEST, atomic_directory, check_directory
from moekit.formats.guard import check_folder
from moekit.formats.layouts import LAYOUTS
from moekit.formats.layouts.tensors import Disk, disk
from moekit.formats.tokenizer import Tokenizer
from moekit.formats.weights import INDEX, SINGLE, Reader, held, map_, read, split, write
from moekit.nn.model import Model
from moekit.nn.quantized import quantize_
from moekit.ops.quantize import GROUP, Codes

MODEL_TYPE = "moekit"

logger = logging.getLogger(__name__)


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
    layout: str = MODEL_TYPE,
) -> dict[str, Any]:
    """Writes the model directory in one atomic step and returns its receipt.

    `layout` is another library's `model_type`, one of `formats.layouts.LAYOUTS`; UnsupportedError says why it cannot
    hold this model. `receipt` replaces the plain "save" receipt; `extra` may write more files before all is sealed.
    Raises CheckpointError if the directory exists (unless `overwrite`) or the disk is full; nothing half-written stays.
    """
    dtype = model.embed_tokens.weight.dtype
    hashed: dict[str, Any] = {}
    with atomic_directory(Path(path), overwrite, hashed) as folder:
        tensors = describe(folder, model.config, dtype, model.quantization, tokenizer, layout)
        stored = [entry for name, weight in held(model).items() for entry in split(name, weight, tensors)]
        write(folder, stored, (tensor for _, tensor in stored))
        if extra is not None:
            extra(folder)
        if receipt is None:
            told = model.config.model_dump(mode="json") | ({} if layout == MODEL_TYPE else {"layout": layout})
            receipt = receipts.make("save", model.config, config=told, device=str(model.embed_tokens.weight.device))
        return seal(folder, hashed, receipt)


def describe(
    folder: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    codes: Codes | None,
    tokenizer: Tokenizer | None,
    layout: str = MODEL_TYPE,
    ahead: int = 0,
) -> Disk:
    """Writes what a model directory holds beside its weights, and returns what these are called there.

    `ahead` says how many layers for multi-token prediction are to stand behind the model's own. Raises UnsupportedError
    where the layout cannot hold the model, or those.
    """
    if ahead and (layout not in LAYOUTS or LAYOUTS[layout].extra_layers is None):
        raise UnsupportedError(f"layout {layout} has no place for multi-token prediction; leave its layers out")
    named, tensors = str(dtype).removeprefix("torch."), Disk()
    if layout == MODEL_TYPE:
        content = {
            "architectures": [f"MoekitFor{_purpose(config)}"],
            "model_type": MODEL_TYPE,
            "dtype": named,
            "vocab_size": config.vocab_size,
            "moekit": config.model_dump(mode="json"),
        }
        if codes is not None:
            content["quantization"] = Quantization(dtype=codes, group_size=GROUP).model_dump()
    elif layout not in LAYOUTS:
        known = (MODEL_TYPE, *LAYOUTS)
        raise ConfigError(f"layout is {layout!r}{nearest(layout, known)}; allowed: {', '.join(known)}")
    elif codes is not None:
        raise UnsupportedError(f"layout {layout} has no {codes} codes; convert to bfloat16 first")
    else:
        content = LAYOUTS[layout].write(config) | {"torch_dtype": named} | _token_ids(tokenizer)
        if (count := LAYOUTS[layout].extra_layers) and ahead:
            content[count] = ahead
        tensors = disk(LAYOUTS[layout], content)
    files.write_json(folder / "config.json", content)
    if tokenizer is not None:
        tokenizer.save(folder)
        files.write_json(folder / "generation_config.json", _token_ids(tokenizer))
    return tensors


def _purpose(config: ModelConfig) -> str:
    """Returns what a model is for, in the words of transformers, which has no such class but for the first."""
    if config.num_labels is not None:
        return "SequenceClassification"
    return "CausalLM" if config.causal else "MaskedLM"


def _token_ids(tokenizer: Tokenizer | None) -> dict[str, int | None]:
    """Returns the special tokens' ids, null where there are none: a reader's defaults would end texts anywhere."""
    names = ("eos", "bos", "pad")
    return {f"{name}_token_id": None if tokenizer is None else getattr(tokenizer, f"{name}_id") for name in names}


def seal(folder: Path, hashed: dict[str, Any], receipt: dict[str, Any]) -> dict[str, Any]:
    """Returns the receipt with all files of the folder among its outputs, after writing it there."""
    hashed |= files.hashes(folder, [entry.name for entry in folder.iterdir()])
    receipt = {**receipt, "outputs": {**receipt["outputs"], **hashed}}
    files.write_json(folder / receipts.FILE, receipt)
    return receipt


def load_config(path: str | os.PathLike[str]) -> ModelConfig:
    """Returns the configuration of a model directory."""
    check_folder(Path(path))
    return read_config(Path(path))[0]


def read_config(folder: Path) -> tuple[ModelConfig, Codes | None, Disk]:
    """Returns the configuration of a model directory, what its matrices are kept in, what its tensors are called."""
    file = folder / "config.json"
    content = files.read_json(file, dict[str, Any], CheckpointError)
    kind, known = content.get("model_type"), (MODEL_TYPE, *LAYOUTS)
    if kind not in known:
        said = f"{file} says model_type {kind!r}{nearest(str(kind), known)}"
        raise CheckpointError(f"{said} but only {', '.join(known)} are read")
    try:
        if kind != MODEL_TYPE:
            return LAYOUTS[kind].read(content), None, disk(LAYOUTS[kind], content)
        codes = validate(Quantization, content["quantization"]).dtype if "quantization" in content else None
        return validate(ModelConfig, content.get("moekit")), codes, Disk()
    except (CheckpointError, ConfigError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    except UnsupportedError as error:
        raise UnsupportedError(f"{file}: {error}") from error


def _foreign(folder: Path) -> bool:
    """Returns whether a directory is another library's, with nothing to check its files against."""
    if (folder / MANIFEST).exists() or not (folder / "config.json").is_file():
        return False
    return files.read_json(folder / "config.json", dict[str, Any], CheckpointError).get("model_type") in [*LAYOUTS]


def load(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    check_hashes: bool = True,
    mapped: bool = False,
) -> Model:
    """Returns the model in a directory, in evaluation mode. `dtype` None keeps each tensor's own; codes stay codes.

    Any layout of `formats.layouts` is read. Strict: every tensor must be there once, in its shape, and none may be left
    over but those with a reason, which is logged. Files are checked against the manifest first (`check_hashes` False
    skips that), so a changed byte is an error and never another model; another library's directory has none.
    `mapped` leaves the weights in their files, to be read as they are needed: for inference with a model that may be
    larger than memory. Its experts, and matrices in 8-bit floating point, stay there whatever `device` and `dtype` say,
    and the files must stay as they are.
    """
    folder = Path(path)
    check_folder(folder)
    if check_hashes and not _foreign(folder):
        listed = check_directory(folder)
        for name in ("config.json", INDEX, SINGLE):
            if name not in listed and (folder / name).exists():
                raise CheckpointError(f"{folder / name} is not listed in {MANIFEST}; it was put there later, remove it")
    config, codes, tensors = read_config(folder)
    reader = Reader(folder, tensors, dtype)
    reader.check_size(config)
    with torch.device("meta"):
        model = Model(config)
    if codes is not None:
        quantize_(model, codes)
    if mapped:
        map_(model, reader)
    state = read(model, reader, torch.device(device), dtype)
    for key, reason in reader.finish().items():
        logger.info("%s dropped: %s", key, reason)
    if config.ties_head:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    model.load_state_dict(state, assign=True)
    if codes is not None or mapped:
        model.requires_grad_(False)
    model.tie()
    return model.eval()

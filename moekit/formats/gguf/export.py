"""A model as a GGUF file, tensor by tensor, with the account of what became of each."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from moekit import files, receipts
from moekit.config import MHAConfig, MLAConfig
from moekit.errors import CheckpointError
from moekit.formats.checkpoint import load, read_config
from moekit.formats.directory import listing
from moekit.formats.gguf import architecture, blocks, settings, vocabulary
from moekit.formats.gguf.blocks import Encoded, Kind, encode
from moekit.formats.gguf.file import GGUF, header, padded
from moekit.formats.gguf.tensors import apart, places, single
from moekit.formats.tokenizer import Tokenizer, load_tokenizer
from moekit.formats.weights import Reader, Stored, held, meta, split
from moekit.nn.model import Model
from moekit.ops.quantize import Quantized
from moekit.ops.scaled import unscaled

Precision = Literal["float32", "float16", "bfloat16", "q8_0", "q4_0"]
KINDS: dict[str, Kind] = {
    "float32": blocks.F32,
    "float16": blocks.F16,
    "bfloat16": blocks.BF16,
    "q8_0": blocks.Q8_0,
    "q4_0": blocks.Q4_0,
}
Progress = Callable[[str, int, int], None]
"""Called with "convert", the bytes that are done and those in all."""


class _Part(NamedTuple):
    """What is written in one go: a whole tensor, or one expert's of a stacked one."""

    key: str
    place: int
    """Which of the places of the key it is."""
    weight: Stored


class _Tensor(NamedTuple):
    kind: Kind
    shape: tuple[int, ...]
    parts: list[_Part]


def export_gguf(
    source: Path, target: Path, dtype: Precision | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes the model of a directory as one GGUF file and returns the receipt; one matrix at a time is in memory.

    For the rest see `save_gguf`.
    """
    listed = listing(source)
    model, disk = load(source, mapped=True), read_config(source)[2]
    tokenizer = load_tokenizer(source) if (source / "tokenizer.json").is_file() else None
    account = _Account(str(source), listed)
    if "training.safetensors" in listed:
        account.dropped["training.safetensors"] = "the state of a training, for which GGUF has no place"
    if disk.foreign:
        account.dropped |= Reader(source, disk).rest(
            {key for name, weight in held(model).items() for key, _ in split(name, weight, disk)}
        )
    return _write(model, target, tokenizer, dtype, progress, account)


def save_gguf(
    model: Model,
    path: Path,
    tokenizer: Tokenizer | None = None,
    dtype: Precision | None = None,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Writes a model as one GGUF file in one atomic step and returns the receipt, which is put beside it.

    `dtype` is that of the matrices; norms, routers and biases are float32 in GGUF. None keeps what each is in; int8 and
    int4 become q8_0 and q4_0, code by code. Rows that are not whole blocks of 32 stay in numbers. Raises
    UnsupportedError, with the reason, for a model or a tokenizer that llama.cpp would not compute as we do.
    """
    return _write(model, path, tokenizer, dtype, progress, _Account("a model in memory", {}))


@torch.no_grad()
def _write(
    model: Model,
    path: Path,
    tokenizer: Tokenizer | None,
    dtype: Precision | None,
    progress: Progress | None,
    account: "_Account",
) -> dict[str, Any]:
    start, beside = time.monotonic(), path.with_name(f"{path.name}.{receipts.FILE}")
    for file in (path, beside):
        if file.exists():
            raise CheckpointError(f"{file} exists already; choose another file or remove it")
    keys = architecture.keys(model.config) | vocabulary.keys(tokenizer, model.config.vocab_size)
    tensors = tensors_of(model, None if dtype is None else KINDS[dtype])
    numbers = Counter(dict.fromkeys(KINDS.values(), 0))
    for tensor in tensors.values():
        numbers[tensor.kind] += math.prod(tensor.shape)
    keys |= {"general.file_type": numbers.most_common(1)[0][0].file_type, "general.quantization_version": 2}
    begin, total = header(keys, [(name, tensor.shape, tensor.kind) for name, tensor in tensors.items()])
    digest, done = hashlib.sha256(begin), 0
    try:
        with files.atomic(path) as out:
            out.write(begin)
            for chunk in _chunks(tensors, model.config.attention, account):
                out.write(chunk)
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress("convert", done, total)
            out.flush()
            written = GGUF(Path(out.name))
            assert settings.read(written.keys, written.tensors, str(path)) == model.config
            receipt = receipts.make(
                "convert",
                model.config,
                config={"source": account.source, "to": "gguf", "dtype": dtype},
                inputs=account.inputs,
                outputs={path.name: {"bytes": len(begin) + done, "sha256": digest.hexdigest()}},
                tensors={"used": account.used, "created": {}, "dropped": account.dropped},
                checks=account.checks(tensors, model.config.num_parameters),
                device=str(model.embed_tokens.weight.device),
                seconds=round(time.monotonic() - start, 3),
            )
            files.write_json(beside, receipt)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise CheckpointError(f"{path} could not be written: {error.strerror}; nothing was left behind") from error
        raise
    return receipt


def tensors_of(model: Model, wanted: Kind | None) -> dict[str, _Tensor]:
    """Returns every tensor of the file, in its order, with where its numbers are."""
    gathered: dict[str, list[_Part]] = {}
    for name, weight in held(model).items():
        for key, piece in split(name, weight):
            for index, place in enumerate(places(key)):
                parts = gathered.setdefault(place.name, [])
                assert place.expert in (None, len(parts))
                parts.append(_Part(key, index, piece))
    tensors = {}
    for name, parts in gathered.items():
        like = apart(parts[0].key, meta(parts[0].weight), model.config.attention)[parts[0].place]
        kind = blocks.F32 if single(name) else wanted or blocks.of(like)
        if like.shape[-1] % kind.block:
            kind = blocks.of(like, numbers=True)
        stacked = (len(parts),) if "_exps." in name else ()
        tensors[name] = _Tensor(kind, (*stacked, *like.shape), parts)
    return tensors


def _chunks(tensors: dict[str, _Tensor], attention: MHAConfig | MLAConfig, account: "_Account") -> Iterator[memoryview]:
    for name, tensor in tensors.items():
        size = 0
        for key, place, weight in tensor.parts:
            for encoded in encode(apart(key, unscaled(weight), attention)[place], tensor.kind, key):
                chunk = encoded.bytes.cpu().numpy().reshape(-1).data
                account.add(name, key, weight, tensor.kind, encoded)
                size += len(chunk)
                yield chunk
        yield memoryview(bytes(padded(size) - size))


class _Account:
    """What became of every tensor on disk that a key stands for."""

    def __init__(self, source: str, inputs: dict[str, Any]) -> None:
        self.source, self.inputs = source, inputs
        self.used: dict[str, dict[str, Any]] = {}
        self.dropped: dict[str, str] = {}
        self.bounds: dict[str, float] = {}
        self._sums: dict[str, tuple[float, float]] = {}

    def add(self, name: str, key: str, source: Stored, kind: Kind, encoded: Encoded) -> None:
        wrong, whole = self._sums.get(key, (0.0, 0.0))
        self._sums[key] = wrong, whole = wrong + encoded.wrong, whole + encoded.whole
        entry = self.used.setdefault(key, {"from": "", "to": kind.name, "relative_rms": 0.0, "as": []})
        entry["as"] += [] if name in entry["as"] else [name]
        entry["relative_rms"] = (wrong / whole) ** 0.5 if wrong else 0.0
        self.bounds[key] = max(kind.error, self.bounds.get(key, 0.0))
        if not isinstance(source, Quantized):
            entry["from"] = str(source.dtype).removeprefix("torch.")
            return
        entry["from"], scales = source.kind, f"{key}_scale"
        if kind.codes == source.kind:
            self.used[scales] = entry
            self.bounds[scales] = self.bounds[key]
        else:
            self.dropped[scales] = f"multiplied into {key}"

    def checks(self, tensors: dict[str, _Tensor], parameters: int) -> list[dict[str, Any]]:
        """Returns whether the worst tensor is as near as its type can be, and whether every parameter is there."""
        worst = max(self.used, key=lambda key: self.used[key]["relative_rms"] / self.bounds[key])
        error, bound = self.used[worst]["relative_rms"], self.bounds[worst]
        found = sum(math.prod(tensor.shape) for name, tensor in tensors.items() if not name.endswith(".bias"))
        said = {"name": "largest relative RMS error of a tensor", "value": error, "bound": f"<= {bound:g}", "of": worst}
        there = {"name": "parameters in the file", "value": found, "bound": f"== {parameters}"}
        return [{**said, "held": error <= bound}, {**there, "held": found == parameters}]

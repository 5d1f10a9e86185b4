"""A GGUF file as a model directory: every tensor of it is used, or it is refused."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel
from torch import Tensor

from moekit import files, receipts
from moekit.config import ModelConfig
from moekit.errors import CheckpointError
from moekit.formats.checkpoint import describe, seal
from moekit.formats.directory import Entry, atomic_directory
from moekit.formats.gguf import blocks, settings, vocabulary
from moekit.formats.gguf.blocks import ROWS, decode
from moekit.formats.gguf.export import Progress, tensors_of
from moekit.formats.gguf.file import GGUF
from moekit.formats.gguf.tensors import Place, places, single, together
from moekit.formats.weights import held, split, write
from moekit.nn.model import Model

Precision = Literal["float32", "bfloat16"]


class _Receipt(BaseModel):
    """What is read of a receipt: what the file was when it was written."""

    outputs: dict[str, Entry]


@torch.no_grad()
def import_gguf(
    source: Path, target: Path, dtype: Precision | None = None, *, progress: Progress | None = None
) -> dict[str, Any]:
    """Writes the model of a GGUF file as a directory, in one atomic step, and returns the receipt.

    `dtype` None: bfloat16 where all matrices are, and float32 otherwise; norms and routers, which are float32 in GGUF,
    follow the matrices where that loses nothing. One matrix at a time is in memory. Raises CheckpointError for a file
    that is damaged, contradicts itself or has a tensor too many or too few, UnsupportedError for what is not read.
    """
    start = time.monotonic()
    if target.exists():
        raise CheckpointError(f"{target} exists already; choose another directory or remove it")
    file = GGUF(source)
    hashed = _hashed(source)
    config = settings.read(file.keys, file.tensors, str(source))
    _check_numbers(file, config)
    tokenizer = vocabulary.read(file.keys, str(source))
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        raise CheckpointError(f"{source} has {tokenizer.vocab_size} tokens but {config.vocab_size} rows of embedding")
    with torch.device("meta"):
        model = Model(config)
    _check_shapes(file, model)
    loader = _Loader(file, config, dtype)
    wanted = [(key, loader.like(key, piece)) for name, meta in held(model).items() for key, piece in split(name, meta)]
    total = sum(like.nbytes for _, like in wanted)

    def loaded() -> Iterator[Tensor]:
        done = 0
        for key, like in wanted:
            yield loader.load(key, like.dtype)
            done += like.nbytes
            if progress is not None:
                progress("convert", done, total)

    with atomic_directory(target) as folder:
        write(folder, wanted, loaded())
        describe(folder, config, loader.main, None, tokenizer)
        worst = max(entry["relative_rms"] for entry in loader.used.values())
        bound = blocks.BF16.error if dtype == "bfloat16" else 0.0
        check = {"name": "largest relative RMS error of a tensor", "value": worst, "bound": f"<= {bound:g}"}
        receipt = receipts.make(
            "convert",
            config,
            config={"source": str(source), "from": "gguf", "to": "moekit", "dtype": dtype},
            inputs=hashed,
            tensors={"used": loader.used, "created": {}, "dropped": {}},
            checks=[{**check, "held": worst <= bound}],
            seconds=round(time.monotonic() - start, 3),
        )
        return seal(folder, {}, receipt)


def _hashed(source: Path) -> dict[str, Any]:
    """Returns size and hash of the file; raises CheckpointError where a receipt beside it has others."""
    hashed, beside = files.hashes(source.parent, [source.name]), source.with_name(f"{source.name}.{receipts.FILE}")
    if beside.is_file():
        written = files.read_json(beside, _Receipt, CheckpointError).outputs.get(source.name)
        if written is not None and written.model_dump() != hashed[source.name]:
            raise CheckpointError(f"{source} has changed since it was written: {beside} has another size or hash of it")
    return hashed


def _check_numbers(file: GGUF, config: ModelConfig) -> None:
    """Raises unless the file holds as many parameters as the configuration has: before a model is made of it."""
    found = sum(math.prod(info.shape) for name, info in file.tensors.items() if not name.endswith(".bias"))
    if found != config.num_parameters:
        raise CheckpointError(f"{file.path} holds {found} parameters but describes a model of {config.num_parameters}")


def _check_shapes(file: GGUF, model: Model) -> None:
    expected = {name: tensor.shape for name, tensor in tensors_of(model, None).items()}
    if missing := expected.keys() - file.tensors.keys():
        raise CheckpointError(f"{file.path} has no tensor {min(missing)}")
    if alien := file.tensors.keys() - expected.keys():
        raise CheckpointError(
            f"{file.path} has {len(alien)} tensors without a place in the model, one is {min(alien)!r}"
        )
    for name, shape in expected.items():
        if (found := file.tensors[name].shape) != shape:
            raise CheckpointError(f"{file.path}: tensor {name} has shape {found} but the settings ask for {shape}")


class _Loader:
    """The tensors of a file in our layout, with the account of what became of them."""

    def __init__(self, file: GGUF, config: ModelConfig, dtype: Precision | None) -> None:
        self.file, self.attention, self.asked = file, config.attention, dtype is not None
        kinds = {info.kind for name, info in file.tensors.items() if not single(name)}
        all_bf16 = kinds == {blocks.BF16} if dtype is None else dtype == "bfloat16"
        self.main = torch.bfloat16 if all_bf16 else torch.float32
        self.used: dict[str, dict[str, Any]] = {}
        self._sums: dict[str, tuple[float, float]] = {}

    def like(self, key: str, piece: Any) -> Tensor:
        """Returns an empty tensor of the shape and dtype that one is to have."""
        name, dtype = places(key)[0].name, self.main
        if dtype == torch.bfloat16 and single(name):
            numbers = decode(self.file.tensor(name), self.file.tensors[name].kind).float()
            loses = not self.asked and not torch.equal(numbers, numbers.bfloat16().float())
            dtype = torch.float32 if loses or name.endswith(".bias") else dtype
        return torch.empty(piece.shape, dtype=torch.float32 if name.endswith(".bias") else dtype, device="meta")

    def load(self, key: str, dtype: torch.dtype) -> Tensor:
        """Returns what is stored under a key of ours."""
        return together(key, [self._part(place, dtype) for place in places(key)], self.attention).contiguous()

    def _part(self, place: Place, dtype: torch.dtype) -> Tensor:
        shape, kind, _ = self.file.tensors[place.name]
        rows = self.file.tensor(place.name)
        if place.expert is not None:
            shape, each = shape[1:], len(rows) // shape[0]
            rows = rows[place.expert * each : (place.expert + 1) * each]
        result = torch.empty(len(rows), shape[-1], dtype=dtype)
        wrong, whole = self._sums.get(place.name, (0.0, 0.0))
        step = max(1, ROWS // shape[-1])
        for begin in range(0, len(rows), step):
            exact = decode(rows[begin : begin + step], kind)
            if not bool(torch.isfinite(exact).all()):
                raise CheckpointError(f"{place.name} in {self.file.path} has a value that is not finite")
            result[begin : begin + step] = exact
            if dtype == torch.bfloat16 != exact.dtype:
                off = result[begin : begin + step].double() - exact.double()
                wrong, whole = wrong + float(off.square().sum()), whole + float(exact.double().square().sum())
        self._sums[place.name] = wrong, whole
        to = str(dtype).removeprefix("torch.")
        self.used[place.name] = {"from": kind.name, "to": to, "relative_rms": (wrong / whole) ** 0.5 if wrong else 0.0}
        return result.view(shape)

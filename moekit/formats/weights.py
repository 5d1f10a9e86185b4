"""A model's tensors on disk: safetensors, one key an expert, in shards, written and read one tensor at a time."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence, Set
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from moekit import files
from moekit.config import ModelConfig
from moekit.errors import CheckpointError, nearest
from moekit.formats import guard
from moekit.formats.directory import PlainName
from moekit.formats.layouts.tensors import Disk
from moekit.formats.safetensors import Safetensors
from moekit.nn.experts import Experts
from moekit.nn.model import Model
from moekit.nn.quantized import matrices
from moekit.nn.weights import MappedWeight, operand
from moekit.ops.mapped import Mapped, Weights
from moekit.ops.quantize import Quantized
from moekit.ops.routing import DROPPED
from moekit.ops.scaled import Matrix, Scaled, unscaled

SHARD_BYTES = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
NUMBERS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OURS = Disk()
Stored = Matrix
"""What one key stands for; codes and their scales are two tensors on disk."""


class Index(BaseModel):
    """What is read of model.safetensors.index.json."""

    weight_map: dict[str, PlainName]


def held(model: Model) -> dict[str, Weights | Matrix]:
    """Returns what the model holds by its name in the state dict, a matrix in codes or in mapped files as one.

    Raises CheckpointError for a head of its own where the settings say that it is the embedding.
    """
    embedding = model.embed_tokens.weight
    head = getattr(model.lm_head, "weight", None) if model.config.ties_head else None
    if isinstance(head, Tensor) and head is not embedding and not torch.equal(head, embedding):
        found = "lm_head.weight is another than the embedding, but tie_word_embeddings is true"
        raise CheckpointError(f"{found}; set model.config.tie_word_embeddings to false, or tie them")
    matrix = {name: operand(getattr(module, attribute)) for name, module, attribute in matrices(model)}
    rest = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not tied(model.config, name) and name.removesuffix(".codes").removesuffix(".scales") not in matrix
    }
    return rest | matrix


def split(name: str, weight: Weights | Matrix, disk: Disk = OURS) -> Iterator[tuple[str, Stored]]:
    """Yields the key on disk and the matrix of each piece of what `held` returns."""
    if isinstance(weight, Mapped):
        parts = (matrix for expert in weight.parts for matrix in expert)
        yield from ((piece.key, part) for piece, part in zip(disk.pieces(name, weight.shape), parts, strict=True))
        return
    for key, index in disk.pieces(name, tuple(weight.shape)):
        if isinstance(weight, Scaled):  # whole, as experts' are in Mapped
            yield key, weight
        else:
            yield key, weight.of(index) if isinstance(weight, Quantized) else weight[index]


def meta(stored: Stored) -> Tensor | Quantized:
    """Returns the shape and dtype of what is written for it, without the memory."""
    if isinstance(stored, Scaled):
        return torch.empty(stored.shape, dtype=stored.dtype, device="meta")
    if isinstance(stored, Quantized):
        return Quantized(stored.codes.to("meta"), stored.scales.to("meta"), stored.width)
    return stored.to("meta")


def nbytes(stored: Stored) -> int:
    """Returns the bytes that a key and its scales take as they are kept."""
    return stored.nbytes if isinstance(stored, Tensor) else stored.codes.nbytes + stored.scales.nbytes


def tied(config: ModelConfig, name: str) -> bool:
    """Returns whether a tensor of the state dict is another one's again, and so not on disk."""
    return config.ties_head and name == "lm_head.weight"


def write(
    folder: Path, wanted: Sequence[tuple[str, Stored]], tensors: Iterable[Stored], shard_bytes: int | None = None
) -> None:
    """Writes tensors as they come, holding one at a time, in shards of at most `shard_bytes`, or SHARD_BYTES.

    `wanted` says ahead what is to come, in that order: keys, shapes and dtypes; its tensors may have no memory.
    8-bit floating point is written as its numbers.
    """
    shards: list[list[tuple[str, Tensor]]] = [[]]
    size = 0
    for key, stored in wanted:
        parts = _tensors(key, meta(stored))
        more = sum(tensor.nbytes for _, tensor in parts)
        if shards[-1] and size + more > (shard_bytes or SHARD_BYTES):
            shards.append([])
            size = 0
        shards[-1] += parts
        size += more
    coming = (tensor for stored in tensors for _, tensor in _tensors("", unscaled(stored)))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            header, begins = _header(shard)
            file.write(header)
            for (key, like), tensor in zip(shard, coming, strict=False):
                assert (tensor.shape, tensor.dtype) == (like.shape, like.dtype), key
                file.seek(len(header) + begins[key])
                file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        weight_map |= dict.fromkeys((key for key, _ in shard), name)
    assert next(coming, None) is None, "more tensors than were told ahead"
    if len(shards) > 1:
        total = sum(tensor.nbytes for shard in shards for _, tensor in shard)
        files.write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def weight_bytes(folder: Path) -> int:
    """Returns the size of a model directory's weights on disk."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _tensors(key: str, stored: Tensor | Quantized) -> list[tuple[str, Tensor]]:
    if isinstance(stored, Quantized):
        return [(key, stored.codes), (f"{key}_scale", stored.scales)]
    return [(key, stored)]


def _header(shard: Sequence[tuple[str, Tensor]]) -> tuple[bytes, dict[str, int]]:
    """Returns a safetensors header and where each tensor begins behind it, the widest dtypes first: all are aligned."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for key, tensor in sorted(shard, key=lambda entry: -entry[1].itemsize):
        begins[key], end = end, end + tensor.nbytes
        content[key] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begins[key], end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, begins


class Reader:
    """The tensors of a folder; each is taken once, and `finish` finds those that were not."""

    def __init__(self, folder: Path, disk: Disk = OURS, dtype: torch.dtype | None = None) -> None:
        self.folder, self.disk, self.dtype = folder, disk, dtype
        self.files = _open(folder)
        self.left = set(self.files)
        self.half: torch.dtype | None = None
        """Which of the two halves of 16 bits its numbers are; the bits of one are other numbers in the other."""

    def check_size(self, config: ModelConfig) -> None:
        """Raises CheckpointError if these files cannot hold a model of this config: it can claim any size, they cannot.

        To be asked before such a model is built.
        """
        size, experts = weight_bytes(self.folder), config.ffn.n_routed_experts if config.ffn.kind == "moe" else 0
        for what, claimed, found, unit in (
            ("num_hidden_layers", config.num_hidden_layers, len(self.files), "tensors"),
            ("n_routed_experts", experts, len(self.files), "tensors"),
            ("parameters", config.num_parameters, 2 * size, "numbers of 4 bits"),  # none is smaller
        ):
            if claimed > found:
                raise CheckpointError(
                    f"{self.folder} has room for {found} {unit} but its config claims {claimed} {what}"
                )

    def take(self, key: str, like: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Returns what `stored` does, 8-bit floating point as numbers."""
        found = self.stored(key, like, dtype)
        return found.numbers() if isinstance(found, Scaled) else found

    def stored(self, key: str, like: Tensor, dtype: torch.dtype | None) -> Tensor | Scaled:
        """Returns a tensor as it lies in its mapped file after checking its shape and dtype (None: any of numbers)."""
        if key not in self.files:
            raise CheckpointError(f"{self.folder} has no tensor {key}{nearest(key, self.left)}")
        tensor = self.disk.tensor(self.files, key, self.dtype)
        if tensor.shape != like.shape:
            shapes = f"{tuple(tensor.shape)} but the config asks for {tuple(like.shape)}"
            raise CheckpointError(f"{key} in {self.folder} has shape {shapes}")
        if tensor.dtype != dtype if dtype else tensor.dtype not in NUMBERS:
            of = f"dtype {tensor.dtype} but the model holds {dtype or like.dtype} there"
            raise CheckpointError(f"{key} in {self.folder} has {of}")
        if dtype is None and tensor.dtype.itemsize == 2:
            self.half = self.half or tensor.dtype
            if self.half != tensor.dtype:
                raise CheckpointError(f"{key} in {self.folder} is {tensor.dtype} but others are {self.half}")
        self.left.discard(key)
        return tensor

    def finish(self) -> dict[str, str]:
        """Returns the tensors that the model has no place for, with reasons; CheckpointError for one without."""
        return self.rest(set(self.files) - self.left)

    def rest(self, taken: Set[str]) -> dict[str, str]:
        """Returns what `finish` does, of other tensors than those that are named."""
        others = set(self.files) - taken
        dropped = self.disk.dropped(self.files, others)
        if left := others - dropped.keys():
            raise CheckpointError(
                f"{self.folder} holds {len(left)} tensors that the config has no place for, the first {min(left)}"
            )
        return dropped


def map_(model: Model, reader: Reader) -> None:
    """Gives a model without memory its experts, and its matrices in 8-bit floating point, as they lie in the files."""
    for name, module, attribute in matrices(model):
        like = operand(getattr(module, attribute))
        weight: Mapped | Scaled | Tensor
        if isinstance(module, Experts):
            weight = _experts(name, like, reader)
        elif reader.disk.block is None:
            continue  # `read` maps what is whole
        else:
            [(key, only)] = split(name, like, reader.disk)
            assert isinstance(only, Tensor)
            if isinstance(weight := reader.stored(key, only, None), Tensor):
                continue
        delattr(module, attribute)
        setattr(module, attribute, MappedWeight(weight))
    model.mapped = True


def _experts(name: str, stacked: Weights | Matrix, reader: Reader) -> Mapped:
    parts: list[Stored] = []
    dtype: torch.dtype | None = None
    for key, like in split(name, stacked, reader.disk):
        if isinstance(like, Quantized):
            scales = reader.take(f"{key}_scale", like.scales, like.scales.dtype)
            parts.append(Quantized(reader.take(key, like.codes, like.codes.dtype), scales, like.width))
        else:
            assert isinstance(like, Tensor)
            parts.append(found := reader.stored(key, like, dtype))
            dtype = found.dtype  # all are of the first one's
    each = len(parts) // stacked.shape[0]
    return Mapped([parts[begin : begin + each] for begin in range(0, len(parts), each)])


def read(model: Model, reader: Reader, device: torch.device, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Returns the state dict of a model without memory, assembled tensor by tensor from its pieces on disk.

    A whole tensor of a mapped model is itself a map of the file.
    """
    state: dict[str, Tensor] = {}
    for name, meta in model.state_dict().items():
        if tied(model.config, name):
            continue
        for key, index in reader.disk.pieces(name, tuple(meta.shape)):
            of = state.get(name, meta)  # all pieces of a tensor have one dtype
            exact = name in state or not of.is_floating_point() or name.endswith(".scales")
            part = reader.take(key, meta[index], of.dtype if exact else None)
            if not model.mapped and not finite(part):  # of what is mapped nothing is read yet
                raise CheckpointError(f"{key} in {reader.folder} has a value that is not finite")
            if model.mapped and part.shape == meta.shape:
                state[name] = part
                continue
            if name not in state:
                state[name] = torch.empty(meta.shape, dtype=part.dtype)  # a map of a file would not survive it
            state[name][index] = part
        if name.endswith(".table"):
            _check_table(state[name], model.config, f"{key} in {reader.folder}")
        keep = dtype is None or not meta.is_floating_point() or name.endswith(("expert_bias", ".scales"))
        state[name] = state[name].to(device=device, dtype=None if keep else dtype)
    return state


def _check_table(table: Tensor, config: ModelConfig, where: str) -> None:
    """Raises CheckpointError if a hash table names an expert that does not exist; DROPPED is a place not yet filled."""
    low, high = (int(end) for end in table.aminmax())
    if config.ffn.kind == "moe" and not DROPPED <= low <= high < config.ffn.n_routed_experts:
        raise CheckpointError(
            f"{where} has entries from {low} to {high} but the experts are 0 to {config.ffn.n_routed_experts - 1}"
        )


def finite(tensor: Tensor) -> bool:
    """Returns whether no value is infinite or not a number, in one pass that takes no memory."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = tensor.aminmax()  # either is NaN when any value is
    return math.isfinite(low) and math.isfinite(high)


def _open(folder: Path) -> dict[str, Safetensors]:
    """Returns, for every tensor on disk, the open file that holds it."""
    index = {}
    if (folder / INDEX).is_file():
        index = files.read_json(folder / INDEX, Index, CheckpointError).weight_map
    elif not (folder / SINGLE).is_file():
        guard.refuse_pickles(folder)
    names = set(index.values()) or {SINGLE}
    if SINGLE not in names and (folder / SINGLE).exists():
        raise CheckpointError(f"{folder} has {SINGLE} beside {INDEX}, which does not name it; remove one of the models")
    opened: dict[str, Safetensors] = {}
    where: dict[str, str] = {}
    for name in sorted(names):
        file = Safetensors(folder / name)
        for key in file.names():
            if key in opened:
                raise CheckpointError(f"tensor {key} is in {name} and again in another file of {folder}")
            opened[key], where[key] = file, name
    for key, name in index.items():
        if where.get(key) != name:
            raise CheckpointError(f"{folder / INDEX} says that {key[:80]!r} is in {name}, where it is not")
    return opened

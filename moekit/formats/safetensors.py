"""Safetensors files, mapped: headers say each thing once, and a file may be larger than memory.

The library safetensors refuses headers that lie about the file: a length beyond it, offsets that overlap, leave a gap
or reverse, a shape that does not fit its bytes. It takes the last of two tensors of one name, headers of up to 100 MB,
and any name; that is refused here.
"""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moekit import files
from moekit.errors import CheckpointError
from moekit.formats.guard import WAY_OUT

HEADER_BYTES = 25_000_000
"""Longest header that is read; 91,000 tensors in one file have 13 MB."""
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Safetensors:
    """A mapped file of tensors, its header checked; CheckpointError if it is anything but sound safetensors.

    The library's own reader for torch refuses files larger than memory (`files.mapped`).
    """

    def __init__(self, path: Path) -> None:
        begin = b""
        try:
            with path.open("rb") as file:
                begin = file.read(8)
                if HEADER_BYTES < (length := int.from_bytes(begin, "little")) <= path.stat().st_size:
                    found = f"{path} has a header of {length} bytes"
                    raise CheckpointError(f"{found}, more than the {HEADER_BYTES} allowed")
                with safe_open(path, framework="np"):  # which believes no header
                    self._header: dict[str, Any] = json.loads(file.read(length), object_pairs_hook=files.unique)
            self._map = files.mapped(path)
        except (OSError, SafetensorError, ValueError) as error:
            if isinstance(error, SafetensorError) and _pickled(begin):
                raise CheckpointError(f"{path} is not safetensors but {WAY_OUT}") from None
            raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
        self._header.pop("__metadata__", None)
        self._path, self._data = path, 8 + length
        if odd := [name for name in self._header if not name or not name.isprintable()]:
            raise CheckpointError(f"{path} names a tensor {min(odd)[:80]!r}, which is no name")

    def names(self) -> Collection[str]:
        """Returns the names of its tensors."""
        return self._header.keys()

    def shape(self, name: str) -> list[int]:
        """Returns the shape of a tensor."""
        shape: list[int] = self._header[name]["shape"]
        return shape

    def kind(self, name: str) -> str:
        """Returns a tensor's type as the format spells it, "BF16"."""
        kind: str = self._header[name]["dtype"]
        return kind

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor as it lies in the file; nothing is copied."""
        if (dtype := DTYPES.get(self.kind(name))) is None:
            raise CheckpointError(f"{name} in {self._path} has type {self.kind(name)}; read are {', '.join(DTYPES)}")
        begin, end = self._header[name]["data_offsets"]
        if begin == end:
            return torch.empty(self.shape(name), dtype=dtype)
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=end - begin, offset=self._data + begin)
        return (flat if flat.data_ptr() % dtype.itemsize == 0 else flat.clone()).view(dtype).view(self.shape(name))


def _pickled(begin: bytes) -> bool:
    """Returns whether a file that begins so is a zip archive, as torch.save writes it, or a bare pickle."""
    return begin[:4] == b"PK\x03\x04" or (begin[:1] == b"\x80" and begin[1] in range(2, 6) and any(begin[3:]))

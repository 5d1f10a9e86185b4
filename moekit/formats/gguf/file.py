"""The container: metadata and tensor table, written at once and read with every count held against the file's size.

Version 3, little-endian: magic, version, two counts, key-value pairs, a table of names, shapes, types and offsets, then
the tensors, each on a multiple of the alignment and right behind the one before.
"""

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moekit import files
from moekit.errors import CheckpointError
from moekit.formats.gguf.blocks import TYPES, Kind

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MOST_NAME, MOST_AXES = 2**16 - 1, 4
Value = bool | int | float | str | list[str] | list[int] | list[float] | list[bool]

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 4, 5, 6, 7, 8, 9


class Info(NamedTuple):
    """One tensor: shape outermost axis first (GGUF writes it reversed), type, and where it begins in the data."""

    shape: tuple[int, ...]
    kind: Kind
    begin: int

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) // self.kind.block * self.kind.bytes


def padded(size: int, alignment: int = ALIGNMENT) -> int:
    return size + -size % alignment


def header(keys: dict[str, Value], tensors: Sequence[tuple[str, tuple[int, ...], Kind]]) -> tuple[bytes, int]:
    """Returns what stands before the tensors, up to the alignment, and the bytes of all tensors behind it."""
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(keys))]
    parts += [_string(key) + _pair(value) for key, value in keys.items()]
    begin = 0
    for name, shape, kind in tensors:
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        parts.append(_string(name) + sizes + struct.pack("<IQ", kind.id, begin))
        begin += padded(Info(shape, kind, begin).bytes)
    content = b"".join(parts)
    return content.ljust(padded(len(content)), b"\0"), begin


def _string(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _pair(value: Value) -> bytes:
    """Returns type and value; whole numbers are uint32, in lists int32, and other numbers float32."""
    if isinstance(value, list):
        kind = _INT32 if value and isinstance(value[0], int) else _STRING
        items = b"".join(_string(item) if isinstance(item, str) else struct.pack("<i", item) for item in value)
        return struct.pack("<IIQ", _ARRAY, kind, len(value)) + items
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _string(value)
    kind = _BOOL if isinstance(value, bool) else _UINT32 if isinstance(value, int) else _FLOAT32
    return struct.pack("<I", kind) + struct.pack(_SCALARS[kind], value)


class GGUF:
    """A file's metadata and tensors, mapped. Raises CheckpointError for anything that is not a sound GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._map = files.mapped(path)
        except (OSError, ValueError) as error:  # ValueError: an empty file
            raise CheckpointError(
                f"{path} cannot be read as GGUF: {getattr(error, 'strerror', None) or error}"
            ) from None
        self._at = 0
        if self._take(4) != MAGIC:
            raise CheckpointError(f"{path} is not a GGUF file: it does not begin with GGUF")
        version, tensors, pairs = self._unpack("<IQQ")
        if version not in (2, VERSION):
            raise CheckpointError(f"{path} is GGUF version {version} but 2 and 3 are read, little-endian")
        self._expect(pairs, 13, "key-value pairs")
        self._expect(tensors, 32, "tensors")
        self.keys: dict[str, Value] = {}
        for _ in range(pairs):
            key = self._text(MOST_NAME)
            if key in self.keys:
                raise CheckpointError(f"{path} has the key {key!r} twice")
            self.keys[key] = self._value(key, self._unpack("<I")[0])
        self.tensors = self._table(tensors)

    def tensor(self, name: str) -> Tensor:
        """Returns a tensor's bytes, (rows, bytes of a row), as they lie in the file; nothing is copied."""
        info = self.tensors[name]
        rows = math.prod(info.shape[:-1])
        flat = torch.frombuffer(self._map, dtype=torch.uint8, count=info.bytes, offset=self._data + info.begin)
        return flat.view(rows, info.bytes // rows)

    def _table(self, count: int) -> dict[str, Info]:
        table: dict[str, Info] = {}
        alignment, end = self.keys.get("general.alignment", ALIGNMENT), 0
        if isinstance(alignment, bool) or not isinstance(alignment, int) or alignment not in (8, 16, 32, 64, 128, 256):
            raise CheckpointError(
                f"{self.path}: general.alignment is {alignment!r} but must be a power of two, 8 to 256"
            )
        for _ in range(count):
            name = self._text(MOST_NAME)
            axes = self._unpack("<I")[0]
            if not 1 <= axes <= MOST_AXES:
                raise CheckpointError(f"{self.path}: tensor {name!r} has {axes} axes but must have 1 to {MOST_AXES}")
            shape = tuple(reversed(self._unpack(f"<{axes}Q")))
            number, begin = self._unpack("<IQ")
            if name in table:
                raise CheckpointError(f"{self.path} has the tensor {name!r} twice")
            if number not in TYPES:
                known = ", ".join(f"{kind.name} ({kind.id})" for kind in TYPES.values())
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has type {number} but only these are read: {known}"
                )
            table[name] = info = Info(shape, TYPES[number], begin)
            if 0 in shape or shape[-1] % info.kind.block:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} has shape {shape}, which {info.kind.name} cannot have"
                )
            if begin != padded(end, alignment):
                raise CheckpointError(f"{self.path}: tensor {name!r} begins at {begin}, not behind the one before")
            end = begin + info.bytes
            if end > len(self._map):
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} ends at {end} but the file has {len(self._map)} bytes"
                )
        self._data = padded(self._at, alignment)
        found = len(self._map) - self._data
        if table and found not in (end, padded(end, alignment)):
            raise CheckpointError(
                f"{self.path} has {found} bytes of tensors but lists {end}; it is cut short or damaged"
            )
        return table

    def _value(self, key: str, kind: int) -> Value:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            value: Value = self._scalars(key, kind, 1)[0]
            return value
        if kind != _ARRAY:
            raise CheckpointError(f"{self.path}: {key!r} has a value of type {kind}, which GGUF does not have")
        kind, count = self._unpack("<IQ")
        if kind == _STRING:
            self._expect(count, 8, f"texts in {key!r}")
            return [self._text() for _ in range(count)]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: {key!r} is an array of type {kind}, which is not read")
        return self._scalars(key, kind, count)

    def _scalars(self, key: str, kind: int, count: int) -> list[Any]:
        code = _SCALARS[kind][1]
        self._expect(count, struct.calcsize(f"<{code}"), f"values in {key!r}")
        content = self._take(count * struct.calcsize(f"<{code}"))
        if kind == _BOOL and content.strip(b"\0\1"):
            raise CheckpointError(f"{self.path}: {key!r} is a boolean but neither 0 nor 1")
        return list(struct.unpack(f"<{count}{code}", content))

    def _text(self, most: int | None = None) -> str:
        length = self._unpack("<Q")[0]
        if most is not None and length > most:
            raise CheckpointError(f"{self.path} has a name of {length} bytes but at most {most} are allowed")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise CheckpointError(f"{self.path} has text that is not UTF-8 before byte {self._at}") from None

    def _unpack(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._take(struct.calcsize(form)))

    def _take(self, count: int) -> bytes:
        self._expect(count, 1, "bytes")
        self._at += count
        return self._map[self._at - count : self._at]

    def _expect(self, count: int, size: int, what: str) -> None:
        """Raises unless so many things of at least `size` bytes can still follow: before anything is made of them."""
        if count > (left := len(self._map) - self._at) // size:
            raise CheckpointError(f"{self.path} claims {count} {what} at byte {self._at} but ends {left} bytes later")

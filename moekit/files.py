"""Files that are whole or not there: written in one atomic step, told apart by hash, JSON checked as it is read."""

import contextlib
import errno
import hashlib
import json
import mmap
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from pydantic import TypeAdapter, ValidationError

from moekit.errors import MoekitError, nearest

_Content = TypeVar("_Content")

LARGEST_JSON = 2**26
"""Bytes; an index of 91,000 tensors has 8 MB."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Yields a hidden sibling file that becomes `path` in one rename when the block ends without an error.

    Whatever ends the block early, only an older `path` stays. Raises OSError that names the file (a full disk, say).
    """
    part = path.with_name(f".{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def check_writable(path: Path) -> None:
    """Raises OSError that names the file if it cannot be written: asked before the work whose result it will hold.

    Nothing is left there, no folder either.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    try:
        with tempfile.TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, and its folder if need be, in one atomic step: a kill leaves the old content or the new one.

    Raises OSError that names the file (the disk is full, say); then nothing half-written stays.
    """
    with atomic(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one atomic step."""
    write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path, kind: type[_Content], error: type[MoekitError], advice: str = "") -> _Content:
    """Returns a file's JSON as a `kind` of content; raises `error` naming the file, the field and what was found.

    A key that is there twice is an error: who reads the first and who reads the last would read two files.
    """
    text = read_bytes(path, error)
    try:
        content = TypeAdapter(kind).validate_json(text)
        json.loads(text, object_pairs_hook=unique)
        return content
    except ValidationError as problem:
        raise error(f"{path}: {explain(problem)}{advice and '; '}{advice}") from None
    except ValueError as problem:
        raise error(f"{path}: {problem}{advice and '; '}{advice}") from None


def read_bytes(path: Path, error: type[MoekitError]) -> bytes:
    """Returns the content of a JSON file; raises `error` if it cannot be read or is no size for such a file."""
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise error(f"{path} has {size} bytes, more than the {LARGEST_JSON} that are read of JSON")
        return path.read_bytes()
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}") from None


def mapped(path: Path) -> mmap.mmap:
    """Returns a file as memory that tensors can share: no page of it is read before it is looked at, none is written.

    torch wants memory that could be written to. Linux lends that only up to what it has, and so refuses a file larger
    than memory, unless it is told that nothing needs to be reserved. Raises OSError, ValueError for an empty file.
    """
    with path.open("rb") as file:
        if sys.platform != "linux":
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        no_reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
        return mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE | no_reserve, mmap.PROT_READ | mmap.PROT_WRITE)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns one JSON object of these keys and values; raises ValueError when a key is there twice."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} is there twice")
        found[key] = value
    return found


def explain(problem: ValidationError) -> str:
    """Returns one line on the first of pydantic's errors: the field, what it must be, what was found."""
    first = problem.errors(include_url=False)[0]
    field, found, hint = ".".join(map(str, first["loc"])), first["input"], ""
    if first["type"] == "missing":
        found = list(found)
        hint = nearest(str(first["loc"][-1]), found)
    shown = repr(found) if len(repr(found)) <= 80 else f"{found!r:.77}..."
    return f"{field}{': ' if field else ''}{first['msg']}{hint}, found {shown}"


def sha256(path: Path) -> str:
    """Returns the file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hashes(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns size in bytes and SHA-256 of each named file in the folder."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in sorted(names)}


def sync_folder(path: Path) -> None:
    """Asks the system to put a folder's entries on the disk, where it can (Windows cannot)."""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

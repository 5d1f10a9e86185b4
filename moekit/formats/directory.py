"""Directories that appear whole or not at all, and say what they hold."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from safetensors import SafetensorError

from moekit import files
from moekit.config import Strict
from moekit.errors import CheckpointError

MANIFEST = "manifest.json"
PlainName = Annotated[str, Field(pattern=r"^[^/\\]+$")]
"""The name of a file in the same folder, never a path that leads elsewhere."""


class Entry(Strict):
    """What a file must be."""

    bytes: int
    sha256: str


class Manifest(Strict):
    """What a directory holds."""

    format: Literal[1]
    files: dict[PlainName, Entry] = Field(min_length=1)


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False, hashed: dict[str, Any] | None = None) -> Iterator[Path]:
    """Yields a sibling temporary directory that becomes `path` in one rename when the block ends without an error.

    `hashed` takes what the block has hashed already, as `files.hashes` returns it, so that no file is hashed twice.
    Every file is synced and listed in manifest.json with its size and SHA-256. On any error, a full disk for one,
    nothing is left behind and an older `path` stays as it was. Raises CheckpointError if `path` exists.
    """
    if path.exists() and not (overwrite and path.is_dir()):
        raise CheckpointError(f"{path} exists already; choose another directory or remove it")
    temporary = path.parent / f".{path.name}.writing-{os.getpid()}"
    old = path.parent / f".{path.name}.replaced-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        names = [entry.name for entry in temporary.iterdir()]
        for name in names:
            with (temporary / name).open("rb+") as file:
                os.fsync(file.fileno())
        known = {name: entry for name, entry in (hashed or {}).items() if name in names}
        listed = known | files.hashes(temporary, set(names) - known.keys())
        files.write_json(temporary / MANIFEST, {"format": 1, "files": dict(sorted(listed.items()))})
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        files.sync_folder(path.parent)
    except BaseException as error:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):  # safetensors has its own error for a full disk
            reason = getattr(error, "strerror", None) or error
            raise CheckpointError(f"{path} could not be written: {reason}; nothing was left behind") from error
        raise


def check_directory(path: Path) -> dict[str, Any]:
    """Returns the manifest's files after checking each one's presence, size and hash.

    Raises CheckpointError naming the first file that is missing, cut short or changed.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory")
    if not (path / MANIFEST).is_file():
        held = sorted((path / "checkpoints").glob("step-*"))
        hint = f"; it is a run, whose newest is {held[-1]}" if held else ""
        raise CheckpointError(f"{path} has no {MANIFEST}, so it is not a checkpoint that was written to its end{hint}")
    advice = "this is prepared data, not a model" if (path / "train").is_dir() else ""
    listed = files.read_json(path / MANIFEST, Manifest, CheckpointError, advice).model_dump()["files"]
    for name, expected in listed.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path / name} is missing but {MANIFEST} lists it")
        if (size := (path / name).stat().st_size) != expected["bytes"]:
            found = f"{size} bytes, {MANIFEST} says {expected['bytes']}"
        elif (digest := files.sha256(path / name)) != expected["sha256"]:
            found = f"its hash is {digest}, {MANIFEST} says {expected['sha256']}"
        else:
            continue
        raise CheckpointError(f"{path / name} has changed since it was written: {found}")
    return dict(listed)


def listing(path: Path) -> dict[str, Any]:
    """Returns the files of a model directory by size and hash: as its manifest has them, or measured where it has none.

    Another library's directory has none; nothing is checked here.
    """
    if (path / MANIFEST).is_file():
        return dict(files.read_json(path / MANIFEST, Manifest, CheckpointError).model_dump()["files"])
    return files.hashes(path, [file.name for file in path.iterdir() if file.is_file()])

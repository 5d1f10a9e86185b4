"""Directories that appear whole or not at all, and say what they hold."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from moekit import receipts
from moekit.errors import CheckpointError

MANIFEST, FORMAT = "manifest.json", 1


@contextmanager
def atomic_directory(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields a sibling temporary directory that becomes `path` in one rename when the block ends without an error.

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
                receipts.sync(file.fileno())
        manifest = {"format": FORMAT, "files": receipts.file_hashes(temporary, names)}
        receipts.write_json(temporary / MANIFEST, manifest)
        receipts.sync_folder(temporary)
        if path.exists():
            path.rename(old)
            temporary.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.rename(path)
        receipts.sync_folder(path.parent)
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
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{path} has no {MANIFEST}, so it is not a checkpoint that was written to its end")
    content = read_json(manifest)
    if content.get("format") != FORMAT:
        found = f"{manifest} has format {content.get('format')!r}"
        raise CheckpointError(f"{found} but a model's is {FORMAT}; moekit-tokens is prepared data, not a model")
    files = content.get("files")
    if not isinstance(files, dict) or not files:
        raise CheckpointError(f"{manifest} lists no files")
    for name, expected in files.items():
        if Path(name).name != name or not isinstance(expected, dict):
            raise CheckpointError(f"{manifest} lists {name!r}, which is not the plain name of a file beside it")
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing but {MANIFEST} lists it")
        if file.stat().st_size != expected.get("bytes"):
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes but {MANIFEST} says {expected.get('bytes')}")
        if receipts.sha256(file) != expected.get("sha256"):
            raise CheckpointError(f"{file} has changed since it was written: its SHA-256 is not the one in {MANIFEST}")
    return files


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; CheckpointError if it is missing or is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__} but must hold an object")
    return value

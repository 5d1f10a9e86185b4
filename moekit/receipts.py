"""What a step consumed, created and proved, in a form that a machine can check again."""

import datetime
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import safetensors
import torch

from moekit.config import ModelConfig, parameters
from moekit.version import __version__

FILE = "receipt.json"


class Check(NamedTuple):
    """A measured value against its bound."""

    name: str
    value: float
    bound: float
    held: bool


def sha256(path: Path) -> str:
    """Returns the file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Returns size in bytes and SHA-256 of each named file in the folder."""
    return {name: {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)} for name in sorted(names)}


def parameters_by_role(config: ModelConfig) -> dict[str, int]:
    """Returns the number of parameters in each role."""
    return {role: count.total for role, count in parameters(config).items()}


def make(
    action: str,
    *,
    config: Mapping[str, Any],
    model: ModelConfig,
    trains: bool = False,
    inputs: Mapping[str, Any] | None = None,
    outputs: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    health: Mapping[str, Any] | None = None,
    checks: Iterable[Check] = (),
    seed: int | None = None,
    device: str = "cpu",
    seconds: float | None = None,
) -> dict[str, Any]:
    """Returns the receipt of one step: a JSON-ready dictionary.

    `trains` says that every parameter was trained; `tensors` accounts for every source tensor (used, created, dropped
    and why); `health` is the routing's state.
    """
    return {
        "action": action,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": config,
        "inputs": inputs or {},
        "outputs": outputs or {},
        "tensors": tensors or {},
        "parameters_by_role": parameters_by_role(model),
        "trained_by_role": parameters_by_role(model) if trains else {},
        "health": health or {},
        "checks": [check._asdict() for check in checks],
        "seed": seed,
        "device": device,
        "seconds": seconds,
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Returns the versions that a result can depend on."""
    return {
        "moekit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def write_json(path: Path, value: Any) -> None:
    """Writes JSON in one atomic step."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file in one atomic step: a kill leaves the old content or the new one."""
    temporary = path.with_name(f".{path.name}.writing")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        sync(file.fileno())
    os.replace(temporary, path)


def sync(descriptor: int) -> None:
    """Asks the system to put a file's content on the disk."""
    os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Asks the system to put a folder's entries on the disk, where it can (Windows cannot)."""
    if sys.platform != "win32":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

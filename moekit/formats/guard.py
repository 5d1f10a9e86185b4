"""What is believed of a stranger's directory: links stay inside, headers say each thing once, no pickle is read.

The library safetensors refuses headers that lie about the file: a length beyond it, offsets that overlap, leave a gap
or reverse, a shape that does not fit its bytes. It takes the last of two tensors of one name, headers of up to 100 MB,
and any name; that is refused here.
"""

import json
import stat
from collections.abc import Collection
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from moekit import files
from moekit.errors import CheckpointError

HEADER_BYTES = 25_000_000
"""Longest header that is read; 91,000 tensors in one file have 13 MB."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WAY_OUT = (
    "a pickle, which can run any code when it is read, so moekit never does; "
    "ask for the model in safetensors, or where you trust it write its tensors with safetensors.torch.save_file"
)


def check_folder(folder: Path, names: Collection[str] = ()) -> None:
    """Raises CheckpointError unless it is a directory in which links (`names`: these alone) lead to nothing outside.

    A snapshot in a Hugging Face cache, models--NAME/snapshots/REVISION, consists of links to models--NAME/blobs; those
    may be. Whatever is neither file nor folder (a pipe would block its reader for ever) is refused too.
    """
    if folder.is_file() and folder.suffix in PICKLES:
        raise CheckpointError(f"{folder} is {WAY_OUT}")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory")
    homes = [home := folder.resolve()]
    if home.parent.name == "snapshots" and (cache := home.parent.parent).name.startswith("models--"):
        homes.append(cache / "blobs")
    for entry in folder.iterdir():
        if names and entry.name not in names:
            continue
        try:
            real, mode = entry.resolve(), entry.stat().st_mode
        except FileNotFoundError:
            continue  # a link to nothing is a missing file to whoever wants it
        except (OSError, RuntimeError):  # links in a circle
            raise CheckpointError(f"{entry} cannot be followed to a file") from None
        if entry.is_symlink() and not any(real.is_relative_to(home) for home in homes):
            raise CheckpointError(f"{entry} is a link that leads out of its directory, to {real}; put a copy there")
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise CheckpointError(f"{entry} is neither a file nor a directory")


def refuse_pickles(folder: Path) -> None:
    """Raises CheckpointError if a pickle of weights is in the folder; for one that has nothing else."""
    if found := sorted(entry.name for entry in folder.iterdir() if entry.suffix in PICKLES):
        raise CheckpointError(f"{folder} has no safetensors, only {found[0]}: {WAY_OUT}")


def open_safetensors(path: Path) -> Any:
    """Returns the open file after checking its header; CheckpointError if it is anything but sound safetensors."""
    try:
        with path.open("rb") as file:
            begin = file.read(8)
            if HEADER_BYTES < (length := int.from_bytes(begin, "little")) <= path.stat().st_size:
                raise CheckpointError(f"{path} has a header of {length} bytes, more than the {HEADER_BYTES} allowed")
            opened = safe_open(path, framework="pt")
            names = json.loads(file.read(length), object_pairs_hook=files.unique).keys() - {"__metadata__"}
    except (OSError, SafetensorError, ValueError) as error:
        if isinstance(error, SafetensorError) and _pickled(begin):
            raise CheckpointError(f"{path} is not safetensors but {WAY_OUT}") from None
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    if odd := [name for name in names if not name or not name.isprintable()]:
        raise CheckpointError(f"{path} names a tensor {min(odd)[:80]!r}, which is no name")
    return opened


def _pickled(begin: bytes) -> bool:
    """Returns whether a file that begins so is a zip archive, as torch.save writes it, or a bare pickle."""
    return begin[:4] == b"PK\x03\x04" or (begin[:1] == b"\x80" and begin[1] in range(2, 6) and any(begin[3:]))

"""What is believed of a stranger's directory: links stay inside, no pickle is read."""

import stat
from collections.abc import Collection
from pathlib import Path

from moekit.errors import CheckpointError

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

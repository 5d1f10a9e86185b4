"""Training checkpoints: a model directory plus optimiser, sampler position, random states and log window."""

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from moekit import files
from moekit.errors import CheckpointError
from moekit.formats.checkpoint import load, save
from moekit.formats.directory import check_directory
from moekit.formats.tokenizer import Tokenizer
from moekit.nn.model import Model
from moekit.train import optimizer as optim

logger = logging.getLogger(__name__)

TENSORS, STATE = "training.safetensors", "training.json"


def folder_of(run: Path, step: int) -> Path:
    """Returns the directory of a step's checkpoint."""
    return run / "checkpoints" / f"step-{step:08d}"


def write(
    run: Path,
    model: Model,
    optimizers: list[Optimizer],
    tokenizer: Tokenizer,
    receipt: dict[str, Any],
    state: dict[str, Any],
    tensors: dict[str, Tensor],
    keep: int,
) -> Path:
    """Writes a checkpoint in one atomic step, then removes all but the newest `keep`; returns its directory.

    Later steps, left by a run that had to go back behind a damaged checkpoint, neither count nor go.
    `state` is JSON and holds "step", the number of steps done; `tensors` is what else must survive.
    """
    tensors = {
        **{f"optimizer/{name}": value for name, value in optim.state_tensors(model, optimizers).items()},
        **{f"other/{name}": value for name, value in tensors.items()},
        "random/cpu": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        tensors |= {f"random/cuda{i}": value for i, value in enumerate(torch.cuda.get_rng_state_all())}

    def extra(folder: Path) -> None:
        save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, folder / TENSORS)
        files.write_json(folder / STATE, state)

    folder = folder_of(run, state["step"])
    save(model, folder, tokenizer, receipt=receipt, extra=extra, overwrite=True)
    for old in [found for found in finished(run) if found <= folder][:-keep]:
        # renamed first: a kill in the middle must not leave something that looks like a checkpoint
        doomed = old.with_name(f".{old.name}.removed")
        old.rename(doomed)
        shutil.rmtree(doomed)
    return folder


def finished(run: Path) -> list[Path]:
    """Returns the run's checkpoint directories, oldest first; half-written ones have other names."""
    return sorted((run / "checkpoints").glob("step-" + "[0-9]" * 8))


def clean(run: Path) -> None:
    """Removes what a killed process left half-written or half-removed."""
    for left in (run / "checkpoints").glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def newest(run: Path, before: int | None = None) -> Path | None:
    """Returns the newest whole checkpoint, of a step below `before` if given, or None; damaged ones are skipped."""
    for folder in reversed(finished(run)):
        if before is not None and folder >= folder_of(run, before):
            continue
        try:
            check_directory(folder)
        except CheckpointError as error:
            logger.warning("skipping a damaged checkpoint: %s", error)
        else:
            return folder
    return None


def read(folder: Path, model: Model, optimizers: list[Optimizer]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Puts weights, optimiser and random states back; returns what was written as `state` and `tensors`."""
    loaded = load(folder, check_hashes=False).state_dict()
    model.load_state_dict(loaded)
    tensors = load_file(folder / TENSORS)
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "other": {}, "random": {}}
    for label, value in tensors.items():
        part, name = label.split("/", 1)
        parts[part][name] = value
    optim.load_state_tensors(model, optimizers, parts["optimizer"])
    torch.set_rng_state(parts["random"].pop("cpu"))
    for name, value in parts["random"].items():
        if torch.cuda.is_available() and int(name.removeprefix("cuda")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, int(name.removeprefix("cuda")))
    state = files.read_json(folder / STATE, dict[str, Any], CheckpointError)
    return state, {name: value.clone() for name, value in parts["other"].items()}

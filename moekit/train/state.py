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
from moekit.errors import CheckpointError, ConfigError
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
    # of the model's devices alone: to ask the others would open a context on each
    cuda = {p.device.index: torch.cuda.get_rng_state(p.device) for p in model.parameters() if p.is_cuda}
    random = {"cpu": torch.get_rng_state()} | {f"cuda{i}": rng for i, rng in cuda.items()}
    parts = {"optimizer": optim.state_tensors(model, optimizers), "other": tensors, "random": random}
    named = {f"{part}/{name}": value for part, held in parts.items() for name, value in held.items()}

    def extra(folder: Path) -> None:
        save_file({name: value.detach().cpu().contiguous() for name, value in named.items()}, folder / TENSORS)
        files.write_json(folder / STATE, state)

    folder = folder_of(run, state["step"])
    save(model, folder, tokenizer, receipt=receipt, extra=extra, overwrite=True)
    for old in [found for found in finished(run) if found <= folder][:-keep]:
        # renamed first: a kill in the middle must not leave something that looks like a checkpoint
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.removed")))
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
        if before is None or folder < folder_of(run, before):
            try:
                check_directory(folder)
                return folder
            except CheckpointError as error:
                logger.warning("skipping a damaged checkpoint: %s", error)
    return None


def model_folder(given: Path) -> Path:
    """Returns the newest whole checkpoint of a run, or the model directory that was given."""
    if not (given / "checkpoints").is_dir():
        return given
    if (folder := newest(given)) is None:
        raise ConfigError(f"{given} is a run without a checkpoint yet")
    return folder


def read(folder: Path, model: Model, optimizers: list[Optimizer]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Puts weights, optimiser and random states back; returns what was written as `state` and `tensors`."""
    model.load_state_dict(load(folder, check_hashes=False).state_dict())
    parts: dict[str, dict[str, Tensor]] = {"optimizer": {}, "other": {}, "random": {}}
    for label, value in load_file(folder / TENSORS).items():
        part, name = label.split("/", 1)
        parts[part][name] = value.clone()  # what was read is a map of a file that retention removes
    optim.load_state_tensors(model, optimizers, parts["optimizer"])
    torch.set_rng_state(parts["random"]["cpu"])
    for i in range(torch.cuda.device_count()):
        if f"cuda{i}" in parts["random"]:
            torch.cuda.set_rng_state(parts["random"][f"cuda{i}"], i)
    return files.read_json(folder / STATE, dict[str, Any], CheckpointError), parts["other"]

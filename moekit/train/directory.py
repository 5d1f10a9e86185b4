"""A run's directory: free, or holding the very run that is to go on."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from moekit import files
from moekit.config import RunConfig, dump, load_run_config
from moekit.errors import ConfigError

KEPT: Any = dict.fromkeys(("model", "objective", "init", "optimizer", "schedule", "steps", "seed", "grad_clip"), True)
KEPT |= {"data": {"sequence_length", "batch_size", "packing", "order", "cross_document_attention"}}
"""Settings that a resumed run cannot change. The text must be the same too, wherever it lies now."""


def check(run: Path, config: RunConfig, resume: bool) -> None:
    """Raises ConfigError unless the run's directory is free, or with `resume` holds this run."""
    file = run / "config.yaml"
    if resume:
        if not file.is_file():
            raise ConfigError(f"{run} has no config.yaml, so there is no run to resume; leave out --resume")
        before, now = (one.model_dump(include=KEPT) for one in (load_run_config(file), config))
        if before != now:
            change = difference(before, now)
            raise ConfigError(f"{change} in {file}; a resumed run must keep it, start a new one instead")
    elif run.exists() and (not run.is_dir() or any(not entry.name.startswith(".") for entry in run.iterdir())):
        raise ConfigError(f"{run} exists already; use --resume to continue it, or choose another --out")


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Holds the run's directory, which it makes, for this process; ConfigError where another one holds it."""
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / ".lock", timeout=0)
    try:
        with contextlib.suppress(NotImplementedError):  # a file system without locks
            lock.acquire()
    except Timeout:
        raise ConfigError(f"another process is at work in {run}; wait for it, or end it") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # Windows removes no open file
            (run / ".lock").unlink()  # while it is held: who has opened it finds that it is gone, and holds nothing
        lock.release()


def difference(before: Any, now: Any, name: str = "") -> str:
    """Returns the first setting that differs, with both values."""
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in before | now if before.get(key) != now.get(key))
        return difference(before.get(key), now.get(key), f"{name}.{key}")
    return f"{name.removeprefix('.')} is {now} but {before}"


def claim(run: Path, config: RunConfig) -> None:
    """Makes the run's directory. A kill at any moment leaves it free, or with a whole config.yaml."""
    run.mkdir(parents=True, exist_ok=True)
    files.write(run / "config.yaml", dump(config))
    (run / "checkpoints").mkdir(exist_ok=True)

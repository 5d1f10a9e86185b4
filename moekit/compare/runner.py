"""Trains the runs of a comparison, several at once, each in a process of its own."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from moekit.compare.runs import Run, last_record, state
from moekit.errors import ConfigError
from moekit.train import process

POLL = 0.1
"""Seconds between looks at the processes."""
PATIENCE = 60.0
"""Seconds to wait for the runs of a comparison that was killed: each saves after the step it is in."""


class Status(NamedTuple):
    """How a run stands. `state` is waiting, running, done, failed or stopped."""

    run: Run
    state: str
    step: int
    loss: float | None
    error: str = ""
    """What a failed run said last."""


Watch = Callable[[Sequence[Status]], None]
"""Is shown how all runs stand, about once a second."""


class _Child(NamedTuple):
    process: subprocess.Popen[bytes]
    log: Path


def log_of(run: Run) -> Path:
    """Returns the file that a run's messages go to, beside its directory."""
    return run.path.with_name(f"{run.path.name}.log")


def train_all(runs: Sequence[Run], jobs: int, lock: int, watch: Watch) -> list[Status]:
    """Returns how each run ended. Finished runs are kept, begun ones go on; one that fails does not stop the others.

    SIGINT and SIGTERM end it in order: the runs save, and the same call goes on with them later. Each run gets an equal
    share of the threads that torch would use here. `lock` is what `locked` gave.
    """
    ended: dict[Run, Status] = {}
    children: dict[Run, _Child] = {}
    todo = []
    for run in runs:
        if state(run) == "done":
            ended[run] = _status(run, "done")
        else:
            todo.append(run)
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // max(1, min(jobs, len(todo)))))}

    def look() -> list[Status]:
        return [ended.get(run) or _status(run, "running" if run in children else "waiting") for run in runs]

    with process.signals() as caught:
        try:
            shown, told = 0.0, False
            while children or (todo and not caught):
                if todo and not caught and len(children) < jobs:
                    run = todo.pop(0)
                    children[run] = _start(run, environment, lock)
                if caught and not told:  # once: a second one would end a run without saving
                    told = True
                    for child in children.values():
                        child.process.terminate()
                for run, child in [*children.items()]:
                    if (code := child.process.poll()) is not None:
                        del children[run]
                        ended[run] = _ended(run, code, bool(caught), child.log)
                if time.monotonic() - shown > 1:
                    watch(look())
                    shown = time.monotonic()
                time.sleep(POLL)
        finally:  # an error of ours or a second signal: the runs see their input end, save, and stop
            for child in children.values():
                if child.process.stdin:
                    child.process.stdin.close()
    watch(look())
    return [ended.get(run) or _status(run, "stopped") for run in runs]


def _status(run: Run, now: str) -> Status:
    record = last_record(run) if now != "waiting" or run.path.exists() else None
    return Status(run, now, *((record["step"], record["loss"]) if record else (0, None)))


def _start(run: Run, environment: dict[str, str], lock: int) -> _Child:
    run.path.parent.mkdir(parents=True, exist_ok=True)
    with log_of(run).open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "moekit.compare.child", str(run.path)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env=environment,
            pass_fds=[lock] if os.name == "posix" else (),
            start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the others in order
        )
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died at once; poll says so
        child.stdin.write(run.config.model_dump_json().encode() + b"\n")
        child.stdin.flush()
    return _Child(child, log_of(run))


def _ended(run: Run, code: int, stopping: bool, log: Path) -> Status:
    if code == 0:
        return _status(run, "done")
    if stopping and code in (130, -signal.SIGTERM):  # it was saved, or had not begun yet
        return _status(run, "stopped")
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    said = lines[-1].strip() if code > 0 and lines else f"ended by signal {-code}" if code < 0 else f"status {code}"
    return _status(run, "failed")._replace(error=said)


@contextlib.contextmanager
def locked(out: Path) -> Iterator[int]:
    """Yields a file that only one comparison at a time, and the runs that it started, can hold open and locked."""
    out.mkdir(parents=True, exist_ok=True)
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        until = time.monotonic() + PATIENCE
        while True:
            try:
                _lock(lock)
                break
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                if time.monotonic() > until:
                    raise ConfigError(f"another process is at work in {out}; wait for it, or end it") from None
                time.sleep(POLL)
        yield lock
    finally:
        os.close(lock)


def _lock(file: int) -> None:
    """Locks an open file, or raises OSError at once. On Windows its runs do not inherit it."""
    if sys.platform == "win32":
        import msvcrt

        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

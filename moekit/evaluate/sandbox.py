"""Runs programs that a model wrote, in a process of their own, within limits of time, memory, files and processes.

Each has an empty environment, a folder of its own that is removed afterwards, and no packages. Where Linux lends its
namespaces it has no network, and whatever it started ends with it; where the caller is root, it becomes nobody if it
can. It can read what its user can read, and without root's help it could write there too: run the whole evaluation in a
container, or as a user who owns nothing, if that matters. A program that looks for the secret of `contained.main` in
the interpreter's frames can pretend to have passed: the limits protect the machine, not the score.
"""

import contextlib
import functools
import json
import math
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from moekit.errors import UnsupportedError

CONTAINED = Path(__file__).parent / "contained.py"
FOLDER = "moekit-sandbox-"
OUTPUT = 1 << 16
"""Bytes of output that are kept; the rest is read and dropped."""
ORPHANS = ["--net", "--pid", "--fork", "--kill-child"]
PROBE = "import decimal, json, random, re"
"""Must pass: the interpreter's files can be read."""


class Outcome(NamedTuple):
    """How a program ended."""

    passed: bool
    """It came to its end: every assert held."""
    status: str
    """passed, failed or timeout."""
    output: str
    """The beginning of what it wrote to standard output and error."""


class Isolation(NamedTuple):
    """How programs are kept apart here, beyond the limits."""

    command: tuple[str, ...]
    """What the interpreter is started by."""
    drop: bool
    """The program runs as the user nobody."""
    note: str


def run(program: str, *, seconds: float = 10.0, memory: int = 1 << 30, file: int = 1 << 24) -> Outcome:
    """Returns how a Python program ends that is given so many seconds, and bytes of address space and of each file.

    Raises UnsupportedError where the limits cannot be set (Windows).
    """
    return _run(program, isolation(), seconds, memory, file)


@functools.cache
def isolation() -> Isolation:
    """Returns the best that this machine allows, found by trying; UnsupportedError where no limits can be set."""
    if os.name != "posix":
        raise UnsupportedError("programs that a model wrote are run on POSIX systems only, which can limit a process")
    unshare, root = shutil.which("unshare"), os.geteuid() == 0
    choices = [Isolation((), root, "network and files of the machine are within reach")] if root else []
    choices.append(Isolation((), False, "network, files and other processes of the user are within reach"))
    if unshare:
        users = (unshare, "--user", "--map-root-user", *ORPHANS)
        choices.insert(0, Isolation(users, False, "no network; files that the user can read or write are within reach"))
        if root:
            choices.insert(0, Isolation((unshare, *ORPHANS), True, "no network, user nobody"))
    for choice in choices:
        outcome = _run(PROBE, choice, 20.0, 1 << 30, 1 << 24)
        if outcome.passed:
            return choice
    said = outcome.output.strip().rpartition("\n")[2]
    raise UnsupportedError(f"programs that a model wrote cannot be contained here: {said or outcome.status}")


def _run(program: str, isolation: Isolation, seconds: float, memory: int, file: int) -> Outcome:
    secret = secrets.token_hex(16)
    limits = {"seconds": math.ceil(seconds) + 1, "memory": memory, "file": file, "processes": 32}
    job = {"program": program, "secret": secret, "drop": isolation.drop, "limits": limits}
    with (
        tempfile.TemporaryDirectory(prefix=FOLDER, ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
        contextlib.ExitStack() as pipes,
    ):
        os.chmod(folder, 0o777)  # nobody's too
        given.write(json.dumps(job).encode())
        given.seek(0)
        verdict, pipe = os.pipe()
        pipes.callback(os.close, verdict)
        process = subprocess.Popen(
            [*isolation.command, sys.executable, "-I", "-S", str(CONTAINED), str(pipe)],
            cwd=folder,
            env={},
            stdin=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[pipe],
            start_new_session=True,
        )
        os.close(pipe)
        assert process.stdout is not None
        stream, deadline = process.stdout.fileno(), time.monotonic() + seconds
        try:
            output = _read(stream, OUTPUT, deadline)
            with contextlib.suppress(subprocess.TimeoutExpired):  # it closed its output and goes on in silence
                process.wait(max(0.0, deadline - time.monotonic()))
            late = process.poll() is None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):  # gone already; macOS says it otherwise
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stdout.close()
        # It ends when nobody holds the other end: all that the program started is gone, or has got away.
        if _read(verdict, len(secret), time.monotonic() + 2.0) == secret:
            return Outcome(True, "passed", output)
    return Outcome(False, "timeout" if late else "failed", output)


def _read(stream: int, size: int, deadline: float) -> str:
    """Returns the first bytes, as text, of what a pipe gives until it ends or the time is over."""
    found = bytearray()
    while (left := deadline - time.monotonic()) > 0:
        if select.select([stream], [], [], left)[0]:
            if not (read := os.read(stream, OUTPUT)):
                break
            found += read[: size - len(found)]
    return found.decode(errors="replace")

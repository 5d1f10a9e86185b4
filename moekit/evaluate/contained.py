"""The inside of the sandbox: run by `sandbox.run` as a program of its own, with the standard library alone.

Sets its limits first, then executes the program that it reads, and says that the end was reached by writing a secret
to a pipe. A program that leaves early, by whatever way, has not said it.
"""

import contextlib
import json
import os
import resource
import sys
import traceback
from typing import Any

NOBODY = 65534


def _limit(seconds: int, memory: int, file: int, processes: int) -> None:
    """Sets limits that cannot be raised again: CPU seconds, bytes of address space and of a file, processes."""
    for kind, value in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, file),
        (resource.RLIMIT_NPROC, processes),  # of the user; root has none
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (value, value))


def main(pipe: int) -> None:
    job: dict[str, Any] = json.loads(sys.stdin.read())
    write, leave, secret, program = os.write, os._exit, job["secret"].encode(), job["program"]
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)  # the job, with the secret, cannot be read again
    if job["drop"]:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    _limit(**job["limits"])
    del job
    try:
        exec(compile(program, "program", "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except BaseException:  # SystemExit too: a program that ends itself has not come to its end
        traceback.print_exc(limit=-3)
        sys.stderr.flush()
        leave(1)
    with contextlib.suppress(Exception):  # closed, or another thing by now
        sys.stdout.flush()
    write(pipe, secret)
    leave(0)


if __name__ == "__main__":
    main(int(sys.argv[1]))

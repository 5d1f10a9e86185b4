"""Threads bound to cores, in the measuring process and nowhere else: a busy neighbour ruins unbound figures."""

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from moekit.errors import MoekitError

BOUND = {"OMP_PROC_BIND": "close", "OMP_PLACES": "cores", "THP_MEM_ALLOC_ENABLE": "1"}
"""And torch's memory in huge pages, as `moekit` asks for; it is the process that asks, so the others have it too."""


def bound(main: Callable[[Sequence[str]], None]) -> None:
    """Runs `main` on the command line's words, with OpenMP's threads bound to cores.

    The process replaces itself once: OpenMP reads its settings when it is loaded, and a bound parent would hand its one
    core down to a measuring child. A binding that the environment names already is kept.
    """
    if "OMP_PROC_BIND" not in os.environ and sys.platform != "win32":
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **BOUND})
    try:
        main(sys.argv[1:])
    except MoekitError as error:
        sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def unbound() -> None:
    """Lets a new child process have all cores again; for `preexec_fn`."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))

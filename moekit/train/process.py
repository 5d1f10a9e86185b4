"""What a run asks of its process: signals that end it in order, memory that stays, sums that do not change."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def signals() -> Iterator[list[int]]:
    """Yields a list that gets SIGTERM and SIGINT, for the run to end after its step; a second one acts as usual."""
    caught: list[int] = []
    with ExitStack() as handlers:

        def note(number: int, frame: Any) -> None:
            caught.append(number)
            handlers.close()  # puts the former handlers back

        if threading.current_thread() is threading.main_thread():  # elsewhere the caller has the signals
            for ending in (signal.SIGTERM, signal.SIGINT):
                handlers.callback(signal.signal, ending, signal.signal(ending, note))
        yield caught


@contextmanager
def deterministic() -> Iterator[None]:
    """Asks CUDA for kernels whose sums do not differ from run to run; on a CPU only the number of threads matters."""
    with ExitStack() as after:
        if torch.cuda.is_available():
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS first starts
            before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
            after.callback(torch.use_deterministic_algorithms, before[0], warn_only=before[1])
            torch.use_deterministic_algorithms(True, warn_only=True)
            switches: Any = torch.utils.deterministic
            after.callback(setattr, switches, "fill_uninitialized_memory", switches.fill_uninitialized_memory)
            switches.fill_uninitialized_memory = False  # a debugging aid that would fill every buffer
        yield


def keep_memory() -> None:
    """Asks glibc to keep freed memory: a step frees its gradients, and pages given back must be cleared to come again.

    On other systems nothing is done. It holds for the rest of the process, whose peak it does not raise.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: large blocks come from the heap too
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap is not cut back

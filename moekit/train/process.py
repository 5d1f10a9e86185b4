"""What a run asks of its process: signals that end it in order, and sums that do not change from run to run."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def signals(caught: list[int]) -> Iterator[None]:
    """Lets SIGTERM and SIGINT end the run after the step in progress; a second one acts as usual."""

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        for other, handler in before.items():
            signal.signal(other, handler)

    before: dict[int, Any] = {}
    try:
        for ending in (signal.SIGTERM, signal.SIGINT):
            before[ending] = signal.signal(ending, note)
    except ValueError:  # not in the main thread: the caller has the signals
        pass
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


@contextmanager
def deterministic() -> Iterator[None]:
    """Asks CUDA for kernels whose sums do not differ from run to run; on a CPU only the number of threads matters."""
    if not torch.cuda.is_available():
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS first starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic
    fill = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    switches.fill_uninitialized_memory = False  # a debugging aid that would fill every buffer
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = fill

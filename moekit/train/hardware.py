"""What the machine can do: the device, the precision, the speed of its matrix products."""

import contextlib
import math
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moekit.data import Batch
from moekit.errors import ConfigError, UnsupportedError
from moekit.ops.product import product


class Hardware(NamedTuple):
    """Where a run computes and in which precision; weights and optimiser are float32 either way."""

    device: torch.device
    autocast: bool
    """Compute in bfloat16."""


def choose_device(name: str) -> torch.device:
    """Returns the device that a setting names; auto is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", name):
        raise ConfigError(f"device is {name!r}; choose auto, cpu, cuda or cuda:N")
    device, found = torch.device(name), torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= found:
        raise UnsupportedError(f"device is {name!r} but torch {torch.__version__} sees {found} CUDA devices here")
    return device


def choose(device: str, precision: str) -> Hardware:
    """Returns the hardware of a run; precision auto is bfloat16 where the device has it in hardware."""
    chosen = choose_device(device)
    return Hardware(chosen, precision == "bfloat16" or (precision == "auto" and has_bfloat16(chosen)))


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether the device multiplies bfloat16 matrices in hardware (AVX-512 BF16, AMX, CUDA 8.0 and newer)."""
    if device.type == "cuda":
        with torch.cuda.device(device):  # it tells of the current one
            return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public name for it
    return bool(probe and probe())


def forward(
    model: torch.nn.Module, batch: Batch, hardware: Hardware, cross_document_attention: bool, **options: Any
) -> Any:
    """Returns the model's output, routing included, for a batch that is brought to the device; padding is masked."""
    parts = {"input_ids": batch.input_ids, "targets": batch.labels}
    if not (real := batch.document_ids >= 0).all():
        parts["padding_mask"] = real
    if not cross_document_attention:
        parts["document_ids"] = batch.document_ids
    tensors = {name: torch.from_numpy(part).to(hardware.device) for name, part in parts.items()}
    with torch.autocast(hardware.device.type, torch.bfloat16, enabled=hardware.autocast):
        return model(**tensors, return_routing=True, **options)


def matmul_flops(hardware: Hardware, size: int = 1024) -> float:
    """Returns the measured FLOP/s of a square product in the run's precision: the median of 7, about 0.2 s on a CPU."""
    size = 8192 if hardware.device.type == "cuda" else size
    dtype = torch.bfloat16 if hardware.autocast else torch.float32
    # values do not matter for the speed; taking them from the random stream would change the run
    a = torch.full((size, size), 0.5, device=hardware.device, dtype=dtype)
    seconds = []
    for _ in range(9):
        synchronize(hardware.device)
        start = time.perf_counter()
        product(a, a)
        synchronize(hardware.device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


class Others:
    """How much of the machine other processes use, from now on."""

    def __init__(self) -> None:
        self.start = self._seconds()

    def cores(self) -> float | None:
        """Returns the cores that others were busy on, on average; None where it is unknown (Linux alone says it)."""
        (before, busy, own), (now, busy_now, own_now) = self.start, self._seconds()
        if busy is None or busy_now is None:
            return None
        return max(busy_now - busy - (own_now - own), 0.0) / (now - before)

    @staticmethod
    def _seconds() -> tuple[float, float | None, float]:
        """Returns the time, what all processes have used, those of other guests of the host included, and we."""
        times, busy = os.times(), None
        with contextlib.suppress(OSError):
            line = Path("/proc/stat").read_text().split("\n", 1)[0]
            user, nice, system, _idle, _wait, irq, softirq, steal = map(int, line.split()[1:9])
            busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, times.user + times.system + times.children_user + times.children_system


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that the process (CPU) or its tensors (CUDA) have held so far; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux: getrusage counts what the parent held when it started this process
        if found := re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def memory() -> float:
    """Returns the machine's memory in bytes, infinite where unknown (on Windows)."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError):
        return math.inf


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue, where it has one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

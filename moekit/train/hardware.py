"""What the machine can do: the device, the precision, the speed of its matrix products."""

import statistics
import sys
import time
from typing import NamedTuple

import torch

from moekit.errors import ConfigError, UnsupportedError


class Hardware(NamedTuple):
    """Where a run computes and in which precision; weights and optimiser are float32 either way."""

    device: torch.device
    autocast: bool
    """Compute in bfloat16."""


def choose_device(name: str) -> torch.device:
    """Returns the device that a setting names; auto is CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}; choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device is {name!r}; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UnsupportedError(f"device is {name!r} but torch {torch.__version__} sees no CUDA device here; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UnsupportedError(f"device is {name!r} but there are {torch.cuda.device_count()} CUDA devices")
    return device


def choose(device: str, precision: str) -> Hardware:
    """Returns the hardware of a run; precision auto is bfloat16 where the device has it in hardware."""
    chosen = choose_device(device)
    return Hardware(chosen, precision == "bfloat16" or (precision == "auto" and has_bfloat16(chosen)))


def has_bfloat16(device: torch.device) -> bool:
    """Returns whether the device multiplies bfloat16 matrices in hardware (AVX-512 BF16, AMX, CUDA 8.0 and newer)."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch has no public name for it
    return bool(probe and probe())


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
        a @ a
        synchronize(hardware.device)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(seconds[2:])


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes that the process (CPU) or its tensors (CUDA) have held so far; 0 where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # not on Windows
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def synchronize(device: torch.device) -> None:
    """Waits for the device's queue, where it has one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)

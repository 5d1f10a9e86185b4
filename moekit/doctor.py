"""What this machine has, which back end computes the experts' products on it, and how fast each one is."""

import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from moekit import receipts
from moekit.ops import dispatch, experts
from moekit.train import hardware

DIM, FF, EXPERTS, CHOSEN = 512, 192, 64, 6
TOKENS = {"training": 2048, "decoding": 1}
ROUNDS, SECONDS = 50, 1.0
"""A back end is measured so many times, or until that time has gone by; once at least."""


class _Layer(NamedTuple):
    x: Tensor
    weights: Tensor
    plan: dispatch.Plan
    gate_up: Tensor
    down: Tensor


def examine(
    device: str = "auto", measure: bool = True, progress: Callable[[str], None] = lambda doing: None
) -> dict[str, Any]:
    """Returns the machine, the back ends with what keeps each from running, and milliseconds of one layer on each.

    The layer has 64 experts, top-6, dim 512, width 192: forward and backward of 2048 tokens ("training"), and forward
    of one token ("decoding"). `progress` is told in words what is measured next.
    "other_load" is how many cores other processes kept busy meanwhile, if that is known.
    """
    chosen = hardware.choose_device(device)
    precisions = [torch.float32, *([torch.bfloat16] if hardware.has_bfloat16(chosen) else [])]
    document: dict[str, Any] = {
        "versions": receipts.versions(),
        "device": str(chosen),
        "name": torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else _cpu_name(),
        "bfloat16": torch.bfloat16 in precisions,
        "native": experts.native_features(),
        "matmul_gflops": {},
        "experts": {},
        "other_load": None,
    }
    others = hardware.Others()
    for dtype in precisions:
        name = str(dtype).removeprefix("torch.")
        layer = _layer(chosen, dtype, TOKENS["training"])
        document["experts"][name] = {
            "chosen": experts.choose("auto", layer.x, layer.gate_up, layer.down),
            "backends": {
                backend: {"unavailable": kernels.unavailable(layer.x, layer.gate_up, layer.down), "milliseconds": {}}
                for backend, kernels in experts.BACKENDS.items()
            },
        }
        if measure:
            flops = hardware.matmul_flops(hardware.Hardware(chosen, dtype == torch.bfloat16))
            document["matmul_gflops"][name] = round(flops / 1e9, 1)
            _measure(chosen, dtype, document["experts"][name]["backends"], progress)
    if measure and (cores := others.cores()) is not None:
        document["other_load"] = round(cores, 2)
    return document


def _measure(
    device: torch.device, dtype: torch.dtype, backends: dict[str, dict[str, Any]], progress: Callable[[str], None]
) -> None:
    """Fills in the medians; the back ends take turns, so that a busy moment meets all of them."""
    for work, tokens in TOKENS.items():
        layer = _layer(device, dtype, tokens)
        run = _train if work == "training" else _decode
        calls = {
            name: partial(run, layer, cast(experts.Backend, name))
            for name, found in backends.items()
            if not found["unavailable"]
        }
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(ROUNDS + 1):
            for name, call in calls.items():
                if sum(seconds[name]) > SECONDS:
                    continue
                progress(f"{work} in {str(dtype).removeprefix('torch.')} with {name}")
                hardware.synchronize(device)
                start = time.perf_counter()
                call()
                hardware.synchronize(device)
                if number:  # the first call builds and warms
                    seconds[name].append(time.perf_counter() - start)
        for name, measured in seconds.items():
            backends[name]["milliseconds"][work] = round(1e3 * statistics.median(measured), 3)


def _layer(device: torch.device, dtype: torch.dtype, tokens: int) -> _Layer:
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, dtype).requires_grad_()

    ids = torch.rand(tokens, EXPERTS, generator=draw).topk(CHOSEN).indices.to(device)
    weights = torch.rand(tokens, CHOSEN, generator=draw).to(device).requires_grad_()
    plan = dispatch.plan(ids, EXPERTS)
    return _Layer(normal(tokens, DIM), weights, plan, normal(EXPERTS, 2 * FF, DIM), normal(EXPERTS, DIM, FF))


def _train(layer: _Layer, backend: experts.Backend) -> None:
    y = experts.mixed_experts(*layer, backend)
    torch.autograd.grad(y, (layer.x, layer.weights, layer.gate_up, layer.down), torch.ones_like(y))


@torch.no_grad()
def _decode(layer: _Layer, backend: experts.Backend) -> None:
    experts.mixed_experts(*layer, backend)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""The experts' matrix products: one function, several back ends, all equal to the loop of `reference.py`.

`auto` takes the first of `PREFERRED` that can run on the tensors. A back end that is asked for by name and cannot run
is an error that says why.
"""

from collections.abc import Callable
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moekit.errors import ConfigError, UnsupportedError, nearest
from moekit.ops import dispatch, reference
from moekit.ops.autocast import autocast_off, cast_once
from moekit.ops.kernels import build, loop, native_experts, triton_experts
from moekit.ops.kernels.addresses import transformed
from moekit.ops.mapped import Mapped, Weights
from moekit.ops.quantize import Quantized, dequantize, refuse_gradients

Backend = Literal["auto", "reference", "torch", "grouped", "native", "triton"]


class _Kernels(NamedTuple):
    """One back end."""

    unavailable: Callable[..., str | None]
    """Says of (x, gate_up, down) why it cannot run on them, or None."""
    experts: Callable[..., Tensor]
    """(rows sorted by expert, gate_up, down, tokens_per_expert) -> rows."""
    mixed: Callable[..., Tensor] | None = None
    """(x, weights, plan, gate_up, down) -> y with gather and combination inside; None: they are done outside."""
    mixes_dtypes: bool = False
    """Takes float32 weights and codes beside bfloat16 rows; the others get a copy of the weights. Takes `plus` too."""


def swiglu_experts(
    rows: Float[Tensor, "rows dim"],
    gate_up: Float[Tensor, "experts ff2 dim"] | Quantized | Mapped,
    down: Float[Tensor, "experts dim ff"] | Quantized | Mapped,
    tokens_per_expert: Int[Tensor, " experts"],
    backend: Backend = "auto",
) -> Float[Tensor, "rows dim"]:
    """Returns down_e (silu(gate_e x) * up_e x) for rows sorted by expert; gate rows come first in `gate_up`.

    Rows behind the last expert's (dropped pairs) come back as zero. Zero rows and experts without rows are fine.
    """
    refuse_gradients(gate_up, rows)
    kernels = BACKENDS[choose(backend, rows, gate_up, down)]
    if not kernels.mixes_dtypes:
        if isinstance(gate_up, Mapped):
            return _one_by_one(kernels, rows, gate_up, down, tokens_per_expert)
        gate_up, down, tokens_per_expert = _copies(rows, gate_up, down, tokens_per_expert)
    return kernels.experts(rows, gate_up, down, tokens_per_expert)


def mixed_experts(
    x: Float[Tensor, "tokens dim"],
    weights: Float[Tensor, "tokens k"],
    plan: dispatch.Plan,
    gate_up: Float[Tensor, "experts ff2 dim"] | Quantized | Mapped,
    down: Float[Tensor, "experts dim ff"] | Quantized | Mapped,
    backend: Backend = "auto",
    plus: Float[Tensor, "tokens dim"] | None = None,
) -> Float[Tensor, "tokens dim"]:
    """Returns plus + the sum over each token's choices of weight * expert(x) (DeepSeekMoE, Eq. 9)."""
    refuse_gradients(gate_up, x, weights)
    name = choose(backend, x, gate_up, down)
    mixed, mixes_dtypes = BACKENDS[name].mixed, BACKENDS[name].mixes_dtypes
    if mixed is None or (isinstance(gate_up, Mapped) and not mixes_dtypes):
        rows = dispatch.gather(x, plan, weights.shape[1])
        y = dispatch.combine(swiglu_experts(rows, gate_up, down, plan.tokens_per_expert, name), weights, plan)
        return y if plus is None else y + plus
    if mixes_dtypes:
        y = mixed(x, weights, plan, gate_up, down, plus)
        return y
    gate_up, down, tokens_per_expert = _copies(x, gate_up, down, plan.tokens_per_expert)
    y = mixed(x, weights, plan._replace(tokens_per_expert=tokens_per_expert), gate_up, down)
    return y if plus is None else y + plus


def mixed_linear(
    x: Float[Tensor, "tokens dim"],
    weights: Float[Tensor, "tokens k"],
    plan: dispatch.Plan,
    weight: Float[Tensor, "experts out dim"],
    bias: Float[Tensor, "experts out"],
) -> Float[Tensor, "tokens out"]:
    """Returns the sum over each token's choices of weight * (W_e x + b_e): experts of one linear map."""
    x = cast_once(x)
    with autocast_off(x):
        rows = dispatch.gather(x, plan, weights.shape[1])
        experts = _linear if transformed() else loop.linear_experts
        rows = experts(rows, weight.to(x.dtype), bias.to(x.dtype), plan.tokens_per_expert)
        return dispatch.combine(rows, weights, plan)


def _one_by_one(kernels: _Kernels, rows: Tensor, gate_up: Mapped, down: Weights, tokens_per_expert: Tensor) -> Tensor:
    """Returns what `swiglu_experts` does, with a copy of one expert at a time: all may be more than memory."""
    assert isinstance(down, Mapped)
    ends = [0, *accumulate(tokens_per_expert.tolist())]
    parts = [
        kernels.experts(rows[begin:end], gate_up.of(e, rows), down.of(e, rows), tokens_per_expert[e : e + 1])
        for e, (begin, end) in enumerate(pairwise(ends))
        if begin < end
    ]
    return torch.cat((*parts, torch.zeros_like(rows[ends[-1] :])))


def _copies(rows: Tensor, gate_up: Weights, down: Weights, tokens_per_expert: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the weights as plain numbers in the rows' dtype and the rows of each expert.

    Of experts that are in codes it is only those that have rows.
    """
    if isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        return gate_up.to(rows.dtype), down.to(rows.dtype), tokens_per_expert
    assert not isinstance(gate_up, Mapped)
    assert not isinstance(down, Mapped)
    used = tokens_per_expert.nonzero().flatten()
    gate_up, down = (
        dequantize(w.of(used), rows.dtype) if isinstance(w, Quantized) else w[used].to(rows.dtype)
        for w in (gate_up, down)
    )
    return gate_up, down, tokens_per_expert[used]


def choose(backend: str, x: Tensor, gate_up: Weights, down: Weights) -> Backend:
    """Returns the back end that runs on these tensors; UnsupportedError when the one asked for cannot."""
    if backend == "auto":
        preferred = ("reference",) if transformed() else PREFERRED.get(x.device.type, ("torch",))
        return next(name for name in preferred if unavailable(name, x, gate_up, down) is None)
    if backend not in BACKENDS:
        allowed = get_args(Backend)
        raise ConfigError(f"backend is {backend!r}{nearest(backend, allowed)}; allowed: {', '.join(allowed)}")
    if reason := unavailable(backend, x, gate_up, down):
        raise UnsupportedError(f"backend is {backend!r}, which cannot run here: {reason}; use auto")
    return cast(Backend, backend)


def unavailable(backend: str, x: Tensor, gate_up: Weights, down: Weights) -> str | None:
    """Returns why the back end cannot run on these tensors, or None."""
    kernels = BACKENDS[backend]
    if not kernels.mixes_dtypes:
        gate_up, down = (_as_copied(x, w) for w in (gate_up, down))
    return kernels.unavailable(x, gate_up, down)


def _as_copied(x: Tensor, weight: Weights) -> Tensor:
    """Returns what `_copies` makes of a weight, without its numbers; under autocast rows are bfloat16, weights not."""
    if not isinstance(weight, Tensor):
        return x.new_empty(()).expand(weight.shape)
    return weight if weight.dtype == x.dtype else weight.new_empty((), dtype=x.dtype).expand(weight.shape)


def native_features() -> dict[str, Any]:
    """Returns what the compiled kernels use of this CPU, or why there are none."""
    found = build.native()
    return {
        "unavailable" if name == "reason" else name: value
        for name, value in found._asdict().items()
        if name != "library"
    }


def _reference(rows: Tensor, gate_up: Tensor, down: Tensor, tokens_per_expert: Tensor) -> Tensor:
    return _each(rows, tokens_per_expert, down.shape[1], lambda x, e: reference.swiglu(x, gate_up[e], down[e]))


def _linear(rows: Tensor, weight: Tensor, bias: Tensor, tokens_per_expert: Tensor) -> Tensor:
    return _each(rows, tokens_per_expert, weight.shape[1], lambda x, e: F.linear(x, weight[e], bias[e]))


def _each(rows: Tensor, tokens_per_expert: Tensor, width: int, expert: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Returns each expert's rows through it, and zero for the rows behind the last expert's."""
    ends = [0, *accumulate(tokens_per_expert.tolist())]
    parts = [expert(rows[begin:end], e) for e, (begin, end) in enumerate(pairwise(ends))]
    return torch.cat((*parts, rows.new_zeros(len(rows) - ends[-1], width)))


def _always(*tensors: Any) -> None:
    return None


BACKENDS: dict[str, _Kernels] = {
    "reference": _Kernels(_always, _reference),
    "torch": _Kernels(_always, loop.swiglu_experts),
    "grouped": _Kernels(loop.grouped_unavailable, loop.grouped_experts),
    "native": _Kernels(
        native_experts.unavailable, native_experts.swiglu_experts, native_experts.mixed_experts, mixes_dtypes=True
    ),
    "triton": _Kernels(triton_experts.unavailable, triton_experts.swiglu_experts, triton_experts.mixed_experts),
}
PREFERRED: dict[str, tuple[Backend, ...]] = {"cpu": ("native", "torch"), "cuda": ("grouped", "torch")}
"""By type of device; on another, torch's. `triton` has not been measured on a GPU yet and must be asked for."""

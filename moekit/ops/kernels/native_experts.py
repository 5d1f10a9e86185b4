"""The compiled experts as functions that torch can differentiate.

Their gather, products, SiLU * up and combination take few passes.

What the backward pass needs is x, the inputs of SiLU (rows, 2 ff) and nothing else of a row's size: the gradient of a
routing weight is the dot product of the activation with dy W_down, which is at hand there (SonicMoE, arXiv 2512.14080).
"""

import struct
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.ops.autograd import once_differentiable
from moekit.ops.dispatch import Plan
from moekit.ops.kernels.addresses import KINDS, at, contiguous, missing, readable, room, stored, table
from moekit.ops.kernels.build import library
from moekit.ops.kernels.memory import empty
from moekit.ops.mapped import Mapped, Weights
from moekit.ops.quantize import Quantized


def unavailable(x: Tensor, gate_up: Weights, down: Weights) -> str | None:
    """Returns why the kernels cannot run on these tensors, or None."""
    if x.device.type != "cpu":
        return f"it runs on a CPU but the tensors are on {x.device.type}"
    if not readable(x, stored(gate_up), stored(down)):
        return "it reads plain tensors on a CPU and these are not"
    dtype, other = stored(gate_up).dtype, stored(down).dtype
    if dtype != other:
        return f"gate_up is {dtype} and down {other}; it takes one dtype"
    rows = x.shape[-1]
    count, width, ff = down.shape if len(down.shape) == 3 else (0, 0, 0)
    if tuple(gate_up.shape) != (count, 2 * ff, width) or width != rows:
        return f"gate_up is {tuple(gate_up.shape)}, down {tuple(down.shape)} and rows are {rows} wide: they do not fit"
    if (x.dtype, dtype) not in _TYPES:
        return f"rows are {x.dtype} and weights {dtype}; it takes float32, or bfloat16 rows with either weights"
    reason: str | None = missing()
    return reason


_TYPES = {
    (rows, weights): (KINDS[rows], kind)
    for rows in (torch.float32, torch.bfloat16)
    for weights, kind in KINDS.items()
    if (rows, weights) != (torch.float32, torch.bfloat16)
}


@torch.compiler.disable  # type: ignore[untyped-decorator]
def mixed_experts(
    x: Float[Tensor, "tokens dim"],
    weights: Float[Tensor, "tokens k"],
    plan: Plan,
    gate_up: Float[Tensor, "experts ff2 dim"] | Quantized | Mapped,
    down: Float[Tensor, "experts dim ff"] | Quantized | Mapped,
    plus: Float[Tensor, "tokens dim"] | None = None,
) -> Float[Tensor, "tokens dim"]:
    """Returns plus + the sum over choices of weight * expert(x) for each token (DeepSeekMoE, Eq. 9)."""
    sorted_pairs = plan.tokens_per_expert.contiguous(), plan.order, plan.inverse
    if torch.is_grad_enabled() and isinstance(gate_up, Tensor) and isinstance(down, Tensor):
        y: Tensor = _Routed.apply(x, weights.float(), gate_up, down, plus, *sorted_pairs)
        return y
    return _routed(x, weights.float(), gate_up, down, plus, *sorted_pairs)[0]


@torch.compiler.disable  # type: ignore[untyped-decorator]
def swiglu_experts(
    rows: Float[Tensor, "rows dim"],
    gate_up: Float[Tensor, "experts ff2 dim"] | Quantized | Mapped,
    down: Float[Tensor, "experts dim ff"] | Quantized | Mapped,
    tokens_per_expert: Int[Tensor, " experts"],
) -> Float[Tensor, "rows dim"]:
    """Returns each row through its expert; rows behind the last expert's come back as zero."""
    if not (torch.is_grad_enabled() and isinstance(gate_up, Tensor) and isinstance(down, Tensor)):
        return _forward(rows, gate_up, down, _offsets(tokens_per_expert))[0]
    y: Tensor = _Experts.apply(rows, gate_up, down, tokens_per_expert)
    return y


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        gate_up: Tensor,
        down: Tensor,
        plus: Tensor | None,
        counts: Tensor,
        order: Tensor,
        inverse: Tensor,
    ) -> Tensor:
        keep = any(ctx.needs_input_grad)
        x, weights, gate_up, down = (t.contiguous() for t in (x, weights, gate_up, down))
        y, kept = _routed(x, weights, gate_up, down, plus, counts, order, inverse, keep)
        if keep:
            ctx.save_for_backward(kept, x, weights, gate_up, down, inverse)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        kept, *tensors, inverse = ctx.saved_tensors
        x, weights, gate_up, down = tensors
        rows = dy.to(x.dtype).contiguous()
        wanted = ctx.needs_input_grad[:4]
        made = [empty(t.shape, t.dtype) if want else None for t, want in zip(tensors, wanted, strict=True)]
        dx, d_weights, d_gate_up, d_down = made
        call = _pairs(weights, down, None, None, inverse)
        library().moekit_routed_experts_backward(
            *(*_TYPES[x.dtype, gate_up.dtype], call, *map(at, (x, gate_up, down, kept, rows, dx, d_weights))),
            *(at(d_gate_up), at(d_down)),
        )
        return *made, dy if ctx.needs_input_grad[4] else None, None, None, None


_ROUTED = struct.Struct("=11q")


def _pairs(weights: Tensor, down: Weights, counts: Tensor | None, order: Tensor | None, inverse: Tensor) -> bytes:
    """Returns the library's `RoutedExperts`; the way back needs neither counts nor order."""
    experts, dim, ff = down.shape
    where = (at(t) or 0 for t in (counts, order, inverse, weights))
    return _ROUTED.pack(*weights.shape, experts, dim, ff, *where, isinstance(down, Mapped), torch.get_num_threads())


def _routed(
    x: Tensor,
    weights: Tensor,
    gate_up: Weights,
    down: Weights,
    plus: Tensor | None,
    counts: Tensor,
    order: Tensor,
    inverse: Tensor,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns the tokens' sums, and with `keep` what the backward pass needs."""
    x, weights, gate_up, down = x.contiguous(), weights.contiguous(), contiguous(gate_up), contiguous(down)
    plus, low = None if plus is None else plus.to(x.dtype).contiguous(), x.dtype == torch.bfloat16
    experts, call = table(gate_up, down), _pairs(weights, down, counts, order, inverse)
    kept = room("moekit_routed_experts_bytes", low, call) if keep else None
    y = empty(x.shape, x.dtype)
    library().moekit_routed_experts(low, call, at(x), experts.ctypes.data, *map(at, (kept, plus, y)))
    return y, kept


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, counts: Tensor) -> Tensor:
        x, offsets = _rows(x), _offsets(counts)
        keep = any(ctx.needs_input_grad)
        y, hidden = _forward(x, gate_up, down, offsets, keep)
        if keep:
            ctx.save_for_backward(x, gate_up.contiguous(), down.contiguous(), offsets, hidden)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, gate_up, down, offsets, hidden = ctx.saved_tensors
        dy = _rows(dy.to(x.dtype))
        d_hidden, act = empty(hidden.shape, hidden.dtype), empty((len(hidden), down.shape[2]), hidden.dtype)
        dx = empty(dy.shape, dy.dtype) if ctx.needs_input_grad[0] else None
        run = _Call(x, gate_up, offsets)
        run.backward_rows(dy, gate_up, down, hidden, d_hidden, act, dx)
        d_gate_up = empty(gate_up.shape, gate_up.dtype) if ctx.needs_input_grad[1] else None
        d_down = empty(down.shape, down.dtype) if ctx.needs_input_grad[2] else None
        if d_gate_up is not None:
            run.weight_gradient(d_hidden, x, d_gate_up)
        if d_down is not None:
            run.weight_gradient(dy, act, d_down)
        if dx is not None:
            dx[int(offsets[-1]) :] = 0
        return dx, d_gate_up, d_down, None


def _offsets(counts: Tensor) -> Tensor:
    offsets = torch.zeros(len(counts) + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=offsets[1:])
    return offsets


def _forward(
    x: Tensor, gate_up: Weights, down: Weights, offsets: Tensor, keep: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Returns the rows, and with `keep` what the backward pass needs."""
    x, gate_up, down = _rows(x), contiguous(gate_up), contiguous(down)
    hidden = empty((len(x), 2 * down.shape[2]), x.dtype) if keep else None
    y = empty((len(x), down.shape[1]), x.dtype)
    _Call(x, gate_up, offsets).forward(x, gate_up, down, hidden, y)
    y[int(offsets[-1]) :] = 0
    return y, hidden


class _Call:
    """The library's functions of sorted rows with what all calls of one layer share."""

    def __init__(self, x: Tensor, gate_up: Weights, offsets: Tensor) -> None:
        self.offsets = offsets
        self.types, self.threads = _TYPES[x.dtype, stored(gate_up).dtype], torch.get_num_threads()

    def forward(self, x: Tensor, gate_up: Weights, down: Weights, hidden: Tensor | None, y: Tensor) -> None:
        experts = table(gate_up, down)
        if isinstance(gate_up, Mapped):
            library().moekit_fetch(*down.shape, at(self.offsets), experts.ctypes.data)
        library().moekit_forward(
            self.types[0], *self._shape(down), at(x), x.stride(0), experts.ctypes.data, at(hidden), at(y)
        )

    def backward_rows(
        self,
        dy: Tensor,
        gate_up: Tensor,
        down: Tensor,
        hidden: Tensor,
        d_hidden: Tensor,
        act: Tensor,
        dx: Tensor | None,
    ) -> None:
        library().moekit_backward_rows(
            *(*self.types, *self._shape(down), at(dy), dy.stride(0), at(gate_up), at(down), None),
            *map(at, (hidden, d_hidden, act, dx, None)),
        )

    def weight_gradient(self, left: Tensor, right: Tensor, gradient: Tensor) -> None:
        library().moekit_weight_gradient(
            *(*self.types, len(gradient), at(self.offsets), None, self.threads),
            *(at(left), left.stride(0), False, gradient.shape[1]),
            *(at(right), right.stride(0), False, gradient.shape[2]),
            at(gradient),
        )

    def _shape(self, down: Weights) -> tuple[int | None, ...]:
        return *down.shape, at(self.offsets), None, self.threads


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()

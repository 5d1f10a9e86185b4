"""The compiled kernels as functions that torch can differentiate: experts, loss, SwiGLU and norm.

The experts' gather, products, SiLU * up and combination take few passes.

What the backward pass needs is x, the inputs of SiLU (rows, 2 ff) and nothing else of a row's size: the gradient of a
routing weight is the dot product of the activation with dy W_down, which is at hand there (SonicMoE, arXiv 2512.14080).
"""

import ctypes
import functools
import struct
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from moekit.ops.dispatch import Plan
from moekit.ops.kernels.build import library, matrices, native
from moekit.ops.mapped import Mapped, Weights
from moekit.ops.quantize import Quantized
from moekit.ops.scaled import Matrix, Scaled


def unavailable(x: Tensor, gate_up: Weights, down: Weights) -> str | None:
    """Returns why the kernels cannot run on these tensors, or None."""
    if x.device.type != "cpu":
        return f"it runs on a CPU but the tensors are on {x.device.type}"
    for dtype in (_stored(gate_up).dtype, _stored(down).dtype):
        if (x.dtype, dtype) not in _TYPES:
            return f"rows are {x.dtype} and weights {dtype}; it takes float32, or bfloat16 rows with either weights"
    return native().reason


KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
"""What the library calls the dtypes of numbers and of codes."""
_TYPES = {
    (rows, weights): (KINDS[rows], kind)
    for rows in (torch.float32, torch.bfloat16)
    for weights, kind in KINDS.items()
    if (rows, weights) != (torch.float32, torch.bfloat16)
}


def _stored(weight: Weights | Matrix) -> Tensor:
    one = weight.one if isinstance(weight, Mapped) else weight
    return one.codes if isinstance(one, Quantized | Scaled) else one


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


def has_rest(*tensors: Tensor) -> bool:
    """Returns whether `cross_entropy_` and `swiglu` can run on these tensors."""
    return all(t.device.type == "cpu" and t.dtype in (torch.float32, torch.bfloat16) for t in tensors) and (
        native().library is not None
    )


def cross_entropy_(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"], differentiate: bool
) -> Float[Tensor, " tokens"]:
    """Returns each token's loss in nats, 0 for a negative target; with `differentiate` the logits turn to d_logits."""
    targets = targets.contiguous()
    assert logits.is_contiguous()
    losses = torch.empty(len(logits))
    library().moekit_cross_entropy(
        int(logits.dtype == torch.bfloat16),
        *logits.shape,
        *map(at, (logits, targets, losses)),
        differentiate,
        torch.get_num_threads(),
    )
    return losses


def swiglu(gate: Float[Tensor, "*rows ff"], up: Float[Tensor, "*rows ff"]) -> Float[Tensor, "*rows ff"]:
    """Returns silu(gate) * up; autograd does not see it."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _by_number("moekit_swiglu", gate, up, y)
    return y


def swiglu_backward(
    gate: Float[Tensor, "*rows ff"], up: Float[Tensor, "*rows ff"], dy: Float[Tensor, "*rows ff"]
) -> tuple[Float[Tensor, "*rows ff"], Float[Tensor, "*rows ff"]]:
    """Returns the gradients of gate and up."""
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
    _by_number("moekit_swiglu_backward", gate, up, dy, d_gate, d_up)
    return d_gate, d_up


def _by_number(name: str, *tensors: Tensor) -> None:
    first = tensors[0]
    function = getattr(library(), name)
    function(int(first.dtype == torch.bfloat16), first.numel(), *map(at, tensors), torch.get_num_threads())


def has_norm(x: Tensor, delta: Tensor | None, weight: Tensor) -> bool:
    """Returns whether `add_norm` can run on these tensors."""
    return has_rest(x, weight) and (delta is None or delta.dtype == x.dtype or delta.dtype == torch.bfloat16)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def add_norm(
    x: Float[Tensor, "*batch dim"],
    delta: Float[Tensor, "*batch dim"] | None,
    weight: Float[Tensor, " dim"],
    eps: float,
    exact: bool = True,
    low: bool = False,
) -> tuple[Float[Tensor, "*batch dim"] | None, ...]:
    """Returns s = x + delta, and s / rms(s) * weight in x's dtype if `exact` and in bfloat16 if `low`, else None.

    The norm is computed in float32.
    """
    if torch.is_grad_enabled():
        total, y, rounded = _Norm.apply(x, delta, weight, eps, exact, low)
    else:
        _, total, y, rounded, _ = _norm(x, delta, weight, eps, exact, low)
    return x if delta is None else total, y, rounded


def _norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, exact: bool, low: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """Returns the sum, the same unless it is x, its norm, that rounded, and 1 / rms of each row."""
    x, by, scales = x.contiguous(), weight.float(), torch.empty(x.shape[:-1])
    delta = None if delta is None else delta.contiguous()
    total = None if delta is None else torch.empty_like(x)
    y = torch.empty_like(x) if exact else None
    rounded = torch.empty_like(x, dtype=torch.bfloat16) if low else None
    kinds = x.dtype == torch.bfloat16, delta is not None and delta.dtype == torch.bfloat16
    inputs, outputs = map(at, (x, delta, by)), map(at, (total, y, rounded, scales))
    library().moekit_norm(
        *(*kinds, x.numel() // x.shape[-1], x.shape[-1], *inputs, eps, *outputs, torch.get_num_threads())
    )
    return x if total is None else total, total, y, rounded, scales


class _Norm(torch.autograd.Function):
    PARTS = 64
    """Rows are summed for the weight's gradient in so many parts, whatever the number of threads."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, exact: bool, low: bool
    ) -> tuple[Tensor | None, ...]:
        ctx.delta = None if delta is None else delta.dtype
        stream, total, y, rounded, scales = _norm(x, delta, weight, eps, exact, low)
        ctx.save_for_backward(stream, weight, scales)
        ctx.set_materialize_grads(False)
        return total, y, rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scales = ctx.saved_tensors
        given = [None if d is None else d.contiguous() for d in gradients]
        dx, by = torch.empty_like(total), weight.float()
        d_delta = dx if ctx.delta == total.dtype else None
        if ctx.delta is not None and d_delta is None:
            d_delta = torch.empty_like(total, dtype=ctx.delta)
        parts = torch.empty(_Norm.PARTS, len(weight))
        library().moekit_norm_backward(
            *(total.dtype == torch.bfloat16, scales.numel(), len(weight), *map(at, (total, by, scales, *given, dx))),
            *(None if d_delta is dx else at(d_delta), at(parts), len(parts), torch.get_num_threads()),
        )
        return dx, d_delta, parts.sum(0).to(weight.dtype), None, None, None


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
        made = [torch.empty_like(t) if want else None for t, want in zip(tensors, ctx.needs_input_grad, strict=False)]
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
    kept = room("moekit_routed_experts_bytes", call, x) if keep else None
    y = torch.empty_like(x)
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
        d_hidden, act = torch.empty_like(hidden), hidden.new_empty(len(hidden), down.shape[2])
        dx = torch.empty_like(dy) if ctx.needs_input_grad[0] else None
        run = _Call(x, gate_up, offsets)
        run.backward_rows(dy, gate_up, down, hidden, d_hidden, act, dx)
        d_gate_up = torch.empty_like(gate_up) if ctx.needs_input_grad[1] else None
        d_down = torch.empty_like(down) if ctx.needs_input_grad[2] else None
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
    hidden = x.new_empty(len(x), 2 * down.shape[2]) if keep else None
    y = x.new_empty(len(x), down.shape[1])
    _Call(x, gate_up, offsets).forward(x, gate_up, down, hidden, y)
    y[int(offsets[-1]) :] = 0
    return y, hidden


class _Call:
    """The library's functions of sorted rows with what all calls of one layer share."""

    def __init__(self, x: Tensor, gate_up: Weights, offsets: Tensor) -> None:
        self.offsets = offsets
        self.types, self.threads = _TYPES[x.dtype, _stored(gate_up).dtype], torch.get_num_threads()

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


def at(tensor: Tensor | None) -> int | None:
    """Returns the tensor's address; the caller keeps the tensor."""
    return None if tensor is None else tensor.data_ptr()


def matrix(weight: Tensor | Quantized) -> tuple[int, int, int]:
    """Returns the library's `Matrix`: where numbers or codes lie, their scales or 0, the kind."""
    if isinstance(weight, Quantized):
        return weight.codes.data_ptr(), weight.scales.data_ptr(), KINDS[weight.codes.dtype]
    return weight.data_ptr(), 0, KINDS[weight.dtype]


def room(name: str, call: bytes, x: Tensor) -> Tensor:
    """Returns memory for what a way back needs of a layer, of the size that the library's function tells."""
    count = ctypes.c_int64()
    getattr(library(), name)(x.dtype == torch.bfloat16, call, ctypes.byref(count))
    return torch.empty(count.value, dtype=torch.uint8)


def table(gate_up: Weights, down: Weights) -> np.ndarray:
    """Returns the library's table of where each expert's gate, up and down lie; the caller keeps the weights."""
    if isinstance(gate_up, Mapped) or isinstance(down, Mapped):
        return np.concatenate((_matrices(gate_up, 2), _matrices(down, 1)), axis=1)
    return _table(_lies(gate_up, 2), _lies(down, 1))


@functools.lru_cache(maxsize=1024)
def _table(*stacks: tuple[int, ...]) -> np.ndarray:
    """Returns the table of what `_lies` says, made once for weights that stay where they are."""
    return np.concatenate([matrices(each * count, *of).reshape(-1, each, 3) for each, count, *of in stacks], axis=1)


def _lies(weight: Tensor | Quantized, each: int) -> tuple[int, ...]:
    """Returns how many matrices an expert has in the stack, how many experts there are, and `matrices`' numbers."""
    stored = _stored(weight)
    of = (weight.scales.data_ptr(), weight.scales.nbytes) if isinstance(weight, Quantized) else ()
    return each, weight.shape[0], KINDS[stored.dtype], stored.data_ptr(), stored.nbytes, *of


def _matrices(weight: Weights, each: int) -> np.ndarray:
    if not isinstance(weight, Mapped):
        return _table(_lies(weight, each))
    kinds = np.full((*weight.addresses.shape[:2], 1), KINDS[_stored(weight).dtype])
    return np.concatenate((weight.addresses, kinds), axis=2)


def contiguous(weight: Weights | Matrix) -> Any:
    """Returns the weight with its rows one after another, as the library reads them."""
    if isinstance(weight, Quantized):
        assert weight.scales.dtype == torch.bfloat16
        return Quantized(weight.codes.contiguous(), weight.scales.contiguous(), weight.width)
    return weight.contiguous() if isinstance(weight, Tensor) else weight


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()

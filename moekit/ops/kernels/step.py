"""Compiled cross-entropy, SwiGLU and norm as functions that torch can differentiate."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels.addresses import at, missing, readable
from moekit.ops.kernels.build import library
from moekit.ops.kernels.memory import empty


def has_rest(*tensors: Tensor) -> bool:
    """Returns whether `cross_entropy_` can run on these tensors."""
    kinds = (torch.float32, torch.bfloat16)
    return all(readable(t) and t.dtype in kinds for t in tensors) and missing() is None


def cross_entropy_(
    logits: Float[Tensor, "tokens vocab"], targets: Int[Tensor, " tokens"], differentiate: bool
) -> Float[Tensor, " tokens"]:
    """Returns each token's loss in nats, 0 for a negative target; with `differentiate` the logits turn to d_logits."""
    targets = targets.contiguous()
    assert logits.is_contiguous()
    losses = empty((len(logits),), torch.float32)
    library().moekit_cross_entropy(
        int(logits.dtype == torch.bfloat16),
        *logits.shape,
        *map(at, (logits, targets, losses)),
        differentiate,
        torch.get_num_threads(),
    )
    return losses


def has_swiglu(gate: Tensor, up: Tensor, *more: Tensor) -> bool:
    """Returns whether `swiglu` can run on these tensors, or with dy its way back."""
    return gate.shape == up.shape and gate.dtype == up.dtype and has_rest(gate, up, *more)


def swiglu(gate: Float[Tensor, "*rows ff"], up: Float[Tensor, "*rows ff"]) -> Float[Tensor, "*rows ff"]:
    """Returns silu(gate) * up; autograd does not see it."""
    gate, up = gate.contiguous(), up.contiguous()
    y = empty(gate.shape, gate.dtype)
    _by_number("moekit_swiglu", gate, up, y)
    return y


def swiglu_backward(
    gate: Float[Tensor, "*rows ff"], up: Float[Tensor, "*rows ff"], dy: Float[Tensor, "*rows ff"]
) -> tuple[Float[Tensor, "*rows ff"], Float[Tensor, "*rows ff"]]:
    """Returns the gradients of gate and up."""
    gate, up, dy = gate.contiguous(), up.contiguous(), dy.contiguous()
    d_gate, d_up = empty(gate.shape, gate.dtype), empty(up.shape, up.dtype)
    _by_number("moekit_swiglu_backward", gate, up, dy, d_gate, d_up)
    return d_gate, d_up


def _by_number(name: str, *tensors: Tensor) -> None:
    first = tensors[0]
    function = getattr(library(), name)
    function(int(first.dtype == torch.bfloat16), first.numel(), *map(at, tensors), torch.get_num_threads())


def has_norm(x: Tensor, delta: Tensor | None, weight: Tensor) -> bool:
    """Returns whether `add_norm` can run on these tensors."""
    if delta is not None and not (readable(delta) and delta.dtype in (x.dtype, torch.bfloat16)):
        return False
    return weight.shape == x.shape[-1:] and (delta is None or delta.shape == x.shape) and has_rest(x, weight)


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
    x, by, scales = x.contiguous(), weight.float().contiguous(), empty(x.shape[:-1], torch.float32)
    delta = None if delta is None else delta.contiguous()
    total = None if delta is None else empty(x.shape, x.dtype)
    y = empty(x.shape, x.dtype) if exact else None
    rounded = empty(x.shape, torch.bfloat16) if low else None
    kinds = x.dtype == torch.bfloat16, delta is not None and delta.dtype == torch.bfloat16
    inputs, outputs = map(at, (x, delta, by)), map(at, (total, y, rounded, scales))
    library().moekit_norm(
        *(*kinds, x.numel() // x.shape[-1], x.shape[-1], *inputs, eps, *outputs, torch.get_num_threads())
    )
    return x if total is None else total, total, y, rounded, scales


class _Norm(torch.autograd.Function):
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
        dx, by = empty(total.shape, total.dtype), weight.float().contiguous()
        d_delta = dx if ctx.delta == total.dtype else None
        if ctx.delta is not None and d_delta is None:
            d_delta = empty(total.shape, ctx.delta)
        d_weight = empty(weight.shape, torch.float32)
        library().moekit_norm_backward(
            *(total.dtype == torch.bfloat16, scales.numel(), len(weight), *map(at, (total, by, scales, *given, dx))),
            *(None if d_delta is dx else at(d_delta), at(d_weight), torch.get_num_threads()),
        )
        return dx, d_delta, d_weight.to(weight.dtype), None, None, None

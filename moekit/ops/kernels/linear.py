"""Products of the same rows with one matrix or several, and their gradients, by our own compiled kernels."""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels.addresses import KINDS, at, contiguous, matrix, readable, stored
from moekit.ops.kernels.build import library, native
from moekit.ops.kernels.memory import empty
from moekit.ops.quantize import Quantized
from moekit.ops.scaled import Scaled

FEW = 4
"""Rows up to which a product reads weights straight from where they lie; the kernels' own number."""


def has_linears(x: Tensor, weights: Sequence[Tensor | Quantized | Scaled], mixed: bool = False) -> bool:
    """Returns whether `linears` can run on these tensors and is meant to; `mixed`: bfloat16 may meet float32 weights.

    It is on codes and on a few rows, without gradients; on bfloat16 where AVX-512 multiplies it: torch, which asks
    oneDNN, casts float32 weights first and writes their gradients in bfloat16 (decision 54), while AMX is left to it;
    and on float32 where torch asks MKL, which uses half of such a processor (decision 49).
    """
    if x.numel() == 0 or torch.compiler.is_compiling() or not readable(x, *map(stored, weights)):
        return False
    machine, (kind, *others) = native(), {(type(w), w[0].dtype if isinstance(w, tuple) else w.dtype) for w in weights}
    if machine.library is None or others or x.dtype not in (torch.float32, torch.bfloat16):
        return False
    if kind[0] not in (Tensor, nn.Parameter):
        return kind[0] is Quantized
    if x.dtype == torch.bfloat16 and machine.bfloat16 and not machine.amx:
        return kind[1] == x.dtype or (mixed and kind[1] == torch.float32)
    if x.dtype == kind[1] == torch.float32 and machine.wide_amd:
        return True
    learns = torch.is_grad_enabled() and (
        x.requires_grad or any(isinstance(w, Tensor) and w.requires_grad for w in weights)
    )
    return kind[1] == x.dtype and x.numel() <= FEW * x.shape[-1] and not learns


def linears(
    x: Float[Tensor, "*batch dim"], weights: Sequence[Float[Tensor, "_ dim"] | Quantized]
) -> tuple[Float[Tensor, "*batch _"], ...]:
    """Returns x W^T in x's dtype for each W, summed in float32. The weights have one dtype."""
    if torch.is_grad_enabled() and not isinstance(weights[0], Quantized):
        ys: tuple[Tensor, ...] = _Linears.apply(x, *weights)
        return ys
    return _forward(x, weights)


class _Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        return _forward(x, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        dys = tuple(dy.contiguous() for dy in dys)
        dx = backward(dys, weights) if ctx.needs_input_grad[0] else None
        learn = ctx.needs_input_grad[1:]
        made = iter(gradients(x, [dy for dy, wanted in zip(dys, learn, strict=True) if wanted], weights[0].dtype))
        return dx, *(next(made) if wanted else None for wanted in learn)


def _forward(x: Tensor, weights: Sequence[Tensor | Quantized]) -> tuple[Tensor, ...]:
    x, weights = x.contiguous(), [contiguous(w) for w in weights]
    ys = tuple(empty((*x.shape[:-1], w.shape[0]), x.dtype) for w in weights)
    library().moekit_linear(*_sizes(x, len(ys)), at(x), x.shape[-1], _maps(weights, ys))
    return ys


def backward(
    dys: Sequence[Float[Tensor, "*batch _"]], weights: Sequence[Float[Tensor, "_ dim"]]
) -> Float[Tensor, "*batch dim"]:
    """Returns the sum of dy W."""
    weights = [w.contiguous() for w in weights]
    dx = empty((*dys[0].shape[:-1], weights[0].shape[1]), dys[0].dtype)
    kinds, sizes = (int(dx.dtype == torch.bfloat16), KINDS[weights[0].dtype]), _sizes(dx, len(dys))[1:]
    library().moekit_linear_backward(*kinds, *sizes, _maps(weights, dys), at(dx))
    return dx


def gradients(
    x: Float[Tensor, "*batch dim"], dys: Sequence[Float[Tensor, "*batch _"]], dtype: torch.dtype
) -> list[Float[Tensor, "_ dim"]]:
    """Returns dy^T x for each dy."""
    x = x.contiguous()
    made = [empty((dy.shape[-1], x.shape[-1]), dtype) for dy in dys]
    if made:
        kinds, sizes = (int(x.dtype == torch.bfloat16), KINDS[dtype]), _sizes(x, len(made))[1:]
        library().moekit_linear_gradient(*kinds, *sizes, at(x), x.shape[-1], _maps(made, dys))
    return made


def _sizes(x: Tensor, count: int) -> tuple[int, ...]:
    width = x.shape[-1]
    return int(x.dtype == torch.bfloat16), count, x.numel() // width, width, torch.get_num_threads()


def _maps(weights: Sequence[Tensor | Quantized], ys: Sequence[Tensor]) -> Any:
    """Returns the library's `Map` of each weight and its product, or their gradients; the caller keeps them."""
    numbers: list[int] = []
    for w, y in zip(weights, ys, strict=True):
        numbers += *matrix(w), y.shape[-1], y.data_ptr()
    return (ctypes.c_int64 * len(numbers))(*numbers)

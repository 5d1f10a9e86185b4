"""Products with matrices mixed from experts' weights, through our own kernels: no merged matrix is ever whole."""

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels.addresses import at, missing, readable
from moekit.ops.kernels.build import library
from moekit.ops.kernels.memory import empty


def has_kernel(x: Tensor, weight: Tensor) -> bool:
    """Returns whether `merged_linear` can run on these tensors: float32, or bfloat16 with either weights, on a CPU."""
    kinds = (x.dtype, weight.dtype)
    float32, bfloat16 = torch.float32, torch.bfloat16
    return (
        readable(x, weight)
        and kinds in ((float32, float32), (bfloat16, float32), (bfloat16, bfloat16))
        and x.numel() > 0
        and missing() is None
    )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def merged_linear(
    x: Float[Tensor, "units tokens dim"], mix: Float[Tensor, "units experts"], weight: Float[Tensor, "experts out dim"]
) -> Float[Tensor, "units tokens out"]:
    """Returns x through each unit's merged matrix, with all gradients; mixed and summed in float32."""
    y: Tensor = _MergedLinear.apply(x, mix, weight)
    return y


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, mix: Tensor, weight: Tensor) -> Tensor:
        x, by, weight = x.contiguous(), mix.float().contiguous(), weight.contiguous()
        ctx.save_for_backward(x, by, weight)
        ctx.mix_dtype = mix.dtype
        y = empty((*x.shape[:2], weight.shape[1]), x.dtype)
        _call("merged", x, by, weight, False, x, weight, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, by, weight = ctx.saved_tensors
        wants_x, wants_mix, wants_weight = ctx.needs_input_grad
        dy = dy.contiguous()
        dx = empty(x.shape, x.dtype) if wants_x else None
        d_weight = empty(weight.shape, weight.dtype) if wants_weight else None
        d_mix = empty(by.shape, by.dtype) if wants_mix else None
        if dx is not None:
            _call("merged", x, by, weight, True, dy, weight, dx)
        if wants_mix or wants_weight:
            _call("merged_gradient", x, by, weight, x, dy, weight, d_weight, d_mix)
        return dx, None if d_mix is None else d_mix.to(ctx.mix_dtype), d_weight


def _call(name: str, x: Tensor, by: Tensor, weight: Tensor, *arguments: Tensor | bool | None) -> None:
    sizes = (ctypes.c_int64 * 5)(*x.shape[:2], *weight.shape)
    kinds = (tensor.dtype == torch.bfloat16 for tensor in (x, weight))
    rest = (one if isinstance(one, bool) else at(one) for one in arguments)
    getattr(library(), f"moekit_{name}")(*kinds, sizes, at(by), torch.get_num_threads(), *rest)

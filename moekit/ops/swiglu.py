"""The activation of SwiGLU as a function."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moekit.ops.autograd import once_differentiable
from moekit.ops.kernels import step
from moekit.ops.kernels.addresses import watched


def swiglu(gate: Float[Tensor, "*rows ff"], up: Float[Tensor, "*rows ff"]) -> Float[Tensor, "*rows ff"]:
    """Returns silu(gate) * up (arXiv 2002.05202, Eq. 6). Of it the backward pass keeps gate and up, no more."""
    if torch.compiler.is_compiling() or watched():
        return F.silu(gate) * up
    y: Tensor = _SwiGLU.apply(gate, up)
    return y


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return step.swiglu(gate, up) if step.has_swiglu(gate, up) else F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if step.has_swiglu(gate, up, dy):
            return step.swiglu_backward(gate, up, dy)
        d_gate: Tensor = torch.ops.aten.silu_backward(dy * up, gate)
        return d_gate, dy * F.silu(gate)

"""Gradients that cannot be differentiated again."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class _Told(torch.autograd.Function):
    """The first `count` of the tensors as they are, until they are differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
        return tuple(None if tensor is None else tensor.detach() for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        raise RuntimeError(
            "moekit computes this gradient itself, and not its own: there are no second derivatives but in transforms "
            "of torch.func, as jvp(grad(f))"
        )


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a way back whose results raise RuntimeError where somebody differentiates them.

    torch's own does so only where the gradient that comes in is to be differentiated, and a loss's, 1, is not: second
    derivatives through such a function would be 0, and nobody would be told.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *gradients: Tensor | None) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():  # `create_graph` is not asked for
            return found
        results = found if isinstance(found, tuple) else (found,)
        of: Sequence[Tensor | None] = ()  # what they are gradients of, lest torch finds no way from there to here
        with contextlib.suppress(RuntimeError):  # a checkpoint gives them once
            of = ctx.saved_tensors
        return _Told.apply(len(results), *(None if r is None else r.detach().requires_grad_() for r in results), *of)

    return once

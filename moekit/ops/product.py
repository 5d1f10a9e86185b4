"""The product of two matrices by the faster of the libraries that torch carries."""

import torch
from jaxtyping import Float
from torch import Tensor

from moekit.ops.kernels.build import native

LEAST = 1 << 21
"""Multiplications from which on calling oneDNN costs less than it saves."""


def is_wide(a: Tensor, b: Tensor, multiplications: int) -> bool:
    """Returns whether oneDNN multiplies tensors like these in vectors twice as wide as torch's own choice, MKL."""
    return (
        a.device.type == b.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and multiplications >= LEAST
        and not torch.compiler.is_compiling()
        and native().wide_amd
        and torch.backends.mkldnn.is_available()
    )


def product(a: Float[Tensor, "rows depth"], b: Float[Tensor, "depth columns"]) -> Float[Tensor, "rows columns"]:
    """Returns a b; autograd does not see it.

    torch's CPU build multiplies float32 by MKL, which uses vectors of 8 floats on processors of another maker. On those
    that take 16 at once (decision 49) oneDNN, which torch uses for bfloat16, needs half the time.
    """
    if not is_wide(a, b, a.numel() * b.shape[1]):
        return a @ b
    y: Tensor = torch.ops.mkldnn._linear_pointwise(_strided(a), _strided(b).T, None, "none", [], "")
    return y


def _strided(x: Tensor) -> Tensor:
    """Returns x with its rows or its columns one after another."""
    rows, columns = x.stride()
    return x if (columns == 1 and rows >= x.shape[1]) or (rows == 1 and columns >= x.shape[0]) else x.contiguous()

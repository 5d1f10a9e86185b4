"""Dense feed-forward networks: SwiGLU (arXiv 2002.05202), which shared experts are too, and two matrices with GELU."""

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from moekit.nn.linear import Linear, together, whole
from moekit.ops.autocast import cast_once
from moekit.ops.layer import feed_forward
from moekit.ops.quantize import Quantized
from moekit.ops.scaled import Matrix
from moekit.ops.swiglu import swiglu


def fit(weights: Sequence[Tensor | Matrix], dim: int) -> bool:
    """Returns whether gate, up and down fit each other and rows of this width: the compiled kernels ask no more."""
    up = (weights[0].shape[0], dim)
    return [tuple(w.shape) for w in weights] == [up, up, up[::-1]]


class SwiGLU(nn.Module):
    """down (silu(gate x) * up x), without biases.

    K_s shared experts of width w are one network of width K_s w: the sum of the experts' outputs is the product with
    their concatenated weights.
    """

    def __init__(self, dim: int, ff: int) -> None:
        super().__init__()
        self.gate_proj = Linear(dim, ff)
        self.up_proj = Linear(dim, ff)
        self.down_proj = Linear(ff, dim)

    def in_one(self, x: Float[Tensor, "*tokens dim"]) -> Sequence[Tensor | Quantized]:
        """Returns gate, up and down if one call of the compiled kernels may multiply them for these tokens."""
        weights = whole(x, self.gate_proj, self.up_proj, self.down_proj)
        return weights if weights and fit(weights, x.shape[-1]) else ()

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        x = cast_once(x)
        if weights := self.in_one(x):
            return feed_forward(x, *weights)
        y: Tensor = self.down_proj(swiglu(*together(x, self.gate_proj, self.up_proj)))
        return y


class MLP(nn.Module):
    """down gelu(up x + bias) + bias, as in BERT (arXiv 1810.04805) and GPT-2."""

    def __init__(self, dim: int, ff: int) -> None:
        super().__init__()
        self.up_proj = Linear(dim, ff, bias=True)
        self.down_proj = Linear(ff, dim, bias=True)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        y: Tensor = self.down_proj(F.gelu(self.up_proj(cast_once(x))))
        return y

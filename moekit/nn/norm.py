"""RMSNorm (arXiv 1910.07467)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moekit.ops.norm import Normed, add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        return rms_norm(x, self.weight, self.eps)

    def add(
        self, x: Float[Tensor, "*batch dim"], delta: Float[Tensor, "*batch dim"] | None, exact: bool = False
    ) -> Normed:
        """Returns x + delta with its norm, which without `exact` is only given as products read it."""
        return add_rms_norm(x, delta, self.weight, self.eps, exact)

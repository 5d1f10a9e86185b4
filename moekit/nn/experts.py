"""The routed experts' stacked weights. Expert parallelism enters here and nowhere else."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moekit.ops.experts import swiglu_experts


class Experts(nn.Module):
    """SwiGLU experts without biases.

    `gate_up_proj` is (experts, 2 ff, dim) with the gate's rows first, `down_proj` is (experts, dim, ff).
    """

    def __init__(self, n_experts: int, dim: int, ff: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * ff, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, ff))

    def forward(
        self, rows: Float[Tensor, "rows dim"], tokens_per_expert: Int[Tensor, " experts"]
    ) -> Float[Tensor, "rows dim"]:
        """Returns each row through its expert; rows are sorted by expert, zero rows are fine."""
        return swiglu_experts(rows, self.gate_up_proj.to(rows.dtype), self.down_proj.to(rows.dtype), tokens_per_expert)

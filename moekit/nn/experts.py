"""The routed experts' stacked weights. Expert parallelism enters here and nowhere else."""

from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moekit.errors import UnsupportedError
from moekit.nn.weights import operand
from moekit.ops.dispatch import Plan
from moekit.ops.experts import Backend, choose, mixed_experts, swiglu_experts
from moekit.ops.mapped import Mapped, Weights
from moekit.ops.quantize import Quantized
from moekit.ops.scaled import Scaled


class Experts(nn.Module):
    """SwiGLU experts without biases.

    `gate_up_proj` is (experts, 2 ff, dim) with the gate's rows first, `down_proj` is (experts, dim, ff).
    Either may be a QuantizedWeight or a MappedWeight.
    """

    def __init__(self, n_experts: int, dim: int, ff: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * ff, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, ff))
        self.backend: Backend = "auto"

    @property
    def stacked(self) -> tuple[Weights, Weights]:
        """Both weights as the functions of `ops` take them."""
        gate_up, down = operand(self.gate_up_proj), operand(self.down_proj)
        assert not isinstance(gate_up, Scaled)
        assert not isinstance(down, Scaled)
        return gate_up, down

    def set_backend(self, backend: str, dtype: torch.dtype | None = None) -> None:
        """Sets the back end; UnsupportedError when it cannot run where the weights are in `dtype`, or, by default, in
        float32 or bfloat16."""
        gate_up, down = self.stacked
        one = down.one if isinstance(down, Mapped) else down
        own = one.scales.dtype if isinstance(one, Quantized) else one.dtype
        where = one.codes.device if isinstance(one, Quantized | Scaled) else one.device
        rows = torch.empty(1, down.shape[1], dtype=own, device=where)
        try:
            choose(backend, rows.to(dtype or own), gate_up, down)
        except UnsupportedError:
            if not isinstance(gate_up, Tensor):
                raise
            cast_to = rows.new_empty((), dtype=dtype or torch.bfloat16)  # as autocast would, without the copies
            choose(backend, *(cast_to.expand(t.shape) for t in (rows, gate_up, down)))
        self.backend = cast(Backend, backend)

    def forward(
        self,
        x: Float[Tensor, "rows dim"],
        tokens_per_expert: Int[Tensor, " experts"],
        *,
        plan: Plan | None = None,
        weights: Float[Tensor, "tokens k"] | None = None,
        plus: Float[Tensor, "rows dim"] | None = None,
    ) -> Float[Tensor, "rows dim"]:
        """Returns each row through its expert; rows are sorted by expert, zero rows are fine.

        With a plan and routing weights x holds tokens, and gather and combination are done too, by some back ends
        without copies; `plus` is added to them. Always called as a module, so that what wraps it (PEFT's adapters)
        takes part.
        """
        gate_up, down = self.stacked
        if plan is not None and weights is not None:
            return mixed_experts(x, weights, plan, gate_up, down, self.backend, plus)
        return swiglu_experts(x, gate_up, down, tokens_per_expert, self.backend)

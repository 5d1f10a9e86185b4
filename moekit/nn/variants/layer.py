"""What the model asks of another paper's feed-forward layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor, nn

from moekit.nn.router import RouterContext
from moekit.ops.routing import Routing


class VariantOutput(NamedTuple):
    y: Float[Tensor, "batch length dim"]
    routings: tuple[Routing, ...]
    """One for each gate, of whatever unit it routes; none where a gate is too wide to be one."""


class VariantLayer(nn.Module, ABC):
    """A feed-forward layer with its own way to use experts. The residual connection is the block's."""

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draws what does not begin as the model's other parameters, which are drawn by now: matrices and vectors."""

    @abstractmethod
    def forward(self, x: Float[Tensor, "batch length dim"], context: RouterContext) -> VariantOutput:
        """Returns the layer's output and what its gates decided."""

    def balance_losses(self, routings: tuple[Routing, ...]) -> dict[str, Float[Tensor, ""]]:
        """Returns each balance loss that has a factor, times its factor."""
        return {}

    def begin_step(self, step: int) -> None:
        """Is told the number of the optimiser step that comes, counted from 0."""

    def end_step(self, states: Sequence[Mapping[Tensor, Mapping[str, Any]]]) -> None:
        """Is told that the step was taken, with the optimisers' states by parameter."""

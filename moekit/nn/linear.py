"""The linear map of one matrix, however its weight is kept."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moekit.nn.weights import operand
from moekit.ops.linear import linear
from moekit.ops.mapped import Mapped
from moekit.ops.quantize import Quantized, dequantize
from moekit.ops.scaled import Matrix, unscaled


class Linear(nn.Linear):
    """torch's linear map; its weight may be a QuantizedWeight or a MappedWeight, and a few rows take a faster way."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias)

    def forward(self, input: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        y = linear(input, self.matrix)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def matrix(self) -> Matrix:
        """The weight as the functions of `ops` take it."""
        weight = operand(self.weight)
        assert not isinstance(weight, Mapped)
        return weight

    def numbers(self, dtype: torch.dtype) -> Float[Tensor, "out dim"]:
        """Returns the weight itself, or the numbers that its codes stand for."""
        weight = unscaled(self.matrix)
        return dequantize(weight, dtype) if isinstance(weight, Quantized) else weight

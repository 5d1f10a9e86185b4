"""A matrix that may be kept in codes, and the linear map with it."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moekit.ops.linear import linear
from moekit.ops.quantize import Quantized, dequantize


class QuantizedWeight(nn.Module):
    """Stands where a parameter of matrices stood; a buffer of codes and one of scales, for inference."""

    def __init__(self, weight: Quantized) -> None:
        super().__init__()
        self.codes: Tensor
        self.scales: Tensor
        self.width = weight.width
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedWeight":
        """Moves as any module does, but `model.to(dtype)` leaves the scales as they are: the codes fit no others."""
        scales = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != scales.dtype:
            self.scales = scales.to(self.scales.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.codes.dtype}, {tuple(self.codes.shape)}"


def operand(weight: Tensor | QuantizedWeight) -> Tensor | Quantized:
    """Returns what the functions of `ops` take."""
    return weight if isinstance(weight, Tensor) else Quantized(weight.codes, weight.scales, weight.width)


class Linear(nn.Linear):
    """torch's linear map without a bias; its weight may be a QuantizedWeight, and a few rows take a faster way."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        return linear(input, operand(self.weight))

    def numbers(self, dtype: torch.dtype) -> Float[Tensor, "out dim"]:
        """Returns the weight itself, or the numbers that its codes stand for."""
        weight = operand(self.weight)
        return dequantize(weight, dtype) if isinstance(weight, Quantized) else weight

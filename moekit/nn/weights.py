"""What may stand where a parameter of matrices stood, for inference: codes, or what stays in its file."""

from collections.abc import Callable

from torch import Tensor, nn

from moekit.ops.mapped import Mapped, Weights
from moekit.ops.quantize import Quantized
from moekit.ops.scaled import Matrix, Scaled


class QuantizedWeight(nn.Module):
    """A buffer of codes and one of scales."""

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


class MappedWeight(nn.Module):
    """Experts, or a matrix in 8-bit floating point, in mapped files.

    Nothing of them is in the state dict, and `model.to(...)` leaves them where they are.
    """

    def __init__(self, weight: Mapped | Scaled) -> None:
        super().__init__()
        self.weight = weight

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}"


def operand(weight: Tensor | QuantizedWeight | MappedWeight) -> Weights | Matrix:
    """Returns what the functions of `ops` take."""
    if isinstance(weight, MappedWeight):
        return weight.weight
    return weight if isinstance(weight, Tensor) else Quantized(weight.codes, weight.scales, weight.width)

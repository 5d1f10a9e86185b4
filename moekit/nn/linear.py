"""The linear map of one matrix, however its weight is kept."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moekit.nn.weights import operand
from moekit.ops.linear import linear, linears
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


def together(x: Float[Tensor, "*batch dim"], *maps: nn.Module) -> tuple[Float[Tensor, "*batch _"], ...]:
    """Returns each map of x: in one product if all are ours and nobody has hooked, wrapped or replaced one."""
    ours = [m for m in maps if isinstance(m, Linear) and _is_untouched(m)]
    if len(ours) < len(maps):
        return tuple(m(x) for m in maps)
    ys = linears(x, *(m.matrix for m in ours))
    return tuple(y if m.bias is None else y + m.bias.to(y.dtype) for m, y in zip(ours, ys, strict=True))


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _is_untouched(module: nn.Module) -> bool:
    """Returns whether calling the module is calling `Linear.forward` and no more."""
    own = module.__dict__
    hooked = any(own[name] for name in _HOOKS) or torch.nn.modules.module._has_any_global_hook()
    return type(module) is Linear and not hooked and "forward" not in own and own.get("_compiled_call_impl") is None

"""The linear map of one matrix, however its weight is kept."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moekit.nn.weights import operand
from moekit.ops.attention import Seen
from moekit.ops.layer import has_layer
from moekit.ops.linear import linear, linears
from moekit.ops.mapped import Mapped
from moekit.ops.quantize import Quantized, dequantize
from moekit.ops.scaled import Matrix, Scaled, unscaled


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
    ours = [m for m in maps if isinstance(m, Linear)]
    if not may_be_ours(x) or not untouched(Linear, *maps):
        return tuple(m(x) for m in maps)
    ys = linears(x, *(m.matrix for m in ours))
    return tuple(y if m.bias is None else y + m.bias.to(y.dtype) for m, y in zip(ours, ys, strict=True))


def whole(
    x: Float[Tensor, "*batch dim"], *maps: nn.Module, seen: Seen | None = None, cache: Tensor | None = None
) -> Sequence[Tensor | Quantized]:
    """Returns the maps' weights if `ops.layer` may multiply them for the maps: as in `together`, and without biases."""
    ours = [m for m in maps if isinstance(m, Linear)]
    if not may_be_ours(x) or not untouched(Linear, *maps) or any(m.bias is not None for m in ours):
        return ()
    weights = [w for w in (m.matrix for m in ours) if not isinstance(w, Scaled)]
    return weights if len(weights) == len(maps) and has_layer(x, weights, seen, cache) else ()


def may_be_ours(x: Tensor) -> bool:
    """Returns whether our kernels may be asked at all."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


_MODULE = nn.Module.__module__
"""Where the forward is from that a class without one has; a function from elsewhere was put in a class's place."""
_WRITTEN: dict[type[nn.Module], object] = {}
"""The forward of each class of ours, as it was when `moekit.nn.model` was imported."""
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def as_written() -> None:
    """Takes the classes of `moekit.nn` for what `untouched` is to find."""
    kinds = (kind for kind in nn.Module.__subclasses__() if kind.__module__.startswith("moekit.nn."))
    _WRITTEN.update((kind, kind.forward) for kind in kinds)


def untouched(kind: type[nn.Module], *modules: nn.Module) -> bool:
    """Returns whether calling these modules is calling this class's forward, as it was written, and no more."""
    if torch.nn.modules.module._has_any_global_hook() or kind.forward.__module__ not in (kind.__module__, _MODULE):
        return False
    if _WRITTEN.get(kind, kind.forward) is not kind.forward:  # a wrapper may say that it is from where ours is
        return False
    for module in modules:
        own = module.__dict__
        if type(module) is not kind or "forward" in own or own.get("_compiled_call_impl") is not None:
            return False
        if any(own[name] for name in _HOOKS):
            return False
    return True

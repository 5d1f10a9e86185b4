"""Weights in 8 or 4 bits, for inference: groups of 32 along the summed dimension, one scale a group, no zero point.

A scale is bfloat16, not float16: it has float32's range, so that no group of tiny weights loses its scale to
underflow, and turning it into float32 is a shift on any machine. Its 8 bits of precision cost next to nothing, because
the codes are rounded against the scale that is kept.
"""

from typing import Any, Final, Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import BFloat16, Float, Int
from torch import Tensor

from moekit.errors import UnsupportedError

GROUP: Final = 32
Codes = Literal["int8", "int4"]

_MOST = {"int8": 127, "int4": -8}
"""The code of a group's largest weight. int4 has one more level below zero than above, so the largest goes there."""


class Quantized(NamedTuple):
    """Matrices in codes. The width is padded with zeros to whole groups."""

    codes: Int[Tensor, "*rows bytes"]
    """int8: a code each. int4: uint8, two codes + 8 in a byte; a group's code i is low in byte i, i + 16 high."""
    scales: BFloat16[Tensor, "*rows groups"]
    width: int

    @property
    def kind(self) -> Codes:
        """Returns int8 or int4."""
        return "int8" if self.codes.dtype == torch.int8 else "int4"

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the matrices that it stands for."""
        return *self.codes.shape[:-1], self.width

    def of(self, rows: Any) -> "Quantized":
        """Returns some of stacked matrices, or of the rows of one: any index but into the width."""
        return Quantized(self.codes[rows], self.scales[rows], self.width)


def quantize(weight: Float[Tensor, "*rows width"], kind: Codes) -> Quantized:
    """Returns the nearest codes: scale = w_max / 127 (int8) or w_max / -8 (int4), code = round(w / scale).

    w_max is the group's weight of largest magnitude, with its sign. A weight is off by at most half a scale; in int4
    one that is opposite to w_max and as large by up to 1.04 scales. A group of zeros stays zero, exactly.
    """
    groups = -(-weight.shape[-1] // GROUP)
    w = F.pad(weight.float(), (0, groups * GROUP - weight.shape[-1])).unflatten(-1, (groups, GROUP))
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    scales = (largest / _MOST[kind]).bfloat16()
    low, high = (-127, 127) if kind == "int8" else (-8, 7)
    codes = torch.where(scales == 0, 0, w / scales.float()).round_().clamp_(low, high).to(torch.int8)
    if kind == "int4":
        first, second = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
        codes = first | second << 4
    return Quantized(codes.flatten(-2), scales.squeeze(-1), weight.shape[-1])


def dequantize(weight: Quantized, dtype: torch.dtype = torch.float32) -> Float[Tensor, "*rows width"]:
    """Returns code * scale, formed in float32."""
    groups = weight.scales.shape[-1]
    codes = weight.codes.unflatten(-1, (groups, -1))
    if weight.kind == "int4":
        codes = torch.cat((codes & 15, codes >> 4), dim=-1).to(torch.int8) - 8
    w: Tensor = codes.float().mul_(weight.scales.float().unsqueeze(-1)).flatten(-2)[..., : weight.width]
    return w.to(dtype)


def refuse_gradients(weight: object, *inputs: Tensor) -> None:
    """Raises UnsupportedError where a gradient would have to pass through weights that are in codes or mapped."""
    if not isinstance(weight, Tensor) and torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        kind = weight.kind if isinstance(weight, Quantized) else "mapped"
        raise UnsupportedError(f"{kind} weights are for inference and have no gradients; use torch.no_grad()")

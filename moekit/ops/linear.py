"""The product with one matrix, whatever its weights are kept in."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moekit.ops.kernels import native
from moekit.ops.quantize import Quantized, dequantize, refuse_gradients
from moekit.ops.scaled import Scaled


def linear(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "out dim"] | Quantized | Scaled
) -> Float[Tensor, "*batch out"]:
    """Returns x W^T in x's dtype.

    On a CPU codes, and for a few rows without a gradient weights of any kind, are read as they lie. 8-bit floating
    point becomes numbers for this product.
    """
    refuse_gradients(weight, x)
    if isinstance(weight, Scaled):
        weight = weight.to(x.device).numbers().to(x.dtype)
    if native.has_linear(x, weight) and not torch.is_autocast_enabled("cpu"):
        y: Tensor = native.linear(x, weight)
        return y
    return F.linear(x, dequantize(weight, x.dtype) if isinstance(weight, Quantized) else weight)

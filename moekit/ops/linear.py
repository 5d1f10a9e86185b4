"""Products with matrices, whatever their weights are kept in."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from moekit.ops.autocast import cast_once
from moekit.ops.kernels import linear as kernels
from moekit.ops.quantize import Quantized, dequantize, refuse_gradients
from moekit.ops.scaled import Scaled


def linear(
    x: Float[Tensor, "*batch dim"], weight: Float[Tensor, "out dim"] | Quantized | Scaled
) -> Float[Tensor, "*batch out"]:
    """Returns x W^T in x's dtype, or in autocast's; see `linears`."""
    return linears(x, weight)[0]


def linears(
    x: Float[Tensor, "*batch dim"], *weights: Float[Tensor, "_ dim"] | Quantized | Scaled
) -> tuple[Float[Tensor, "*batch _"], ...]:
    """Returns x W^T in x's dtype, or in autocast's, for each W: as one product where ours run.

    On a CPU codes, and for a few rows without a gradient weights of any kind, are read as they lie. 8-bit floating
    point becomes numbers for this product.
    """
    for weight in weights:
        refuse_gradients(weight, x)
    ready = [w.to(x.device).numbers().to(x.dtype) if isinstance(w, Scaled) else w for w in weights]
    cast = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    low = cast_once(x)
    if all(w.shape[-1] == x.shape[-1] for w in ready) and kernels.has_linears(low, ready, cast):
        return kernels.linears(low, ready)
    return tuple(F.linear(x, dequantize(w, x.dtype) if isinstance(w, Quantized) else w) for w in ready)

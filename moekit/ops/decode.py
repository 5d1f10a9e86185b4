"""A decoding step of a whole model as one function of its weights: the seam to the native kernel that does it."""

from collections.abc import Iterable

from torch import Tensor

from moekit.ops.kernels import build
from moekit.ops.kernels.decode import NAMES, Decoder, Layer, Routed

__all__ = ["Decoder", "Layer", "Routed", "unavailable"]


def unavailable(tensors: Iterable[Tensor]) -> str | None:
    """Returns why `Decoder` cannot run on these weights and cache, or None."""
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype not in NAMES:
            return f"it takes float32 and bfloat16 on a CPU, not {tensor.dtype} on {tensor.device.type}"
    return build.native().reason

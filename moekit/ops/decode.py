"""A decoding step of a whole model as one function of its weights: the seam to the native kernel that does it."""

from moekit.ops.kernels.decode import Decoder, Heads, Layer, Projections, Routed, unavailable

__all__ = ["Decoder", "Heads", "Layer", "Projections", "Routed", "unavailable"]

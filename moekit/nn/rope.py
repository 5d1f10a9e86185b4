"""Rotary position embedding (arXiv 2104.09864) with YaRN (arXiv 2309.00071, as DeepSeek-V2 uses it) or Llama 3.1's."""

import functools
import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.config import RopeConfig
from moekit.ops import attention


class Rotation(NamedTuple):
    """cos and sin of every position's angles, computed once per forward pass and shared by all layers."""

    cos: Float[Tensor, "batch length half_rope"]
    sin: Float[Tensor, "batch length half_rope"]


def inverse_frequencies(rope: RopeConfig, dim: int) -> list[float]:
    """Returns theta^(-2i/dim) for i < dim/2, blended with its interpolation where the context is extended."""
    extrapolated = [rope.theta ** (-2 * i / dim) for i in range(dim // 2)]
    yarn, llama3 = rope.yarn, rope.llama3
    if llama3 is not None:
        low, span = llama3.low_freq_factor, llama3.high_freq_factor - llama3.low_freq_factor
        turns = [llama3.original_max_position_embeddings * f / (2 * math.pi) for f in extrapolated]
        kept = [min(max((t - low) / span, 0), 1) for t in turns]
        return [f * keep + f / llama3.factor * (1 - keep) for f, keep in zip(extrapolated, kept, strict=True)]
    if yarn is None:
        return extrapolated

    def dimension(rotations: float) -> float:
        """The (fractional) index whose wave turns `rotations` times over the original context."""
        turns = yarn.original_max_position_embeddings / (2 * math.pi * rotations)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low = max(math.floor(dimension(yarn.beta_fast)), 0)
    high = min(math.ceil(dimension(yarn.beta_slow)), dim - 1)
    span = max(high - low, 0.001)
    kept = [1 - min(max((i - low) / span, 0), 1) for i in range(dim // 2)]
    return [f * keep + f / yarn.factor * (1 - keep) for f, keep in zip(extrapolated, kept, strict=True)]


def magnitude(factor: float, mscale: float) -> float:
    """Returns YaRN's attention magnitude 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1


def softmax_scale(rope: RopeConfig, head_dim: int) -> float:
    """Returns 1/sqrt(head_dim), times the squared all-dimension magnitude of YaRN."""
    scale: float = head_dim**-0.5
    if rope.yarn is not None and rope.yarn.mscale_all_dim:
        scale *= magnitude(rope.yarn.factor, rope.yarn.mscale_all_dim) ** 2
    return scale


def rotation(rope: RopeConfig, dim: int, positions: Int[Tensor, "batch length"]) -> Rotation:
    """Returns cos and sin in float32; with YaRN times magnitude(mscale) / magnitude(mscale_all_dim)."""
    keeps = type(positions) is Tensor and not torch.compiler.is_compiling()  # else it is a tensor of this pass alone
    frequencies = (_kept_frequencies if keeps else _frequencies)(rope, dim, positions.device)
    angles = positions.unsqueeze(-1).float() * frequencies
    factor = 1.0
    if rope.yarn is not None:
        factor = magnitude(rope.yarn.factor, rope.yarn.mscale) / magnitude(rope.yarn.factor, rope.yarn.mscale_all_dim)
    return Rotation(angles.cos() * factor, angles.sin() * factor)


def _frequencies(rope: RopeConfig, dim: int, device: torch.device) -> Float[Tensor, " half_rope"]:
    with torch.inference_mode(False):  # one made in that mode could not be used outside of it
        return torch.tensor(inverse_frequencies(rope, dim), dtype=torch.float32, device=device)


_kept_frequencies = functools.cache(_frequencies)
"""They stay on the device: copying them there would wait for it at every step."""


def rotate(
    x: Float[Tensor, "batch length heads rope"], rotation: Rotation, interleaved: bool
) -> Float[Tensor, "batch length heads rope"]:
    """Returns x with each pair turned by its angle.

    Pairs are (2i, 2i + 1) when interleaved (DeepSeek-V2's MLA) and (i, i + rope/2) otherwise (the V1 models).
    """
    return attention.rotate(x, rotation.cos, rotation.sin, interleaved)

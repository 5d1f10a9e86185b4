"""Lory (arXiv 2405.03133): SwiGLU experts merged for each segment, by what the segment before it was about."""

from typing import Literal

from pydantic import Field

from moekit.config.variants.variant import Variant


class LoryConfig(Variant):
    """Fully differentiable segment routing."""

    kind: Literal["lory"] = Field("lory", description="SwiGLU experts merged for each segment")
    intermediate_size: int = Field(gt=0, description="intermediate width")
    n_routed_experts: int = Field(gt=0, description="experts of each layer, E")
    segment_size: int = Field(256, gt=0, description="tokens of a segment, T")

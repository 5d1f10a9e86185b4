"""Lory (arXiv 2405.03133): SwiGLU experts merged for each segment, by what the segment before it was about."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from moekit.config.variants.variant import Count, Variant, merged_at_once


class LoryConfig(Variant):
    """Fully differentiable segment routing."""

    remedy: ClassVar[str] = "use a longer ffn.warmup_steps, or data.order similar"
    kind: Literal["lory"] = Field("lory", description="SwiGLU experts merged for each segment")
    intermediate_size: int = Field(gt=0, description="intermediate width")
    n_routed_experts: int = Field(gt=0, description="experts of each layer, E")
    segment_size: int = Field(256, gt=0, description="tokens of a segment, T")
    first_segment: Literal["uniform", "learned", "own"] = Field(
        "uniform",
        description="what the first segment is merged by: equal weights; a learned vector of logits; own: its own mean "
        "(the paper's), through which a token's output depends on later tokens of that segment",
    )
    warmup_steps: int = Field(
        0, ge=0, description="optimiser steps as a dense model, whose network then every expert is a copy of"
    )

    @model_validator(mode="after")
    def _check(self) -> "LoryConfig":
        if self.n_routed_experts == 1:
            for name in ("first_segment", "warmup_steps"):
                if (value := getattr(self, name)) != type(self).model_fields[name].default:
                    raise ValueError(f"{name} is {value} but takes effect only with n_routed_experts above 1")
        return self

    def leak(self) -> str | None:
        if self.first_segment != "own":
            return None
        return (
            f"ffn.first_segment is own: in the first {self.segment_size} tokens of a sequence a token's output depends "
            "on later ones, so losses and likelihoods there are not those of a causal model; use uniform or learned"
        )

    def parameters(self, dim: int) -> dict[str, Count]:
        experts, network = self.n_routed_experts, 3 * dim * self.intermediate_size
        router = experts * dim + (experts if self.first_segment == "learned" else 0)
        return {"router": Count(router, router), "routed": Count(experts * network, network)}

    def forward_flops(self, dim: int, length: int) -> int:
        experts, network = self.n_routed_experts, 3 * dim * self.intermediate_size
        return 2 * network * length + -(-length // self.segment_size) * 2 * experts * (network + dim)

    def kept_bytes(self, dim: int, length: int, size: int) -> int:
        segments, experts = -(-length // self.segment_size), self.n_routed_experts
        inputs = (2 if size == 2 else 1) * dim
        return size * length * (inputs + 4 * self.intermediate_size) + 4 * segments * (dim + 4 * experts)

    def cached_bytes(self, dim: int, length: int, size: int) -> int:
        """Returns the bytes of the merged network, and of the float32 logits that it was merged by."""
        return size * 3 * dim * self.intermediate_size + 4 * self.n_routed_experts

    def merged_bytes(self, dim: int, length: int, batch: int, size: int) -> int:
        return merged_at_once(size * 2 * dim * self.intermediate_size, batch * -(-length // self.segment_size))

"""muMoE, the multilinear mixture of experts (arXiv 2402.12550): factorised experts, merged for each token."""

from typing import ClassVar, Literal

from pydantic import Field

from moekit.config.variants.variant import Variant


class MuMoEConfig(Variant):
    """Two factorised layers that share one entmax gate."""

    gates: ClassVar[int] = 0
    kind: Literal["mumoe"] = Field("mumoe", description="factorised experts, mixed for each token by one gate")
    intermediate_size: int = Field(gt=0, description="intermediate width")
    n_routed_experts: int = Field(gt=0, description="experts, N")

"""muMoE, the multilinear mixture of experts (arXiv 2402.12550): factorised experts, merged for each token."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from moekit.config.variants.variant import Count, Variant
from moekit.errors import ConfigError


class MuMoEConfig(Variant):
    """Two linear maps of factorised experts with GELU between them, which share one entmax gate."""

    gates: ClassVar[int] = 0  # every expert takes part in every token: there is no choice to return
    kind: Literal["mumoe"] = Field("mumoe", description="factorised experts, mixed for each token by one gate")
    intermediate_size: int = Field(gt=0, description="intermediate width")
    n_routed_experts: int = Field(gt=0, description="experts, N; of all levels together")
    second_level_experts: int | None = Field(
        None, gt=1, description="two levels: experts of the second one, which divides N; null: one level"
    )
    factorization: Literal["cp", "tr"] = Field("cp", description="how experts are stored: CP factors or a tensor ring")
    rank: int | None = Field(
        None, gt=0, description="R of cp, r_3 of tr; null: as many parameters as a dense GELU layer of this width"
    )
    expert_rank: int = Field(4, gt=0, description="tr: both ranks of an expert's core, r_1 = r_2")
    gate_norm: Literal["layer", "batch"] = Field(
        "layer", description="normalisation of the gate's logits: of each token, or over all tokens (encoders only)"
    )
    input_norm: bool = Field(False, description="LayerNorm, without weights, of what the experts read")

    @model_validator(mode="after")
    def _check(self) -> "MuMoEConfig":
        experts, second = self.n_routed_experts, self.second_level_experts
        if second is not None and (experts % second or experts == second):
            found = f"second_level_experts is {second} but n_routed_experts is {experts}"
            raise ValueError(f"{found}; choose a divisor that leaves the first level two experts or more")
        if self.factorization == "cp" and self.expert_rank != type(self).model_fields["expert_rank"].default:
            raise ValueError(f"expert_rank is {self.expert_rank} but takes effect only with factorization tr")
        if self.gate_norm == "batch" and experts == 1:
            raise ValueError("gate_norm is batch but takes effect only with n_routed_experts above 1")
        return self

    def sees_future(self) -> str | None:
        pooled = "a token's output would depend on the statistics of all tokens, later ones among them"
        return f"ffn.gate_norm is batch: {pooled}; use layer" if self.gate_norm == "batch" else None

    @property
    def levels(self) -> tuple[int, ...]:
        """Experts of each level; their product is N."""
        second = self.second_level_experts
        return (self.n_routed_experts,) if second is None else (self.n_routed_experts // second, second)

    @property
    def ring(self) -> int:
        """Columns of the input's and the output's factor for each unit of rank."""
        return self.expert_rank if self.factorization == "tr" else 1

    def matched_rank(self, dim: int) -> int:
        """Returns the rank: as it is set, or else the one that brings the parameters nearest to a dense GELU layer's.

        Off by at most half of what one unit of rank costs: of a layer as wide as GPT-2's 0.1% in cp, 0.3% in tr.
        """
        if self.rank is not None:
            return self.rank
        dense = 2 * dim * self.intermediate_size + self.intermediate_size + dim
        fixed = self._router(dim) + (0 if self.factorization == "cp" else self._factors(dim, 0))
        rank = round((dense - fixed) / (self._factors(dim, 1) - self._factors(dim, 0)))
        if rank < 1:
            found = f"gate and cores of {self.n_routed_experts} experts take {fixed:,} parameters"
            raise ConfigError(
                f"ffn.rank is null but {found}, a dense layer {dense:,}; lower ffn.n_routed_experts, or set ffn.rank"
            )
        return rank

    def parameters(self, dim: int) -> dict[str, Count]:
        router, factors = self._router(dim), self._factors(dim, self.matched_rank(dim))
        return {"router": Count(router, router), "routed": Count(factors, factors)}

    def forward_flops(self, dim: int, length: int) -> int:
        """Returns the FLOPs of products with matrices and, of a ring, of the tokens' own matrices with each other."""
        rank, ring, levels = self.matched_rank(dim), self.ring, len(self.levels)
        biases = 2 * ring * rank
        own = 2 * (ring**2 * rank + (levels - 1) * ring**3) if self.factorization == "tr" else 0
        return 2 * length * (self._router(dim) + self._factors(dim, rank) - biases + own)

    def kept_bytes(self, dim: int, length: int, size: int) -> int:
        """Returns the bytes of both maps' inputs and factors' outputs, and of the gate, which is float32.

        Of a map: x through its factor, each level's gate through its own, and what they come to, level by level.
        """
        rank, ring, levels, half = self.matched_rank(dim), self.ring, self.levels, size == 2
        x = 4 * dim + (size * dim if half or self.input_norm else 0)
        gate = sum(8 * n + (size * n if half else 0) for n in levels)
        if self.factorization == "cp":
            factors = (1 + 2 * len(levels)) * rank
        else:
            factors = 2 * ring * rank + (2 * len(levels) - 1) * ring**2
        return length * (x + gate + 2 * size * (self.intermediate_size + factors))

    def buffer_bytes(self) -> int:
        """Returns the bytes of the running mean and variance of the gate's logits."""
        return 8 * sum(self.levels) if self.gate_norm == "batch" else 0

    def _router(self, dim: int) -> int:
        return sum(self.levels) * dim

    def _factors(self, dim: int, rank: int) -> int:
        """Returns the parameters of both maps, which have the same sum of input and output widths."""
        ring, sizes = self.ring, dim + 1 + self.intermediate_size
        own = rank if self.factorization == "cp" else ring**2
        return 2 * (sum(self.levels) * own + sizes * ring * rank)

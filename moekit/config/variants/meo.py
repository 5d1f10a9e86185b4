"""MEO, merging experts into one (arXiv 2310.09832), and the per-linear MoE that it is measured against."""

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from moekit.config.variants.variant import Count, Variant

FUTURE = "a gate pooled over the whole sequence lets a token's output depend on later tokens"


class MEOConfig(Variant):
    """Both linear maps of a GELU feed-forward network have experts and a noisy top-k gate of their own."""

    gates: ClassVar[int] = 2
    kind: Literal["meo"] = Field("meo", description="experts of each linear map merged into one, or dispatched to")
    intermediate_size: int = Field(gt=0, description="intermediate width")
    n_routed_experts: int = Field(gt=0, description="experts of each linear map, n")
    num_experts_per_tok: int = Field(gt=0, description="experts chosen by a gate, m")
    mode: Literal["merge", "dispatch"] = Field(
        "merge", description="merge: weights are mixed, then applied once; dispatch: outputs are mixed (vanilla MoE)"
    )
    level: Literal["task", "sequence", "token", "prefix", "segment"] = Field(
        "sequence",
        description="what a gate reads: a description of the task; the sequence's mean; token: the same, with token "
        "attention blocks (dispatch: each token itself); prefix and segment: a mean of earlier tokens only",
    )
    segment_size: int | None = Field(None, gt=0, description="tokens of the prefix, or of each segment")
    description_size: int = Field(128, gt=0, description="task: width of the description's embedding")
    reduce_factor: int = Field(64, gt=0, description="what a bottleneck's width is divided by (token, task)")
    description_ids: tuple[int, ...] = Field(
        (), strict=False, description="task: the description's token ids, used where a forward pass is given none"
    )
    noisy_gating: bool = Field(True, description="learned noise on the gate's logits while training")
    aux_loss_alpha: float = Field(0.01, ge=0, description="factor of CV(importance)^2 + CV(load)^2, of each gate")

    @model_validator(mode="after")
    def _check(self) -> "MEOConfig":
        experts, k, level = self.n_routed_experts, self.num_experts_per_tok, self.level
        if k > experts:
            raise ValueError(f"num_experts_per_tok is {k} but n_routed_experts is {experts}; choose at most {experts}")
        if level in ("prefix", "segment") and self.segment_size is None:
            raise ValueError(f"segment_size is missing: level {level} asks for it")
        if self.mode == "dispatch" and level in ("prefix", "segment"):
            raise ValueError(f"level is {level} but mode dispatch has task, sequence or token")
        effects = [
            ("segment_size", level in ("prefix", "segment"), "level prefix or segment"),
            ("description_size", level == "task", "level task"),
            ("description_ids", level == "task", "level task"),
            ("reduce_factor", level == "task" or self.has_token_blocks, "level task, or level token of mode merge"),
            ("aux_loss_alpha", k < experts, "num_experts_per_tok below n_routed_experts"),
        ]
        for name, effective, needed in effects:
            value = getattr(self, name)
            if not effective and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {value} but takes effect only with {needed}")
        return self

    @property
    def has_token_blocks(self) -> bool:
        """Whether each linear map has a token attention block before it."""
        return self.level == "token" and self.mode == "merge"

    @property
    def task_width(self) -> int:
        """What a gate reads of a description."""
        return max(1, self.description_size // self.reduce_factor)

    def sees_future(self) -> str | None:
        pooled = self.level == "sequence" or (self.level == "token" and self.mode == "merge")
        return f"ffn.level is {self.level}: {FUTURE}; use task, prefix or segment" if pooled else None

    def parameters(self, dim: int) -> dict[str, Count]:
        raise NotImplementedError

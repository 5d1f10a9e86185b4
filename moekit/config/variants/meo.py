"""MEO, merging experts into one (arXiv 2310.09832), and the per-linear MoE that it is measured against."""

from typing import ClassVar, Literal, NamedTuple

from pydantic import Field, model_validator

from moekit.config.variants.variant import Count, Variant, merged_at_once

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
            ("aux_loss_alpha", experts > 1, "n_routed_experts above 1"),
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
        return self._reduced(self.description_size)

    def sees_future(self) -> str | None:
        pooled = self.level == "sequence" or (self.level == "token" and self.mode == "merge")
        return f"ffn.level is {self.level}: {FUTURE}; use task, prefix or segment" if pooled else None

    def parameters(self, dim: int) -> dict[str, Count]:
        """Returns one layer's parameters: every gate's are `router`, token attention blocks `dense`."""
        experts, ff = self.n_routed_experts, self.intermediate_size
        one = 2 * dim * ff + ff + dim  # one expert of both maps
        router = sum(self._logits() * experts * self._gate_width(width) for width in (dim, ff))
        if self.level == "task":
            router += 2 * (self.description_size + 1) * self.task_width
        blocks = sum((2 * width + 1) * self._reduced(width) + width for width in (dim, ff)) * self.has_token_blocks
        return {
            "router": Count(router, router),
            "routed": Count(experts * one, self.num_experts_per_tok * one),
            "dense": Count(blocks, blocks),
        }

    def shared_parameters(self, vocab_size: int) -> dict[str, Count]:
        table = vocab_size * self.description_size if self.level == "task" else 0
        return {"router": Count(table, table)}

    def forward_flops(self, dim: int, length: int) -> int:
        """Returns 2 P a token and 2 m P a unit where P weights of m experts are merged, 2 m P a token elsewhere.

        Gates, task descriptions (one, averaged) and token attention blocks are counted; averages and biases are not.
        """
        ff, weights, chosen = self.intermediate_size, dim * self.intermediate_size, self.num_experts_per_tok
        passes = length + chosen * self._units(length) if self.mode == "merge" else chosen * length
        flops = 2 * 2 * weights * passes  # of both maps
        for width in (dim, ff):
            flops += 2 * self._logits() * self.n_routed_experts * self._gate_width(width) * self._gated(length)
            flops += 4 * width * self._reduced(width) * length * self.has_token_blocks
        if self.level == "task":
            flops += 2 * 2 * self.description_size * self.task_width
        return flops

    def kept_bytes(self, dim: int, length: int, size: int) -> int:
        """Returns what both maps read and GELU's input; merged matrices are formed again, not kept.

        Besides: a token block's bottleneck and output; with dispatch each choice's input and output row and 28 bytes of
        ids, order and weight; a gate's logits, noise and scores.
        """
        ff, k = self.intermediate_size, self.num_experts_per_tok
        numbers = (2 if size == 2 else 1) * dim + 2 * ff
        if self.mode == "dispatch":
            numbers += 2 * k * (dim + ff)
        if self.has_token_blocks:
            numbers += sum(self._reduced(width) + width for width in (dim, ff))
        choices = 2 * 28 * k * length if self.mode == "dispatch" else 0
        return size * numbers * length + choices + 2 * 8 * self._logits() * self.n_routed_experts * self._gated(length)

    def merged_bytes(self, dim: int, length: int, batch: int, size: int) -> int:
        """Returns the bytes of one linear map's merged matrices: the two are never held together."""
        if self.mode == "dispatch":
            return 0
        return merged_at_once(size * dim * self.intermediate_size, batch * self._units(length))

    def cached_bytes(self, dim: int, length: int, size: int) -> int:
        """Returns the bytes of both maps' merged matrices and biases, and of the float32 sums over each segment."""
        if self.mode == "dispatch":
            return 0
        widths, weights = dim + self.intermediate_size, 2 * dim * self.intermediate_size
        segments = -(-length // self.segment_size) if self.segment_size else 0
        return size * (weights + widths) + 4 * segments * widths

    def _units(self, length: int) -> int:
        """Returns the merged matrices of one sequence, of each linear map."""
        return -(-length // (self.segment_size or length)) if self.level == "segment" else 1

    def _gated(self, length: int) -> int:
        """Returns how many times a gate is computed for one sequence."""
        return length if self.mode == "dispatch" and self.level == "token" else self._units(length)

    def _logits(self) -> int:
        """Returns the matrices of one gate: logits, and the noise on them."""
        return 2 if self.noisy_gating else 1

    def _gate_width(self, width: int) -> int:
        """Returns how wide a gate's input is, for a linear map that reads `width`."""
        return self.task_width if self.level == "task" else width

    def _reduced(self, width: int) -> int:
        return max(1, width // self.reduce_factor)


class Line(NamedTuple):
    """Forward FLOPs of one sequence, m experts of each linear map being used."""

    num_experts_per_tok: int
    dispatched: int
    """Vanilla MoE: every token through m experts."""
    merged_1: int
    """MEO, 1 FLOP for each weight that is merged: nearest to the paper's figure."""
    merged_2: int
    """MEO, 2 FLOPs, a multiplication and an addition, as everything else is counted."""


def paper_table(layers: int, dim: int, ff: int, vocab_size: int, length: int, chosen: set[int]) -> list[Line]:
    """Returns the counts of MEO's paper for an encoder with a masked-LM head, in order of m.

    The paper prints figures and no rule. This one gives them back (BERT base, m = 4, 128 tokens: 72.0G, and 28.6G for
    MEO within 0.5 or 1.3%): 2 a multiply-add, attention of four square matrices and its scores, a head of a square
    matrix and the vocabulary, all feed-forward layers of two matrices; no gates, biases, norms or token blocks.
    """
    rest = layers * (8 * dim * dim * length + 4 * length * length * dim) + 2 * length * dim * (vocab_size + dim)
    weights = layers * 2 * dim * ff
    through_one = 2 * weights * length
    return [
        Line(m, rest + m * through_one, *(rest + through_one + per_weight * m * weights for per_weight in (1, 2)))
        for m in sorted(chosen)
    ]

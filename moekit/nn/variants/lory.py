"""Lory, fully differentiable mixture-of-experts by segments (arXiv 2405.03133).

A sequence is cut into segments of T tokens. For each segment all experts' matrices are merged into one SwiGLU network,
theta = sum_i e_i theta_i with e = softmax(R h), h being the mean of the layer's input over the segment before it
(section 3). While generating, the mean of the whole prompt decides once, and the merged network stays (section 3.3).

Differs from the paper: the first segment, which has none before it, is merged with equal or learned weights; the
paper's own way (`first_segment` own) shows a token the later ones of that segment.
The paper does not say: what happens at a last segment that is shorter (it is one), nor at document ends within a
sequence (segments run over them, as its batches of similar documents want them to).
Cost: merging takes E/T of the network's FLOPs; no matrix is merged twice while generating, which takes
batch x the bytes of one network in the cache.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moekit.config import LoryConfig
from moekit.nn.cache import KVCache
from moekit.nn.router import RouterContext
from moekit.nn.variants.layer import VariantLayer, VariantOutput
from moekit.ops.autocast import autocast_off, cast_once
from moekit.ops.merge import merged, merged_linear, mixing
from moekit.ops.routing import Routing, route
from moekit.ops.segments import joined, previous, segment_means, segment_tokens, segmented, sequence_means


class SegmentRouter(nn.Module):
    """A bias-free linear map of a mean to the experts' logits, in float32, and what the first segment has instead."""

    def __init__(self, config: LoryConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, dim))
        self.first: nn.Parameter | None = None
        if config.first_segment == "learned":
            self.first = nn.Parameter(torch.empty(config.n_routed_experts))

    def forward(self, means: Float[Tensor, "batch segments dim"]) -> Float[Tensor, "batch segments experts"]:
        """Returns each segment's own logits."""
        with autocast_off(means):
            return means @ self.weight.to(means.dtype).T

    def shifted(self, means: Float[Tensor, "batch segments dim"]) -> Float[Tensor, "batch segments experts"]:
        """Returns the logits that each segment is merged by: those of the one before it."""
        own = self(means)
        first = own.new_zeros(len(own), 1, own.shape[2])
        if self.first is not None:
            first = first + self.first.to(own.dtype)
        elif self.config.first_segment == "own" and own.shape[1]:
            first = own[:, :1].detach()  # the router must not learn from what it should not see
        return previous(own, first)


class MergedExperts(nn.Module):
    """SwiGLU experts without biases: (experts, 2 ff, dim) with the gate's rows first, and (experts, dim, ff)."""

    def __init__(self, n_experts: int, dim: int, ff: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(n_experts, 2 * ff, dim))
        self.down_proj = nn.Parameter(torch.empty(n_experts, dim, ff))

    def forward(
        self, x: Float[Tensor, "units tokens dim"], mix: Float[Tensor, "units experts"]
    ) -> Float[Tensor, "units tokens dim"]:
        """Returns the tokens of each unit through the network that its row of `mix` merges."""
        return merged_linear(_swiglu(merged_linear(x, mix, self.gate_up_proj)), mix, self.down_proj)

    def merged(self, mix: Float[Tensor, "units experts"]) -> tuple[Tensor, Tensor]:
        """Returns each unit's merged matrices, (units, 2 ff, dim) and (units, dim, ff), in autocast's dtype."""
        return merged(mix, self.gate_up_proj), merged(mix, self.down_proj)


class Lory(VariantLayer):
    """Segment routing, merged experts, and a dense network while warm-up lasts."""

    def __init__(self, config: LoryConfig, dim: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.router = SegmentRouter(config, dim)
        self.experts = MergedExperts(config.n_routed_experts, dim, config.intermediate_size)
        self.dense = False
        """The step that comes is one of the warm-up: training runs the first expert alone."""

    def reset_parameters(self) -> None:
        if self.router.first is not None:
            self.router.first.zero_()
        if self.config.warmup_steps:
            self._copy([])

    def forward(self, x: Float[Tensor, "batch length dim"], context: RouterContext) -> VariantOutput:
        batch, length, _ = x.shape
        mask = None if context.mask is None else context.mask.view(batch, length)
        if context.cache is not None:
            return self._decided_once(x, mask, context.cache)
        size = min(self.config.segment_size, max(length, 1))
        tokens = segment_tokens(batch, length, size, mask, x.device)
        if self.dense and self.training:
            logits = torch.zeros(*tokens.shape, self.config.n_routed_experts, device=x.device)
            gate_up = F.linear(x, self.experts.gate_up_proj[0])
            return VariantOutput(
                F.linear(_swiglu(gate_up), self.experts.down_proj[0]), (self._routing(logits, tokens),)
            )
        routing = self._routing(self.router.shifted(segment_means(x, size, mask)), tokens)
        y = self.experts(segmented(cast_once(x), size), mixing(routing, self.config.n_routed_experts))
        return VariantOutput(joined(y, batch, length), (routing,))

    def _decided_once(
        self, x: Float[Tensor, "batch length dim"], mask: Bool[Tensor, "batch length"] | None, cache: KVCache
    ) -> VariantOutput:
        """Returns the output of networks merged by the mean of what the first pass over this cache holds.

        A sequence without a token in that pass has equal weights. A prompt that is read in several passes is decided
        by the first one.
        """
        batch, length, _ = x.shape
        if self.layer not in cache.routing:
            logits = self.router(sequence_means(x, mask).unsqueeze(1)).squeeze(1)
            cache.routing[self.layer] = logits
            cache.merged[self.layer] = self.experts.merged(logits.softmax(-1))
        gate_up, down = cache.merged[self.layer]
        y = _swiglu(cast_once(x) @ gate_up.transpose(1, 2)) @ down.transpose(1, 2)
        tokens = segment_tokens(batch, length, max(length, 1), mask, x.device)
        return VariantOutput(y, (self._routing(cache.routing[self.layer].unsqueeze(1), tokens, decided=True),))

    def _routing(
        self,
        logits: Float[Tensor, "batch segments experts"],
        tokens: Int[Tensor, "batch segments"],
        decided: bool = False,
    ) -> Routing:
        """Returns the routing of all segments: every expert chosen, the heaviest first.

        The load is not of choices, all being chosen: it is each expert's weight times the segment's tokens, rounded for
        each sequence, where the router has decided, which for the first segment it has not.
        """
        experts = self.config.n_routed_experts
        routing = route(logits.flatten(0, 1), experts, sequences=len(logits), mask=tokens.flatten() > 0)
        assert routing.scores is not None
        counted = tokens.clone()
        if not decided and self.config.first_segment != "own":
            counted[:, :1] = 0
        shares = routing.scores.detach().view(logits.shape) * counted.unsqueeze(-1)
        return routing._replace(tokens_per_expert=shares.sum(1).round().long())

    def begin_step(self, step: int) -> None:
        self.dense = step < self.config.warmup_steps

    def end_step(self, states: Sequence[Mapping[Tensor, Mapping[str, Any]]]) -> None:
        """Makes every expert a copy of the first while warm-up lasts, the optimisers' moments too.

        After each of its steps, not only after the last: so a checkpoint of any step is the dense model, however it is
        routed, and what a step does follows from its number. The paper does not say: what becomes of the moments.
        """
        if self.dense:
            self._copy(states)

    @torch.no_grad()
    def _copy(self, states: Sequence[Mapping[Tensor, Mapping[str, Any]]]) -> None:
        for weight in self.experts.parameters():
            held = (value for state in states for value in state.get(weight, {}).values())
            for tensor in (weight, *(value for value in held if value.shape == weight.shape)):
                tensor[1:] = tensor[:1]


def _swiglu(gate_up: Float[Tensor, "*rows columns"]) -> Float[Tensor, "*rows ff"]:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up

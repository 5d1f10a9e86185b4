"""MEO, merging experts into one (arXiv 2310.09832), and the MoE per linear map that the paper measures it against.

Each linear map of a GELU feed-forward network has experts and a noisy top-k gate of its own; the activation stands
between the two. Merging mixes the chosen experts' weights once for a unit (a sequence, a task, a segment) and applies
the result to all its tokens; dispatching mixes outputs. For one map and one gate both give the same numbers.
The cost of merging is that of one expert and of reading the chosen ones once a unit; see `MEOConfig.forward_flops`.

Differs from the paper's code: biases are kept, padding counts in no mean, and a gate never sees what comes later.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moekit.config import MEOConfig
from moekit.errors import ConfigError
from moekit.nn.cache import KVCache
from moekit.nn.router import RouterContext
from moekit.nn.variants.layer import VariantLayer, VariantOutput
from moekit.ops import balance, dispatch
from moekit.ops.autocast import autocast_off, cast_once
from moekit.ops.experts import mixed_linear
from moekit.ops.merge import merged, merged_linear, mixing
from moekit.ops.routing import Routing, of_tokens, route_noisy
from moekit.ops.segments import joined, segment_means, segment_tokens, segmented, sequence_means

NOISE_FLOOR = 1e-2
"""Least standard deviation of the noise on a gate's logits (the paper's code)."""


class MEO(VariantLayer):
    """down gelu(up x), with experts in both maps."""

    def __init__(self, config: MEOConfig, dim: int, layer: int) -> None:
        super().__init__()
        self.config = config
        self.up_proj = ExpertLinear(config, dim, config.intermediate_size, 2 * layer)
        self.down_proj = ExpertLinear(config, config.intermediate_size, dim, 2 * layer + 1)

    def reset_parameters(self) -> None:
        self.up_proj.reset_parameters()
        self.down_proj.reset_parameters()

    def forward(self, x: Float[Tensor, "batch length dim"], context: RouterContext) -> VariantOutput:
        hidden, up = self.up_proj(x, context)
        y, down = self.down_proj(F.gelu(hidden), context)
        return VariantOutput(y, (up, down))

    def balance_losses(self, routings: tuple[Routing, ...]) -> dict[str, Float[Tensor, ""]]:
        if not (alpha := self.config.aux_loss_alpha):
            return {}
        terms = [balance.importance_loss(routing) + balance.load_loss(routing) for routing in routings]
        return {"importance_and_load": alpha * torch.stack(terms).sum()}


class ExpertLinear(nn.Module):
    """A linear map with experts; `weight` is (experts, out, dim), `bias` (experts, out)."""

    def __init__(self, config: MEOConfig, dim: int, out: int, place: int) -> None:
        super().__init__()
        self.config, self.place = config, place
        experts, level = config.n_routed_experts, config.level
        self.weight = nn.Parameter(torch.empty(experts, out, dim))
        self.bias = nn.Parameter(torch.empty(experts, out))
        self.task_proj = nn.Linear(config.description_size, config.task_width) if level == "task" else None
        self.gate = NoisyGate(experts, config.task_width if level == "task" else dim, config.noisy_gating)
        self.token_block = TokenBlock(dim, config.reduce_factor) if config.has_token_blocks else None

    def reset_parameters(self) -> None:
        """Gates begin at zero: all experts alike, and noise breaks the tie; token blocks begin as the identity."""
        nn.init.zeros_(self.bias)
        nn.init.zeros_(self.gate.weight)
        if self.gate.noise is not None:
            nn.init.zeros_(self.gate.noise)
        if self.task_proj is not None:
            self.task_proj.reset_parameters()
        if self.token_block is not None:
            self.token_block.reset_parameters()

    def forward(
        self, x: Float[Tensor, "batch length dim"], context: RouterContext
    ) -> tuple[Float[Tensor, "batch length out"], Routing]:
        config = self.config
        x = cast_once(x)
        if self.token_block is not None:
            x = x + self.token_block(x)
        real = None if context.mask is None else context.mask.view(x.shape[:2])
        if config.mode == "dispatch":
            return self._dispatched(x, context, real)
        if config.level in ("prefix", "segment"):
            return self._by_earlier(x, context.cache, real)
        routing = self._route(self._unit(x, context, real), len(x))
        mix = mixing(routing, len(self.weight))
        if context.cache is not None:  # its task is a sequence's for good
            return self._by_kept(x, mix, torch.zeros_like(context.cache.lengths), context.cache), routing
        return merged_linear(x, mix, self.weight, self.bias), routing

    def _dispatched(
        self, x: Tensor, context: RouterContext, real: Bool[Tensor, "batch length"] | None
    ) -> tuple[Float[Tensor, "batch length out"], Routing]:
        """Returns the experts' outputs, mixed: by a gate of each token, or by that of its sequence or task."""
        if self.config.level == "token":
            tokens = self._route(x.flatten(0, 1), len(x), context.mask)
            routing = tokens
        else:
            routing = self._route(self._unit(x, context, real), len(x))
            tokens = of_tokens(routing, x.shape[1], context.mask)
        plan = dispatch.plan(tokens.expert_ids, len(self.weight))
        y = mixed_linear(x.flatten(0, 1), tokens.weights, plan, self.weight, self.bias)
        return y.unflatten(0, x.shape[:2]), routing

    def _unit(
        self, x: Tensor, context: RouterContext, real: Bool[Tensor, "batch length"] | None
    ) -> Float[Tensor, "batch width"]:
        """Returns what a gate reads of each sequence: the mean of its real tokens, or its task's description."""
        if self.task_proj is None:
            return sequence_means(x, real)
        if context.task is None:
            raise ConfigError("ffn.level is task but no description was given: neither task_ids nor description_ids")
        embedded, described = context.task
        with autocast_off(embedded):
            return sequence_means(self.task_proj(embedded), described)

    def _by_earlier(
        self, x: Tensor, cache: KVCache | None, real: Bool[Tensor, "batch length"] | None
    ) -> tuple[Float[Tensor, "batch length out"], Routing]:
        """Returns tokens through what their prefix or previous segment chose; before there is one, the mean expert.

        The paper does not say: how its gate, which pools a whole sequence, is to be used where tokens come one by one.
        """
        if cache is None:
            return self._by_segments(x, segment_means(x, self._size, real), real)
        sums = self._remember(x, cache, real)
        if cache.longest == 0:
            return self._by_segments(x, sums / self._size, real)
        steps = []
        for position, token in zip(cache.positions(*x.shape[:2]).T, x.split(1, 1), strict=True):
            read = self._read_by(position)
            z = sums[torch.arange(len(sums), device=x.device), read.clamp(min=0)] / self._size
            routing = self._route(z, len(z), read >= 0)
            mix = torch.where((read >= 0).unsqueeze(-1), mixing(routing, len(self.weight)), 1 / len(self.weight))
            steps.append(self._by_kept(token, mix, read, cache))
        return torch.cat(steps, 1), routing

    def _by_kept(
        self, x: Float[Tensor, "batch tokens dim"], mix: Tensor, unit: Int[Tensor, " batch"], cache: KVCache
    ) -> Float[Tensor, "batch tokens out"]:
        """Returns tokens through merged matrices that stay in the cache until a sequence is routed by another unit.

        Bytes: batch times those of one network.
        """
        kept = cache.merged.get(self.place)
        if kept is None or not torch.equal(kept[0], unit):
            kept = unit, merged(mix, self.weight), merged(mix, self.bias)
            cache.merged[self.place] = kept
        _, weight, bias = kept
        return torch.baddbmm(bias.unsqueeze(1), x, weight.transpose(1, 2))

    def _by_segments(
        self, x: Tensor, means: Float[Tensor, "batch segments dim"], real: Bool[Tensor, "batch length"] | None
    ) -> tuple[Float[Tensor, "batch length out"], Routing]:
        """Returns whole sequences, each segment through what the one that it reads chose."""
        batch, length = x.shape[:2]
        tokens = segment_tokens(batch, length, self._size, real, x.device)
        read = self._read_by(torch.arange(tokens.shape[1], device=x.device) * self._size)[1:]
        routing = self._route(means[:, read].flatten(0, 1), batch, tokens[:, 1:].flatten() > 0)
        chosen = mixing(routing, len(self.weight)).unflatten(0, (batch, -1))
        first = chosen.new_full((batch, 1, len(self.weight)), 1 / len(self.weight))
        mix = torch.cat((first, chosen), 1).flatten(0, 1)
        return joined(merged_linear(segmented(x, self._size), mix, self.weight, self.bias), batch, length), routing

    @property
    def _size(self) -> int:
        assert self.config.segment_size is not None  # the configuration has checked it
        return self.config.segment_size

    def _read_by(self, position: Tensor) -> Tensor:
        """Returns the segment that a token's gate reads, below 0 where none is complete before it."""
        segment = position // self._size
        return segment - 1 if self.config.level == "segment" else segment.clamp(max=1) - 1

    def _remember(
        self, x: Tensor, cache: KVCache, real: Bool[Tensor, "batch length"] | None
    ) -> Float[Tensor, "batch segments dim"]:
        """Returns the sums of all segments so far, these tokens added; they stay in the cache."""
        batch, length, dim = x.shape
        wide = x if x.dtype == torch.float64 else x.float()
        kept = cache.sums.get(self.place, wide.new_zeros(batch, 0, dim))
        sums = F.pad(kept, (0, 0, 0, -(-cache.max_length // self._size) - kept.shape[1]))
        cache.sums[self.place] = sums
        segment = cache.positions(batch, length) // self._size
        wide = wide if real is None else wide * real.unsqueeze(-1)
        sums.scatter_add_(1, segment.unsqueeze(-1).expand(-1, -1, dim), wide)
        return sums

    def _route(self, units: Tensor, sequences: int, mask: Bool[Tensor, " units"] | None = None) -> Routing:
        with autocast_off(units):
            units = units if units.dtype == torch.float64 else units.float()
            logits, noise_std = self.gate(units)
            return route_noisy(logits, self.config.num_experts_per_tok, noise_std, sequences=sequences, mask=mask)


class NoisyGate(nn.Module):
    """Logits z W_g and, while training, the noise's deviation softplus(z W_n) + 0.01 (arXiv 1701.06538, Eq. 4)."""

    def __init__(self, experts: int, width: int, noisy: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.noise = nn.Parameter(torch.empty(experts, width)) if noisy else None

    def forward(
        self, z: Float[Tensor, "units width"]
    ) -> tuple[Float[Tensor, "units experts"], Float[Tensor, "units experts"] | None]:
        logits = z @ self.weight.to(z.dtype).T
        if self.noise is None or not self.training:
            return logits, None
        return logits, F.softplus(z @ self.noise.to(z.dtype).T) + NOISE_FLOOR


class TokenBlock(nn.Module):
    """The token attention block: up relu(down x). It looks at one token; what it gives is added to x."""

    def __init__(self, dim: int, reduce_factor: int) -> None:
        super().__init__()
        width = max(1, dim // reduce_factor)
        self.down = nn.Linear(dim, width)
        self.up = nn.Linear(width, dim)

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Float[Tensor, "*tokens dim"]) -> Float[Tensor, "*tokens dim"]:
        y: Tensor = self.up(F.relu(self.down(x)))
        return y

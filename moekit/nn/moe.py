"""The DeepSeekMoE layer (arXiv 2401.06066, Eq. 9-11) = router + routed experts + shared experts."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moekit.config import MoEConfig
from moekit.nn.experts import Experts
from moekit.nn.ffn import SwiGLU
from moekit.nn.linear import Linear, untouched
from moekit.nn.router import HashRouter, Router, RouterContext
from moekit.ops import balance, dispatch
from moekit.ops.autocast import cast_once
from moekit.ops.balance import LoadSums
from moekit.ops.decode import Routed
from moekit.ops.experts import choose
from moekit.ops.quantize import Quantized
from moekit.ops.routing import Routing, limit_capacity


class MoEOutput(NamedTuple):
    y: Float[Tensor, "batch length dim"]
    routing: Routing


class MoE(nn.Module):
    """Shared experts see every token, with weight 1 or with that of their own gate; routed ones have their gate values.

    The residual connection is the block's. Dropless unless `capacity_factor` is set, and always at evaluation.
    """

    def __init__(self, config: MoEConfig, dim: int, vocab_size: int, layer: int) -> None:
        super().__init__()
        self.config = config
        self.router = HashRouter(config, vocab_size, layer) if config.topk_method == "hash" else Router(config, dim)
        self.experts = Experts(config.n_routed_experts, dim, config.moe_intermediate_size)
        self.shared_experts = SwiGLU(dim, config.shared_width) if config.n_shared_experts else None
        self.shared_expert_gate = Linear(dim, 1) if config.shared_expert_gate else None

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        context: RouterContext,
        low: Float[Tensor, "batch length dim"] | None = None,
    ) -> MoEOutput:
        """Returns the experts' sum. The router reads `x`, the experts `low`: x in autocast's dtype, made if None."""
        if context.probe is not None and (refused := context.probe.refusal(self.config)):
            raise refused
        tokens = x.flatten(0, 1)
        routing: Routing = self.router(tokens, context)
        if self.config.capacity_factor is not None and self.training:
            k, experts = routing.expert_ids.shape[1], self.config.n_routed_experts
            # a tensor: padding takes no capacity, and asking the device for the number of real tokens would wait for it
            capacity = (self.config.capacity_factor * k * routing.units.sum().double() / experts).ceil()
            routing = limit_capacity(routing, capacity, self.config.drop_policy)
        tokens = cast_once(tokens) if low is None else low.flatten(0, 1)
        plan = dispatch.plan(routing.expert_ids, self.config.n_routed_experts)
        shared = None
        if self.shared_experts is not None and (context.probe is None or context.probe.shared):
            shared = self.shared_experts(tokens)
            if self.shared_expert_gate is not None:
                shared = self.shared_expert_gate(tokens).sigmoid() * shared
        y = self.experts(tokens, plan.tokens_per_expert, plan=plan, weights=routing.weights, plus=shared)
        return MoEOutput(y.view(x.shape), routing)

    def in_one(
        self, x: Float[Tensor, "batch length dim"], context: RouterContext
    ) -> tuple[Sequence[Tensor | Quantized], Routed] | None:
        """Returns the shared and the routed experts for one call of the compiled kernels, if they may compute these
        tokens: as `Router` chooses without groups, padding and probes, and nobody looks in between."""
        router, shared, experts = self.router, self.shared_experts, self.experts
        if context.probe is not None or context.mask is not None or self.shared_expert_gate is not None:
            return None
        if self.training and self.config.capacity_factor is not None:
            return None
        if (
            not isinstance(router, Router)
            or router.config.n_group != 1
            or router.weight.dtype not in (torch.float32, torch.bfloat16)
        ):
            return None
        if not untouched(Router, router) or not untouched(Experts, experts):
            return None
        weights: Sequence[Tensor | Quantized] = ()
        if shared is not None and not (untouched(SwiGLU, shared) and (weights := shared.in_one(x))):
            return None
        routed, native = self.routed, choose(experts.backend, x, *experts.stacked) == "native"
        return (weights, routed) if native and routed.fit(x.shape[-1]) else None

    @property
    def routed(self) -> Routed:
        """The routed experts and what chooses them, as the compiled kernels take both; of a `Router` only."""
        router = self.router
        assert isinstance(router, Router)
        config = router.config
        return Routed(
            *self.experts.stacked,
            router.weight,
            router.expert_bias,
            config.num_experts_per_tok,
            config.n_group,
            config.topk_group,
            group_best=2 if config.topk_method == "noaux_tc" else 1,
            sigmoid=config.scoring_func == "sigmoid",
            normalise=config.norm_topk_prob,
            scale=config.routed_scaling_factor,
        )

    def balance_losses(self, routing: Routing, prior: LoadSums | None) -> dict[str, Float[Tensor, ""]]:
        """Returns each balance loss that has a factor, times its factor. `prior` is used by `global_aux` only."""
        config, losses = self.config, {}
        if config.aux_loss_alpha or config.device_aux_loss_alpha or config.comm_aux_loss_alpha:
            measured = balance.measure(routing, config.seq_aux, prior if config.global_aux else None)
            if config.aux_loss_alpha:
                losses["expert_balance"] = config.aux_loss_alpha * balance.expert_loss(measured)
            if config.device_aux_loss_alpha:
                losses["device_balance"] = config.device_aux_loss_alpha * balance.device_loss(measured, config.n_group)
            if config.comm_aux_loss_alpha:
                loss = balance.communication_loss(measured, config.topk_group)
                losses["communication_balance"] = config.comm_aux_loss_alpha * loss
        if config.z_loss_alpha:
            losses["router_z"] = config.z_loss_alpha * balance.z_loss(routing)
        return losses

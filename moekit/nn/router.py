"""The router: the experts' centroids, or a hash table, and the selection bias."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moekit.config import MoEConfig
from moekit.errors import ConfigError
from moekit.ops import routing
from moekit.ops.autocast import autocast_off
from moekit.ops.routing import Routing


class RouterContext(NamedTuple):
    """What a router may look at beside x. A method that needs more (documents, earlier logits) adds a field here."""

    token_ids: Int[Tensor, " tokens"]
    sequences: int
    """Equal, contiguous sequences that the tokens form."""
    mask: Bool[Tensor, " tokens"] | None = None
    """True for real tokens; None: there is no padding."""


class Router(nn.Module):
    """A bias-free linear map to the experts' affinities (DeepSeekMoE, Eq. 10-11), computed in float32."""

    def __init__(self, config: MoEConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, dim))
        self.expert_bias: Tensor | None
        bias = torch.zeros(config.n_routed_experts, dtype=torch.float32)
        self.register_buffer("expert_bias", bias if config.topk_method == "noaux_tc" else None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        """Moves as any module does, but `model.to(dtype)` leaves the bias in float32: bf16 would round its steps."""
        bias = self.expert_bias
        super()._apply(fn, recurse)
        if bias is not None and self.expert_bias is not None and self.expert_bias.dtype != bias.dtype:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def forward(self, x: Float[Tensor, "tokens dim"], context: RouterContext) -> Routing:
        config = self.config
        with autocast_off(x):
            x = x if x.dtype == torch.float64 else x.float()
            return routing.route(
                x @ self.weight.to(x.dtype).T,
                config.num_experts_per_tok,
                scoring_func=config.scoring_func,
                norm_topk_prob=config.norm_topk_prob,
                routed_scaling_factor=config.routed_scaling_factor,
                expert_bias=self.expert_bias,
                n_group=config.n_group,
                topk_group=config.topk_group,
                group_best=2 if config.topk_method == "noaux_tc" else 1,
                sequences=context.sequences,
                mask=context.mask,
            )


class HashRouter(nn.Module):
    """A fixed table from token id to experts (Hash Layers, arXiv 2106.04426), saved with the weights."""

    def __init__(self, config: MoEConfig, vocab_size: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer, self.ready = config, layer, False
        self.table: Tensor
        shape = (vocab_size, config.num_experts_per_tok)
        self.register_buffer("table", torch.full(shape, routing.DROPPED, dtype=torch.int64))

    def reset(self) -> None:
        """Fills a random table, another one for each layer; a balanced one waits for the tokens' counts."""
        if self.config.hash_method == "random":
            vocab, k = self.table.shape
            self.fill(routing.random_hash_table(vocab, self.config.n_routed_experts, k, self.layer))

    def fill(self, table: Int[Tensor, "vocab k"]) -> None:
        self.table.copy_(table)
        self.ready = not self.table.is_meta

    def forward(self, x: Float[Tensor, "tokens dim"], context: RouterContext) -> Routing:
        if not self.ready and bool((self.table == routing.DROPPED).any()):
            raise ConfigError("ffn.hash_method is balanced but no token counts were given; call balance_hash(counts)")
        self.ready = True
        config = self.config
        return routing.route_by_hash(
            context.token_ids,
            self.table,
            config.n_routed_experts,
            routed_scaling_factor=config.routed_scaling_factor,
            sequences=context.sequences,
            mask=context.mask,
            dtype=torch.float64 if x.dtype == torch.float64 else torch.float32,
        )

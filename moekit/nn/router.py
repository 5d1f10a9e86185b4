"""The router: the experts' centroids, or a hash table, and the selection bias."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from moekit.config import MoEConfig
from moekit.errors import ConfigError, MoekitError, UnsupportedError
from moekit.nn.cache import KVCache
from moekit.ops import routing
from moekit.ops.autocast import autocast_off
from moekit.ops.linear import linear
from moekit.ops.routing import Routing


class Probe(NamedTuple):
    """How a forward pass is to differ from what the model says: what would it be without these experts?

    Fractions of the experts and the paper's figures are `inspect.probes`'. The model itself stays as it is.
    """

    skip_top: int = 0
    """Experts taken from each token in each layer: those that it would choose first, selection bias included."""
    softmax_over_rest: bool = False
    """Affinities are a softmax over the experts that are left; else they are what they are without a probe."""
    num_experts_per_tok: int | None = None
    """Routed experts chosen per token; None: as many as the model says."""
    shared: bool = True
    """Whether the shared experts take part."""

    def refusal(self, config: MoEConfig) -> MoekitError | None:
        """Returns why a layer cannot be probed so, or None. Where it cannot, it must not be run."""
        experts, size = config.n_routed_experts, config.n_routed_experts // config.n_group
        skipped, chosen = self.skip_top, self.num_experts_per_tok
        k = config.num_experts_per_tok if chosen is None else chosen
        if not self.shared and not config.n_shared_experts:
            return ConfigError("probe.shared is false but n_shared_experts is 0: there is nothing to take away")
        if config.topk_method == "hash" and (skipped or chosen is not None or self.softmax_over_rest):
            return UnsupportedError("topk_method is hash: a table has no scores to take the highest or the next one of")
        if skipped < 0 or k < 1:
            return ConfigError(f"probe.skip_top is {skipped} and num_experts_per_tok {k}; allowed from 0 and from 1 on")
        if k > (left := size * config.topk_group - skipped):
            of = f"the {experts} routed experts"
            if config.topk_group < config.n_group:
                of = f"the {size * config.topk_group} routed experts of topk_group {config.topk_group}"
            return ConfigError(f"num_experts_per_tok is {k} but {left} of {of} are left; probe.skip_top is {skipped}")
        if self.softmax_over_rest and (not skipped or config.norm_topk_prob or config.scoring_func != "softmax"):
            needed = "skip_top above 0, norm_topk_prob false and scoring_func softmax"
            return ConfigError(f"probe.softmax_over_rest is true but takes effect only with {needed}")
        return None


class RouterContext(NamedTuple):
    """What a router may look at beside x. A method that needs more (documents, earlier logits) adds a field here."""

    token_ids: Int[Tensor, " tokens"]
    sequences: int
    """Equal, contiguous sequences that the tokens form."""
    mask: Bool[Tensor, " tokens"] | None = None
    """True for real tokens; None: there is no padding."""
    probe: Probe | None = None
    """None: the layer as it is."""
    cache: KVCache | None = None
    """What generation keeps of these sequences; a layer may keep its routing there (`KVCache.routing`)."""
    task: tuple[Float[Tensor, "batch description size"], Bool[Tensor, "batch description"]] | None = None
    """Each sequence's task description, embedded, and true where it is not padding."""


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
        config, probe = self.config, context.probe or Probe()
        k = config.num_experts_per_tok if probe.num_experts_per_tok is None else probe.num_experts_per_tok
        with autocast_off(x):
            x = x if x.dtype == torch.float64 else x.float()
            return routing.route(
                linear(x, self.weight.to(x.dtype)),
                k,
                scoring_func=config.scoring_func,
                norm_topk_prob=config.norm_topk_prob,
                routed_scaling_factor=config.routed_scaling_factor,
                expert_bias=self.expert_bias,
                n_group=config.n_group,
                topk_group=config.topk_group,
                group_best=2 if config.topk_method == "noaux_tc" else 1,
                sequences=context.sequences,
                mask=context.mask,
                skip_top=probe.skip_top,
                softmax_over_rest=probe.softmax_over_rest,
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

"""Multi-head and grouped-query attention."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moekit.config import MHAConfig
from moekit.nn.cache import KVCache
from moekit.nn.linear import Linear, together, whole
from moekit.nn.norm import RMSNorm
from moekit.nn.rope import Rotation, rotate, softmax_scale
from moekit.ops.attention import Seen, attend
from moekit.ops.autocast import cast_once
from moekit.ops.layer import Attending, Heads, attention_layer


class Context(NamedTuple):
    """What every block of one forward pass shares."""

    rotation: Rotation
    positions: Int[Tensor, "batch length"]
    seen: Seen
    cache: KVCache | None

    @property
    def begins(self) -> bool:
        """Whether these are the first tokens of all sequences, which see nothing but each other."""
        return self.cache is None or self.cache.longest == 0

    def buffer(self, layer: int) -> Float[Tensor, "batch keys width"] | None:
        """Returns what the cache keeps of a layer, if there is one."""
        return None if self.cache is None else self.cache.layer(layer)


class Attention(nn.Module):
    """Multi-head attention, half-split rotary embedding; grouped-query with fewer kv heads.

    Queries and keys may be normalised before they turn: each head (Qwen3, arXiv 2505.09388), or all heads as one vector
    (OLMoE, arXiv 2409.02060).
    """

    def __init__(self, config: MHAConfig, dim: int, layer: int, eps: float) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        biased = config.attention_bias != "none"
        self.q_proj = Linear(dim, heads * head_dim, biased)
        self.k_proj = Linear(dim, kv_heads * head_dim, biased)
        self.v_proj = Linear(dim, kv_heads * head_dim, biased)
        self.o_proj = Linear(heads * head_dim, dim, config.attention_bias == "all")
        if config.qk_norm != "none":
            each = config.qk_norm == "head"
            self.q_norm = RMSNorm(head_dim if each else heads * head_dim, eps)
            self.k_norm = RMSNorm(head_dim if each else kv_heads * head_dim, eps)
        self.scale = softmax_scale(config.rope, head_dim)
        self.heads = Heads(dim, heads, kv_heads, head_dim, head_dim, head_dim, rank=0, q_rank=0)

    def in_one(self, x: Float[Tensor, "batch length dim"], context: Context) -> Attending | None:
        """Returns this layer as one call of the compiled kernels, if they may compute it for these tokens."""
        if self.config.qk_norm != "none" or not context.begins:
            return None
        maps = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        cache, seen = context.buffer(self.layer), context.seen
        if not (weights := whole(x, *maps, seen=seen, cache=cache)) or not self.heads.fit(weights, x.shape[-1]):
            return None
        how = context.rotation, seen.document_ids, seen.causal, self.scale, 0.0, cache
        return Attending((*weights, None), (None, None), self.heads, *how)

    def forward(self, x: Float[Tensor, "batch length dim"], context: Context) -> Float[Tensor, "batch length dim"]:
        x, norm = cast_once(x), self.config.qk_norm
        if layer := self.in_one(x, context):
            return attention_layer(x, layer)
        split = (-1, self.config.head_dim)
        q, k, v = together(x, self.q_proj, self.k_proj, self.v_proj)
        if norm == "full":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.unflatten(-1, split) for part in (q, k, v))
        if norm == "head":
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate(part, context.rotation, interleaved=False) for part in (q, k))
        if context.cache is not None:
            new = torch.cat((k, v), dim=2).flatten(2)
            kept = context.cache.extend(self.layer, new, context.positions).to(q.dtype).unflatten(-1, split)
            k, v = kept.chunk(2, dim=2)
        y: Tensor = self.o_proj(attend(q, k, v, context.seen, self.scale).flatten(2))
        return y

"""Multi-head and grouped-query attention."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from moekit.config import MHAConfig
from moekit.nn.cache import KVCache
from moekit.nn.linear import Linear
from moekit.nn.rope import Rotation, rotate, softmax_scale
from moekit.ops.attention import Seen, attend
from moekit.ops.autocast import cast_once


class Context(NamedTuple):
    """What every block of one forward pass shares."""

    rotation: Rotation
    positions: Int[Tensor, "batch length"]
    seen: Seen
    cache: KVCache | None


class Attention(nn.Module):
    """Multi-head attention without biases, half-split rotary embedding; grouped-query with fewer kv heads."""

    def __init__(self, config: MHAConfig, dim: int, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = Linear(dim, heads * head_dim)
        self.k_proj = Linear(dim, kv_heads * head_dim)
        self.v_proj = Linear(dim, kv_heads * head_dim)
        self.o_proj = Linear(heads * head_dim, dim)
        self.scale = softmax_scale(config.rope, head_dim)

    def forward(self, x: Float[Tensor, "batch length dim"], context: Context) -> Float[Tensor, "batch length dim"]:
        x = cast_once(x)
        split = (-1, self.config.head_dim)
        q = rotate(self.q_proj(x).unflatten(-1, split), context.rotation, interleaved=False)
        k = rotate(self.k_proj(x).unflatten(-1, split), context.rotation, interleaved=False)
        v = self.v_proj(x).unflatten(-1, split)
        if context.cache is not None:
            new = torch.cat((k, v), dim=2).flatten(2)
            kept = context.cache.extend(self.layer, new, context.positions).to(q.dtype).unflatten(-1, split)
            k, v = kept.chunk(2, dim=2)
        y: Tensor = self.o_proj(attend(q, k, v, context.seen, self.scale).flatten(2))
        return y

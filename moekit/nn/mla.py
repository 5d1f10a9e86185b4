"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, Eq. 9-19)."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moekit.config import MLAConfig
from moekit.nn.attention import Context
from moekit.nn.linear import Linear, together, untouched, whole
from moekit.nn.norm import RMSNorm
from moekit.nn.rope import rotate, softmax_scale
from moekit.ops.attention import attend
from moekit.ops.autocast import cast_once
from moekit.ops.layer import Attending, Heads, attention_layer

MOST_EXPANDED = 1 << 26
"""Keys and values of earlier tokens that are expanded at once: 128 MiB in bfloat16."""


class MLA(nn.Module):
    """Attention whose keys and values are rebuilt from one small latent per token; interleaved rotary pairing.

    A cache keeps only the latent and the shared rotated key. For a few new tokens the up-projections are absorbed into
    query and output (section 2.1.2), so attention runs on the latent itself; for many, keys and values are expanded.
    """

    def __init__(self, config: MLAConfig, dim: int, layer: int, eps: float) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        heads, qk_dim = config.num_attention_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
        biased, eps = config.attention_bias, config.latent_norm_eps or eps
        if config.q_lora_rank is None:
            self.q_proj = Linear(dim, heads * qk_dim)
        else:
            self.q_a_proj = Linear(dim, config.q_lora_rank, biased)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, eps)
            self.q_b_proj = Linear(config.q_lora_rank, heads * qk_dim)
        self.kv_a_proj_with_mqa = Linear(dim, config.kv_lora_rank + config.qk_rope_head_dim, biased)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, eps)
        up = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_b_proj = Linear(config.kv_lora_rank, up)
        self.o_proj = Linear(heads * config.v_head_dim, dim, biased)
        self.scale = softmax_scale(config.rope, qk_dim)
        rope, rank, q_rank = config.qk_rope_head_dim, config.kv_lora_rank, config.q_lora_rank or 0
        self.heads = Heads(dim, heads, heads, qk_dim, config.v_head_dim, rope, rank, q_rank)

    def in_one(self, x: Float[Tensor, "batch length dim"], context: Context) -> Attending | None:
        """Returns this layer as one call of the compiled kernels, if they may compute it for these tokens."""
        if not context.begins:
            return None
        compressed, cache, seen = self.config.q_lora_rank is not None, context.buffer(self.layer), context.seen
        norms = [self.kv_a_layernorm, *([self.q_a_layernorm] if compressed else [])]
        maps = [self.q_b_proj if compressed else self.q_proj, self.kv_a_proj_with_mqa, self.kv_b_proj, self.o_proj]
        maps += [self.q_a_proj] if compressed else []
        if not untouched(RMSNorm, *norms) or len({norm.eps for norm in norms}) > 1:
            return None
        if [len(norm.weight) for norm in norms] != [self.heads.rank, self.heads.q_rank][: len(norms)]:
            return None
        if not (weights := whole(x, *maps, seen=seen, cache=cache)) or not self.heads.fit(weights, x.shape[-1]):
            return None
        more = [None] * (not compressed)
        how = context.rotation, seen.document_ids, seen.causal, self.scale, self.kv_a_layernorm.eps, cache
        return Attending((*weights, *more), (*(norm.weight for norm in norms), *more), self.heads, *how)

    def forward(self, x: Float[Tensor, "batch length dim"], context: Context) -> Float[Tensor, "batch length dim"]:
        config, x = self.config, cast_once(x)
        compressed = config.q_lora_rank is not None
        if layer := self.in_one(x, context):
            return attention_layer(x, layer)
        q, latent = together(x, self.q_a_proj if compressed else self.q_proj, self.kv_a_proj_with_mqa)
        if compressed:
            q = self.q_b_proj(self.q_a_layernorm(q))
        q = q.unflatten(-1, (config.num_attention_heads, -1))
        q_nope, q_rope = q.split((config.qk_nope_head_dim, config.qk_rope_head_dim), dim=-1)
        q_rope = rotate(q_rope, context.rotation, interleaved=True)
        latent, k_rope = latent.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
        latent = self.kv_a_layernorm(latent)
        k_rope = rotate(k_rope.unsqueeze(2), context.rotation, interleaved=True)
        if context.cache is not None:
            new = torch.cat((latent, k_rope.squeeze(2).to(latent.dtype)), dim=-1)
            kept = context.cache.extend(self.layer, new, context.positions).to(q.dtype)
            latent, k_rope = kept.split((config.kv_lora_rank, config.qk_rope_head_dim), dim=-1)
            k_rope = k_rope.unsqueeze(2)
        # absorbed is its weight alone
        may_absorb = context.cache is not None and untouched(Linear, self.kv_b_proj) and self.kv_b_proj.bias is None
        if not may_absorb or self._expands(len(x), latent.shape[1], x.shape[1]):
            kv = self.kv_b_proj(latent).unflatten(-1, (config.num_attention_heads, -1))
            k_nope, v = kv.split((config.qk_nope_head_dim, config.v_head_dim), dim=-1)
            k = torch.cat((k_nope, k_rope.expand(-1, -1, config.num_attention_heads, -1)), dim=-1)
            y = attend(torch.cat((q_nope, q_rope), dim=-1), k, v, context.seen, self.scale)
        else:
            kept = kept.unsqueeze(2)
            up = self.kv_b_proj.weight.to(q.dtype).unflatten(0, (config.num_attention_heads, -1))
            k_up, v_up = up.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)
            q_latent = torch.einsum("blhn,hnc->blhc", q_nope, k_up)
            y = attend(
                torch.cat((q_latent, q_rope), dim=-1), kept, kept[..., : config.kv_lora_rank], context.seen, self.scale
            )
            y = torch.einsum("blhc,hvc->blhv", y, v_up)
        out: Tensor = self.o_proj(y.flatten(2))
        return out

    def _expands(self, batch: int, keys: int, length: int) -> bool:
        """Returns whether `length` new tokens cost fewer operations with keys and values expanded than absorbed, and
        no more than MOST_EXPANDED numbers are made of earlier ones."""
        rank, made = self.config.kv_lora_rank, self.config.qk_nope_head_dim + self.config.v_head_dim
        if batch * (keys - length) * self.config.num_attention_heads * made > MOST_EXPANDED:
            return False
        return (keys - length) * rank * made < length * keys * (2 * rank - made)  # for a head

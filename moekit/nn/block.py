"""A block of a language model, module by module or in one call of the compiled kernels."""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moekit.config import DenseConfig, MHAConfig, ModelConfig, MoEConfig, Variant
from moekit.nn.attention import Attention, Context
from moekit.nn.ffn import MLP, SwiGLU
from moekit.nn.linear import may_be_ours, untouched
from moekit.nn.mla import MLA
from moekit.nn.moe import MoE
from moekit.nn.norm import RMSNorm
from moekit.nn.router import RouterContext
from moekit.nn.variants import build
from moekit.nn.variants.layer import VariantLayer
from moekit.ops.autocast import as_cast, cast_once
from moekit.ops.layer import Whole, learning_block, whole_blocks
from moekit.ops.norm import Normed
from moekit.ops.quantize import Quantized
from moekit.ops.routing import Routing, of_routes


class Block(nn.Module):
    """Pre-norm: x + attention(norm x), then x + ffn(norm x)."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        dim, eps, ffn = config.hidden_size, config.rms_norm_eps, config.ffn
        self.input_layernorm = RMSNorm(dim, eps)
        if isinstance(config.attention, MHAConfig):
            self.self_attn: nn.Module = Attention(config.attention, dim, layer, eps)
        else:
            self.self_attn = MLA(config.attention, dim, layer, eps)
        self.post_attention_layernorm = RMSNorm(dim, eps)
        self.mlp: nn.Module
        if isinstance(ffn, Variant):
            self.mlp = build(ffn, dim, layer)
        elif isinstance(ffn, MoEConfig) and config.is_moe(layer):
            self.mlp = MoE(ffn, dim, config.vocab_size, layer)
        else:
            width = ffn.intermediate_size
            assert width is not None  # the configuration has checked it
            gelu = isinstance(ffn, DenseConfig) and ffn.hidden_act == "gelu"
            self.mlp = MLP(dim, width) if gelu else SwiGLU(dim, width)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        delta: Float[Tensor, "batch length dim"] | None,
        context: Context,
        units: RouterContext,
    ) -> tuple[Float[Tensor, "batch length dim"], Float[Tensor, "batch length dim"], tuple[Routing, ...]]:
        """Returns two parts of the residual stream, x and what is to be added to it, as it takes them: the next norm
        adds them while it reads them."""
        if (found := self._in_one(x, delta, context, units)) is not None:
            return found
        x, _, normed = add(self.input_layernorm, x, delta)
        attended = self.self_attn(normed, context)
        if isinstance(self.mlp, VariantLayer):
            x = x + attended
            return x, *self.mlp(self.post_attention_layernorm(x), units)
        routes = isinstance(self.mlp, MoE)
        x, exact, normed = add(self.post_attention_layernorm, x, attended, exact=routes)
        if routes:
            y, routing = self.mlp(exact, units, normed)
            return x, y, (routing,)
        return x, self.mlp(normed), ()

    def _in_one(
        self, x: Tensor, delta: Tensor | None, context: Context, units: RouterContext
    ) -> tuple[Tensor, Tensor, tuple[Routing, ...]] | None:
        """Returns what `forward` does, from one call of the compiled kernels, if they may compute it."""
        if not may_be_ours(x):
            return None
        low = as_cast(x)
        if (delta is not None and delta.dtype != low.dtype) or (block := self.whole(x, low, context, units)) is None:
            return None
        if not torch.is_grad_enabled():
            x, y, (routes,) = whole_blocks(x, delta, [block], low.dtype)
        elif block.learns():
            x, y, routes = learning_block(x, delta, block, low.dtype)
        else:
            return None
        return x, y, () if routes is None else (of_routes(routes),)

    def whole(self, x: Tensor, low: Tensor, context: Context, units: RouterContext) -> Whole | None:
        """Returns this block as the compiled kernels take it, if they may compute it for a stream like x with products
        of rows like `low` (`as_cast`), and nobody looks at what lies between. Whether a way back is possible too is not
        asked."""
        norms, attention, mlp = (self.input_layernorm, self.post_attention_layernorm), self.self_attn, self.mlp
        if x.dtype not in (torch.float32, torch.bfloat16) or low.dtype not in (x.dtype, torch.bfloat16):
            return None
        if not untouched(RMSNorm, *norms) or norms[0].eps != norms[1].eps:
            return None
        if any(norm.weight.shape != x.shape[-1:] for norm in norms):
            return None
        if not isinstance(attention, Attention | MLA) or type(attention) not in (Attention, MLA):
            return None
        if not all(untouched(type(module), module) for module in (attention, mlp)):
            return None
        if (layer := attention.in_one(low, context)) is None:
            return None
        ffn: Sequence[Tensor | Quantized] = ()
        routed = None
        if type(mlp) is MoE:
            if (found := mlp.in_one(low, units)) is None:
                return None
            ffn, routed = found
        elif type(mlp) is not SwiGLU or not (ffn := mlp.in_one(low)):
            return None
        made = Whole((norms[0].weight, norms[1].weight), norms[0].eps, layer, ffn, routed)
        return made if made.readable() else None


def at_once(
    layers: Iterable[nn.Module], x: Tensor, context: Context, units: RouterContext
) -> tuple[Tensor, Tensor, list[tuple[Routing, ...]]] | None:
    """Returns what all blocks make of x, and their routing, in one call, if no gradient is wanted and each may be
    computed so (`Block.whole`)."""
    if torch.is_grad_enabled() or not may_be_ours(x):
        return None
    low = as_cast(x)
    blocks: list[Whole] = []
    for block in layers:
        if not untouched(Block, block) or not isinstance(block, Block):
            return None
        if (whole := block.whole(x, low, context, units)) is None:
            return None
        blocks.append(whole)
    if not blocks:
        return None
    x, y, chosen = whole_blocks(x, None, blocks, low.dtype)
    return x, y, [() if routes is None else (of_routes(routes),) for routes in chosen]


def add(norm: nn.Module, x: Tensor, delta: Tensor | None, exact: bool = False) -> Normed:
    """Returns x + delta with its norm in one pass, unless somebody has hooked, wrapped or replaced the norm."""
    if type(norm) is RMSNorm and untouched(RMSNorm, norm):
        return norm.add(x, delta, exact)
    stream = x if delta is None else x + delta
    y = norm(stream)
    return Normed(stream, y, cast_once(y))

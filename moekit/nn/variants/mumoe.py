"""muMoE, the multilinear mixture of experts (arXiv 2402.12550).

Two linear maps with GELU between them; each is a sum of N experts' matrices, weighted token by token by one gate that
both share, so the layer is a feed-forward network merged for each token. The matrices exist as CP or tensor-ring
factors only, so that thousands of experts cost what a dense layer does. The formulas are in `ops.factorised` and
`ops.entmax`; what differs from the paper is on the page docs/mumoe.md.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from moekit.config import MuMoEConfig
from moekit.nn.router import RouterContext
from moekit.nn.variants.layer import VariantLayer, VariantOutput
from moekit.ops.autocast import autocast_off, cast_once
from moekit.ops.entmax import entmax15
from moekit.ops.factorised import cp_linear, cp_materialise, tr_linear, tr_materialise

EPS = 1e-5
"""Of the gate's norms: at the start all logits are equal, and it alone keeps the gradient finite."""
SECOND_STD = 0.1


class MuMoE(VariantLayer):
    """down gelu(up x), both maps mixed from factorised experts by the token's gate."""

    def __init__(self, config: MuMoEConfig, dim: int) -> None:
        super().__init__()
        self.config, width, rank = config, config.intermediate_size, config.matched_rank(dim)
        self.router = nn.ParameterList(torch.empty(n, dim) for n in config.levels)
        batch = config.gate_norm == "batch"
        self.statistics = nn.ModuleList(Statistics(n) for n in config.levels) if batch else None
        shapes = {"up_proj": (dim, width), "down_proj": (width, dim)}
        self.experts = nn.ModuleDict({name: Factorised(config, *shape, rank) for name, shape in shapes.items()})

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws factors as the paper's code does, and a gate of zeros: all experts have the same weight at first."""
        for weight in self.router:
            weight.zero_()
        for module in self.modules():
            if isinstance(module, Factorised | Statistics):
                module.reset()

    def gate(
        self, tokens: Float[Tensor, "tokens dim"], mask: Bool[Tensor, " tokens"] | None = None
    ) -> tuple[Float[Tensor, "tokens _"], ...]:
        """Returns the weights of the experts of each level, float32: entmax-1.5 of the normalised logits.

        The weight of an expert of two levels is a product: `ops.factorised.joint` has that of all.
        """
        with autocast_off(tokens):
            x = tokens if tokens.dtype == torch.float64 else tokens.float()
            logits = [x @ weight.to(x.dtype).T for weight in self.router]
            if self.statistics is None:
                logits = [F.layer_norm(one, one.shape[-1:], eps=EPS) for one in logits]
            else:
                logits = [norm(one, mask) for norm, one in zip(self.statistics, logits, strict=True)]
            return tuple(entmax15(one) for one in logits)

    def forward(self, x: Float[Tensor, "batch length dim"], context: RouterContext) -> VariantOutput:
        tokens = x.flatten(0, 1)
        gates = [cast_once(gate) for gate in self.gate(tokens, context.mask)]
        if self.config.input_norm:
            tokens = F.layer_norm(tokens, tokens.shape[-1:])
        hidden = F.gelu(self.experts["up_proj"](cast_once(tokens), gates))
        return VariantOutput(self.experts["down_proj"](hidden, gates).view(x.shape), ())


class Factorised(nn.Module):
    """The matrices and biases of all experts of one map, in factors; on disk each of them is a matrix."""

    def __init__(self, config: MuMoEConfig, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.ring = config.expert_rank if config.factorization == "tr" else None
        own, columns = (rank, rank) if self.ring is None else (self.ring**2, self.ring * rank)
        self.levels = nn.ParameterList(torch.empty(n, own) for n in config.levels)
        self.input = nn.Parameter(torch.empty(inputs + 1, columns))
        self.output = nn.Parameter(torch.empty(outputs, columns))

    @torch.no_grad()
    def reset(self) -> None:
        """Draws experts that are one linear map but for a factor 1 + noise on each component.

        Differs from the paper: its code has no noise in the second level. All experts of that level then get the same
        gradient, and so none reaches their gate: they stay equal for ever, but for rounding.
        """
        inputs, columns = len(self.input) - 1, self.output.shape[1]
        for number, level in enumerate(self.levels):
            level.normal_(1, SECOND_STD if number else 1)
            if self.ring is not None:
                level.mul_(torch.eye(self.ring, device=level.device, dtype=level.dtype).flatten())
        self.input.uniform_(-(inputs**-0.5), inputs**-0.5)
        self.output.uniform_(-(columns**-0.5), columns**-0.5)

    def forward(
        self, x: Float[Tensor, "tokens dim"], gates: Sequence[Float[Tensor, "tokens _"]]
    ) -> Float[Tensor, "tokens out"]:
        if self.ring is None:
            return cp_linear(x, gates, list(self.levels), self.input, self.output)
        return tr_linear(x, gates, *self._cores())

    def materialise(self) -> Float[Tensor, "experts out columns"]:
        """Returns every expert's matrix with its bias as the last column; it may be large."""
        if self.ring is None:
            return cp_materialise(list(self.levels), self.input, self.output)
        return tr_materialise(*self._cores())

    def _cores(self) -> tuple[list[Tensor], Tensor, Tensor]:
        return (
            [level.unflatten(1, (self.ring, -1)) for level in self.levels],
            self.input.unflatten(1, (self.ring, -1)),
            self.output.unflatten(1, (self.ring, -1)),
        )


class Statistics(nn.Module):
    """BatchNorm without weights over the real tokens; at evaluation by the running mean and variance."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.mean: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(experts))
        self.register_buffer("variance", torch.ones(experts))

    def reset(self) -> None:
        self.mean.zero_()
        self.variance.fill_(1)

    def forward(
        self, logits: Float[Tensor, "tokens experts"], mask: Bool[Tensor, " tokens"] | None
    ) -> Float[Tensor, "tokens experts"]:
        mean, variance = self.mean, self.variance
        real = logits if mask is None else logits[mask]
        if self.training and len(real):
            variance, mean = torch.var_mean(real, 0, correction=0)
            if torch._C._current_graph_task_id() == -1:  # a backward pass that recomputes has counted these already
                unbiased = variance.detach() * len(real) / max(len(real) - 1, 1)
                self.mean.lerp_(mean.detach().to(self.mean.dtype), 0.1)
                self.variance.lerp_(unbiased.to(self.variance.dtype), 0.1)
        return (logits - mean) * (variance + EPS).rsqrt()

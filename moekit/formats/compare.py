"""How far two models are apart, on tokens and tensor by tensor, and how far they may be by precision."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moekit.config import ModelConfig
from moekit.errors import CheckpointError, ConfigError, DataError
from moekit.formats.tokenizer import Tokenizer
from moekit.formats.weights import Stored
from moekit.nn.model import Model
from moekit.ops.quantize import Quantized, dequantize
from moekit.ops.routing import Routing
from moekit.ops.scaled import unscaled

SEQUENCES, LENGTH, SEED = 4, 128, 0
BLOCK = 2**24
"""Numbers that are looked at together."""


class Bounds(NamedTuple):
    """What a precision may cost."""

    weights: float
    """Relative RMS error of any one tensor."""
    divergence: float
    """Mean KL divergence of the next token's distribution, nats."""
    agreement: float
    """Share of positions whose likeliest token stays."""
    routing: float
    """Share of tokens that any one layer sends to the same experts."""


BOUNDS: dict[str, Bounds] = {
    "float64": Bounds(0.0, 1e-6, 0.99, 0.99),
    "float32": Bounds(0.0, 1e-6, 0.99, 0.99),
    "float16": Bounds(2**-11, 0.02, 0.85, 0.7),
    "bfloat16": Bounds(2**-8, 0.02, 0.85, 0.7),
    "int8": Bounds(0.013, 0.02, 0.85, 0.7),
    "int4": Bounds(0.21, 0.2, 0.4, 0.1),
}
"""The finest first. Weights: what rounding to 11 or 8 bits costs; sqrt(32 / 12) / 127 and / 8, which is what it costs a
group of one large weight and little else (a Gaussian: 0.0054 and 0.086). Logits: the quickstart's models, MoE and
dense, on text and on random tokens, diverge by at most 3e-4, 7e-5 and 3e-3 (bfloat16, int8, int4) and keep 0.97, 0.99
and 0.91 of the tokens. The bounds also let the worst models pass that were found, random weights of which every token's
choice of experts is a near tie: 0.011, 0.013, 0.12. Routing: of a layer's tokens 0.94, 0.97 and 0.71 keep their experts
in the worst layer of the same models, 0.96, 0.92 and 0.32 in random weights.
"""


def check(name: str, value: float, sign: Literal["<=", ">="], bound: float, **more: Any) -> dict[str, Any]:
    """Returns a measured value with its bound and whether it held, JSON-ready: null for what is not a number."""
    held = value <= bound if sign == "<=" else value >= bound
    told = {"name": name, "value": value, "bound": f"{sign} {bound:g}", "held": held, **more}
    return {key: None if isinstance(one, float) and not math.isfinite(one) else one for key, one in told.items()}


def sample(config: ModelConfig, tokenizer: Tokenizer | None, text: str | None) -> Tensor:
    """Returns at most SEQUENCES rows of LENGTH tokens: the text's first, or random ones, always the same."""
    length = min(LENGTH, config.max_position_embeddings)
    if text is None:
        draw = torch.Generator().manual_seed(SEED)
        return torch.randint(config.vocab_size, (SEQUENCES, length), generator=draw)
    if tokenizer is None:
        raise ConfigError(
            "--text needs a tokenizer and the source has no tokenizer.json; leave it out for random tokens"
        )
    ids = tokenizer.encode(text)[: SEQUENCES * length]
    if not ids:
        raise DataError("the text to compare on is empty")
    if (highest := max(ids)) >= config.vocab_size:
        raise CheckpointError(f"the tokenizer gives the id {highest} but the model's vocab_size is {config.vocab_size}")
    length = min(length, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)


def logits_checks(bounds: Bounds, before: Tensor, after: Tensor) -> list[dict[str, Any]]:
    """Returns how far the distribution of the next token has moved, and how often its likeliest one is another."""
    p, q = before.double().log_softmax(-1), after.double().log_softmax(-1)
    divergence = float((p.exp() * (p - q)).sum(-1).mean().clamp(min=0))
    agreement = float((p.argmax(-1) == q.argmax(-1)).double().mean())
    centred = before.double() - before.double().mean(-1, keepdim=True)
    difference = after.double() - before.double()
    moved = {
        "logits_rms": float((difference - difference.mean(-1, keepdim=True)).norm() / centred.norm()),
        "logits_max": float(difference.abs().max()),
    }
    return [
        check("mean KL divergence of the next token, nats", divergence, "<=", bounds.divergence, **moved),
        check("positions with the same likeliest token", agreement, ">=", bounds.agreement),
    ]


def routing_check(bounds: Bounds, before: Sequence[Routing], after: Sequence[Routing]) -> dict[str, Any]:
    """Returns the layer that sends most tokens elsewhere: the share whose experts are the same set."""
    same = [
        float((one.expert_ids.sort(-1).values == other.expert_ids.sort(-1).values).all(-1).double().mean())
        for one, other in zip(before, after, strict=True)
    ]
    name = "tokens with the same experts, in the worst layer"
    return check(name, min(same), ">=", bounds.routing, by_layer=same)


def difference(one: Stored, other: Stored) -> float:
    """Returns the relative RMS difference of two matrices, whatever each is kept in."""
    wrong = whole = 0.0
    for a, b in zip(blocks(one), blocks(other), strict=True):
        exact = numbers(a)
        wrong += float(torch.linalg.vector_norm(numbers(b) - exact).double().square())
        whole += float(torch.linalg.vector_norm(exact).double().square())
    return (wrong / whole) ** 0.5 if wrong and whole else wrong


def blocks(matrix: Stored) -> Iterator[Tensor | Quantized]:
    """Yields a matrix by rows, BLOCK numbers or so at a time."""
    piece = unscaled(matrix)
    rows = max(1, BLOCK // max(1, math.prod(piece.shape[1:])))
    for begin in range(0, max(1, piece.shape[0]), rows):
        taken = slice(begin, begin + rows)
        yield piece.of(taken) if isinstance(piece, Quantized) else piece[taken]


def numbers(piece: Tensor | Quantized) -> Tensor:
    """Returns what a matrix stands for, in float32."""
    return dequantize(piece) if isinstance(piece, Quantized) else piece.float()


def kind(piece: Stored) -> str:
    """Returns what a matrix is kept in; of 8-bit floating point it is what its numbers are rounded to."""
    return piece.kind if isinstance(piece, Quantized) else str(piece.dtype).removeprefix("torch.")


def precision(model: Model) -> str:
    """Returns what a model's matrices are kept in."""
    return model.quantization or str(model.embed_tokens.weight.dtype).removeprefix("torch.")

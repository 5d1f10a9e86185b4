"""How alike the experts of a layer are: by their weights, by their outputs on real hidden states, by their router rows.

By weights there are two measures. The cosine of the weights as they stand sees copies (upcycled experts before they
part) and nothing else, because hidden units have no order: an expert with its units shuffled computes the same and has
a cosine of 0. The other one does not depend on their order: the Gram matrix of the weights over the residual stream
says from which directions an expert reads, or into which it writes, and how strongly. Two Gram matrices are compared by
the cosine of what is left of them without their mean (a multiple of the identity, which even random matrices share).
Chosen over matching hidden units one to one, which costs a product of all pairs of units for every pair of experts, and
over singular subspaces, which need a rank to be chosen and forget how strong a direction is.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moekit import pictures
from moekit.inspect.result import Analysis, percentiles, table
from moekit.inspect.text import Window, rows
from moekit.nn.experts import Experts
from moekit.nn.model import Model
from moekit.nn.router import Router
from moekit.ops.mapped import Mapped, Weights
from moekit.ops.quantize import Quantized, dequantize

TOKENS = 128
"""Hidden states that outputs are compared on, spread evenly over the sample."""
DIRECTIONS = 128
"""A wider residual stream is projected to as many random directions, always the same, before Gram matrices."""
BLOCK = 2**24
"""Numbers of a weight that are held in float32 at once."""
PAIRS = 6
"""Most alike pairs listed for a layer."""
MEASURES = {
    "outputs": "Outputs: mean cosine of what two experts add, on the same real hidden states",
    "weights": "Weights, hidden units in any order: cosine of the directions read and written",
    "router": "Router rows: cosine; alike rows are chosen by alike tokens",
    "weights_as_they_stand": "Weights as they stand: cosine; near 1 only for copies",
}


@torch.inference_mode()
def similarity(model: Model, sample: Sequence[Window]) -> Analysis:
    """Returns how alike the experts of each layer are, by four measures, all cosines."""
    inputs = hidden_states(model, sample)
    layers = list(model.config.moe_layers)
    found: dict[str, list[np.ndarray]] = {name: [] for name in MEASURES}
    for layer, x in zip(model.moe_layers, inputs, strict=True):
        plain, gram = by_weights(layer.experts)
        found["weights"].append(_numpy(gram))
        found["weights_as_they_stand"].append(_numpy(plain))
        found["outputs"].append(_numpy(by_outputs(layer.experts, x)))
        if isinstance(layer.router, Router):
            found["router"].append(_numpy(cosines(layer.router.weight.float())))
    measured = {name: np.stack(maps) for name, maps in found.items() if maps}
    experts = next(iter(measured.values())).shape[-1]
    first, second = np.triu_indices(experts, 1)
    pairs = {name: maps[:, first, second] for name, maps in measured.items()}
    summary = {}
    for name, values in pairs.items():
        empty = np.full(len(layers), np.nan)
        summary[f"{name}.mean"] = values.mean(1) if values.size else empty
        summary[f"{name}.highest"] = values.max(1) if values.size else empty
    order = np.argsort(-pairs["outputs"], axis=1, kind="stable")[:, :PAIRS]
    at, best = np.repeat(np.arange(len(layers)), order.shape[1]), order.ravel()
    alike = table(
        layer=np.array(layers)[at],
        first=first[best],
        second=second[best],
        **{name: values[at, best] for name, values in pairs.items()},
    )
    tables = {"layers": table(layer=layers, **summary), "percentiles": percentiles(summary), "pairs": alike}
    across = min(4 if len(layers) <= 8 else 7, max(len(layers), 2))
    shown = {}
    for name in ("outputs", "weights", "router"):
        if name in measured:
            maps = {f"layer {layer}": measured[name][number] for number, layer in enumerate(layers)}
            pair = ("expert", "expert")
            shown[MEASURES[name]] = pictures.tiles(name, maps, "cosine", across=across, names=pair, square=True)
    reading = (
        "A cell is a pair of experts; the diagonal is 1. Experts that do different things are pale off the diagonal; "
        "a pair near 1 by outputs is one expert twice, and a candidate for merging. Outputs are compared on "
        f"{min(TOKENS, len(inputs[0]))} hidden states of the text, whoever the router would have chosen for them."
    )
    return Analysis(
        "similarity", "How alike the experts are", reading, tables, shown, _findings(layers, pairs, first, second)
    )


@torch.inference_mode()
def hidden_states(model: Model, sample: Sequence[Window]) -> list[Float[Tensor, "tokens dim"]]:
    """Returns at most `TOKENS` real inputs of each MoE layer, spread evenly over the sample's tokens."""
    seen: dict[int, list[Tensor]] = {}
    device = model.embed_tokens.weight.device
    handles = [
        layer.register_forward_pre_hook(lambda module, args, at=at: seen.setdefault(at, []).append(args[0]))
        for at, layer in enumerate(model.moe_layers)
    ]
    picked: list[list[Tensor]] = [[] for _ in handles]
    total = sum(len(window.tokens) for window in sample)
    wanted = np.unique(np.linspace(0, total - 1, min(TOKENS, total)).astype(np.int64))
    done = 0
    try:
        for window in sample:
            here = torch.from_numpy(wanted[(wanted >= done) & (wanted < done + len(window.tokens))] - done).to(device)
            done += len(window.tokens)
            seen.clear()
            (batch,) = rows([window], 1, model.config.vocab_size)
            model(batch.input_ids.to(device), return_logits=False)
            for at, (x,) in seen.items():
                picked[at].append(x[0, here])
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(parts) for parts in picked]


def by_outputs(experts: Experts, x: Float[Tensor, "tokens dim"]) -> Float[Tensor, "experts experts"]:
    """Returns the mean over `x` of the cosine of two experts' outputs; 0 for a token that an expert answers with 0."""
    count = experts.stacked[0].shape[0]
    loads = torch.full((count,), len(x), device=x.device)
    y = experts(x.repeat(count, 1), loads).float().view(count, len(x), -1)
    y = torch.nn.functional.normalize(y, dim=-1).transpose(0, 1)
    found: Tensor = (y @ y.transpose(1, 2)).mean(0)
    return found


def by_weights(experts: Experts) -> tuple[Float[Tensor, "experts experts"], Float[Tensor, "experts experts"]]:
    """Returns the cosine of the weights as they stand, and that which does not depend on the hidden units' order."""
    gate_up, down = experts.stacked
    count, width, dim = gate_up.shape
    device = _device(down)
    basis = torch.eye(dim)
    if dim > DIRECTIONS:
        draw = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(dim, DIRECTIONS, generator=draw)).Q
    basis = basis.to(device)
    products = torch.zeros(count, count, device=device)
    reads = torch.zeros(count, basis.shape[1], basis.shape[1], device=device)
    written = torch.zeros(count, basis.shape[1], down.shape[2], device=device)
    step = max(1, BLOCK // (count * dim))
    for start in range(0, width, step):
        block = numbers(gate_up, start, start + step)
        products += block.flatten(1) @ block.flatten(1).T
        seen = block @ basis
        reads += seen.transpose(1, 2) @ seen
    step = max(1, BLOCK // (count * down.shape[2]))
    for start in range(0, dim, step):
        block = numbers(down, start, start + step)
        products += block.flatten(1) @ block.flatten(1).T
        written += basis[start : start + step].T @ block
    writes = written @ written.transpose(1, 2)
    lengths = products.diagonal().clamp(min=1e-30).sqrt()
    return products / lengths / lengths.unsqueeze(1), (_aligned(reads) + _aligned(writes)) / 2


def numbers(weights: Weights, start: int, stop: int) -> Float[Tensor, "experts rows width"]:
    """Returns the rows from `start` to `stop` of every expert's matrix in float32."""
    if isinstance(weights, Mapped):
        like = torch.empty((), dtype=torch.float32)
        return torch.cat([weights.of(expert, like)[:, start:stop] for expert in range(weights.shape[0])])
    part = (slice(None), slice(start, stop))
    return dequantize(weights.of(part)) if isinstance(weights, Quantized) else weights[part].float()


def cosines(x: Float[Tensor, "experts width"]) -> Float[Tensor, "experts experts"]:
    """Returns the cosine of every two rows; 0 for a row of zeros."""
    x = torch.nn.functional.normalize(x, dim=-1)
    return x @ x.T


def _aligned(grams: Float[Tensor, "experts width width"]) -> Float[Tensor, "experts experts"]:
    """Returns the cosines of the matrices without their mean, a multiple of the identity."""
    mean = grams.diagonal(dim1=1, dim2=2).mean(1)
    return cosines((grams - mean[:, None, None] * torch.eye(grams.shape[1], device=grams.device)).flatten(1))


def _device(weights: Weights) -> torch.device:
    if isinstance(weights, Mapped):
        return torch.device("cpu")
    return weights.codes.device if isinstance(weights, Quantized) else weights.device


def _findings(
    layers: list[int], pairs: dict[str, np.ndarray], first: np.ndarray, second: np.ndarray
) -> tuple[str, ...]:
    outputs = pairs["outputs"]
    if not outputs.size:
        return ()
    at, best = np.unravel_index(int(outputs.argmax()), outputs.shape)
    return (
        f"the most alike experts by output are {first[best]} and {second[best]} of layer {layers[at]}, with cosine "
        f"{outputs[at, best]:.2f}; the mean over all pairs is {outputs.mean():.2f}",
    )


def _numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(tensor.float().cpu().numpy())

"""Which kind of token, and which place in the window, each expert serves."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

from moekit import pictures
from moekit.inspect.collect import Stats
from moekit.inspect.result import Analysis, percentiles, table
from moekit.inspect.vocabulary import KINDS


def kinds(stats: Stats) -> Analysis:
    """Returns how often each expert is chosen by tokens of each kind: words, digits, line ends and so on."""
    counts = np.zeros((len(stats.layers), len(KINDS), stats.experts), dtype=np.int64)
    for kind in range(len(KINDS)):
        counts[:, kind] = stats.by_token[:, stats.slot_kinds == kind].sum(1)
    tokens = np.bincount(stats.slot_kinds, weights=stats.slot_tokens, minlength=len(KINDS)).astype(np.int64)
    seen = np.flatnonzero(tokens)
    names = [KINDS[kind] for kind in seen]
    caption = (
        "A row is a kind of token, a column an expert: how much more often the kind is in its work than in the text"
    )
    reading = (
        "The kind of a token is read off its spelling, once for each entry of the vocabulary. 1 is what an expert that "
        "does not look at the spelling would show. Experts of the first layers often go by the token itself, those of "
        "later layers less so."
    )
    return _analysis("kinds", "Which kind of token", caption, reading, stats, counts[:, seen], tokens[seen], names)


def positions(stats: Stats) -> Analysis:
    """Returns how often each expert is chosen at each distance from the window's first token, in powers of two."""
    length = stats.by_position.shape[1]
    edges = [0, 1, *(2**power for power in range(1, 40) if 2**power < length)]
    counts = np.add.reduceat(stats.by_position, edges, axis=1)
    ends = [*edges[1:], length]
    names = [f"{low}" if high == low + 1 else f"{low}-{high - 1}" for low, high in zip(edges, ends, strict=True)]
    tokens = counts[0].sum(-1) // max(stats.k, 1)
    seen = np.flatnonzero(tokens)
    caption = "A row is a range of positions, a column an expert: its share of the choices there over its share of all"
    reading = (
        "Position 0 is the first token of a window, where nothing stands before it to look at. Pale from top to bottom "
        "is an expert that does not care; colour in the first rows only is common, and is the start of the window, not "
        "of a text."
    )
    shown = [names[place] for place in seen]
    return _analysis("positions", "Which position", caption, reading, stats, counts[:, seen], tokens[seen], shown)


def lift(counts: Int[np.ndarray, "layers groups experts"]) -> Float[np.ndarray, "layers groups experts"]:
    """Returns p(expert | group) / p(expert) = p(group | expert) / p(group); 1 is no preference, NaN an idle expert."""
    total = counts.sum((1, 2), keepdims=True)
    expected = counts.sum(2, keepdims=True) * counts.sum(1, keepdims=True) / np.maximum(total, 1)
    return np.asarray(np.divide(counts, expected, out=np.full(counts.shape, np.nan), where=expected > 0))


def group_bits(counts: Int[np.ndarray, "layers groups experts"]) -> Float[np.ndarray, " layers"]:
    """Returns the mutual information of group and expert, in bits, groups counting as often as they come."""
    share = counts / np.maximum(counts.sum((1, 2), keepdims=True), 1)
    ratio = lift(counts)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.where(share > 0, share * np.log2(ratio), 0).sum((1, 2)))


def _analysis(
    name: str,
    title: str,
    caption: str,
    reading: str,
    stats: Stats,
    counts: np.ndarray,
    tokens: np.ndarray,
    names: Sequence[str],
) -> Analysis:
    layers, groups, experts = counts.shape
    ratio, bits = lift(counts), group_bits(counts)
    each = table(
        layer=np.repeat(stats.layers, groups * experts),
        group=np.tile(np.repeat(names, experts), layers),
        expert=np.tile(np.arange(experts), layers * groups),
        choices=counts.ravel(),
        lift=ratio.ravel(),
    )
    tables = {
        "layers": table(layer=stats.layers, bits=bits),
        "percentiles": percentiles({"bits": bits}),
        "text": table(group=names, tokens=tokens, share=tokens / max(int(tokens.sum()), 1)),
        "experts": each,
    }
    across = min(2 if layers <= 8 else 4, layers)
    maps = {f"layer {layer}, {bits[at]:.2f} bits": ratio[at] for at, layer in enumerate(stats.layers)}
    shown = pictures.tiles(f"experts by {name}", maps, "ratio", across=across, rows=names)
    at = int(bits.argmax())
    most = entropy_bits(tokens)
    word = {"kinds": "the kind of token", "positions": "the position"}[name]
    found = f"{word} tells most in layer {stats.layers[at]}: {bits[at]:.2f} of {most:.1f} bits"
    return Analysis(name, title, reading, tables, {caption: shown}, (found,))


def entropy_bits(counts: Int[np.ndarray, " groups"]) -> float:
    """Returns the entropy of counts, in bits: the most that anything can tell about the group."""
    share = counts[counts > 0] / max(int(counts.sum()), 1)
    return float(-(share * np.log2(share)).sum()) + 0.0

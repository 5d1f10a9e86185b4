"""Which experts are chosen together, more often than their loads explain."""

import numpy as np
from jaxtyping import Float, Int

from moekit import pictures
from moekit.inspect.collect import Stats
from moekit.inspect.result import Analysis, percentiles, table

FEWEST = 10.0
"""Times that a pair must be expected for its ratio to be believed."""
PAIRS = 12
"""Pairs listed for a layer, the most attracted first."""


def together(stats: Stats) -> Analysis:
    """Returns observed over expected counts of the pairs of experts that one token chose."""
    layers, experts = len(stats.layers), stats.experts
    title = "Who is chosen together"
    if stats.k < 2:
        return Analysis("together", title, "A token chooses one expert, so there are no pairs.", {}, {})
    expected = np.stack([expected_pairs(counts) for counts in stats.together])
    ratio = np.divide(stats.together, expected, out=np.full(expected.shape, np.nan), where=expected >= FEWEST)
    ratio[:, np.arange(experts), np.arange(experts)] = np.nan
    first, second = np.triu_indices(experts, 1)
    pairs = ratio[:, first, second]
    order = np.argsort(np.where(np.isnan(pairs), -1, pairs), axis=1)[:, ::-1][:, :PAIRS]
    at = np.repeat(np.arange(layers), order.shape[1])
    best = order.ravel()
    kept = ~np.isnan(pairs[at, best])
    at, best = at[kept], best[kept]
    strongest = table(
        layer=np.array(stats.layers)[at],
        first=first[best],
        second=second[best],
        tokens=stats.together[at, first[best], second[best]],
        expected=expected[at, first[best], second[best]],
        ratio=pairs[at, best],
    )
    known = ~np.isnan(pairs)
    with np.errstate(divide="ignore"):
        spread = [
            float(np.sqrt(np.mean(np.log2(np.maximum(p[o], 1 / 64)) ** 2))) if o.any() else np.nan
            for p, o in zip(pairs, known, strict=True)
        ]
    highest = [float(p[o].max()) if o.any() else np.nan for p, o in zip(pairs, known, strict=True)]
    never = ((stats.together[:, first, second] == 0) & (expected[:, first, second] >= FEWEST)).sum(1)
    measured = {"spread": np.array(spread), "highest": np.array(highest), "never": never}
    tables = {
        "layers": table(layer=stats.layers, **measured),
        "percentiles": percentiles(measured),
        "pairs": strongest,
    }
    # a pair that never met is as low as can be; grey is for what is not known
    maps = {
        f"layer {layer}": np.where(ratio[number] == 0, 1e-3, ratio[number]) for number, layer in enumerate(stats.layers)
    }
    across = min(4 if layers <= 8 else 7, max(layers, 2))
    names = ("expert", "expert")
    shown = pictures.tiles("pairs of experts", maps, "ratio", across=across, names=names, square=True)
    caption = "A cell is a pair of experts: tokens that chose both over what the loads alone would give; grey: too few"
    reading = (
        "1 is what independent choices of the same loads would give: the model of expected pairs keeps each expert's "
        "number of partners and allows no expert twice. High pairs work as one larger expert; pairs that never meet "
        f"stand in for each other. Pairs that are expected fewer than {FEWEST:.0f} times are left out. Spread is the "
        "root mean square of the ratios in powers of two."
    )
    found: tuple[str, ...] = ()
    if len(best):
        top = int(np.argmax(pairs[at, best]))
        found = (
            f"the closest pair is experts {first[best[top]]} and {second[best[top]]} of layer {stats.layers[at[top]]}, "
            f"chosen together {pairs[at[top], best[top]]:.1f} times as often as their loads explain",
        )
    return Analysis("together", title, reading, tables, {caption: shown}, found)


def expected_pairs(counts: Int[np.ndarray, "experts experts"]) -> Float[np.ndarray, "experts experts"]:
    """Returns the expected number of tokens for each pair if experts had no preference for each other; diagonal 0.

    E_ij = a_i a_j (i != j) with sum over j of E_ij = the observed number of partners of i: the quasi-independence
    model. A product of the loads would not do: no expert is chosen twice, so a busy one has to share out its tokens
    over the others.
    """
    observed = counts.astype(np.float64)
    np.fill_diagonal(observed, 0)
    partners = observed.sum(1)
    factors = partners / np.sqrt(max(partners.sum(), 1e-12))
    for _ in range(200):
        fitted = factors * (factors.sum() - factors)
        step = np.sqrt(np.divide(partners, fitted, out=np.zeros_like(fitted), where=fitted > 0))
        factors = factors * step
        if np.abs(step[partners > 0] - 1).max(initial=0) < 1e-9:
            break
    expected = np.outer(factors, factors)
    np.fill_diagonal(expected, 0)
    return np.asarray(expected)

"""The tokens that each expert takes most, by count and beyond chance, and where it gave its largest weights."""

from collections.abc import Callable, Sequence

import numpy as np

from moekit.inspect.collect import CONTEXT, Stats
from moekit.inspect.result import Analysis, Cell, Table, cell
from moekit.inspect.vocabulary import Vocabulary, shown

TOP = 8
"""Tokens named for an expert."""
FEWEST = 20
"""Occurrences below which a token is not called typical of an expert."""


def tokens(stats: Stats, vocabulary: Vocabulary, decode: Callable[[Sequence[int]], str]) -> Analysis:
    """Returns each expert's most frequent and most typical tokens, and contexts of its largest weights.

    Lift is p(expert | token) over p(expert); it is bounded from chance by a prior of `FEWEST` tokens that behave as
    the layer does, so that a rare token must be taken consistently to be typical.
    """
    told = np.flatnonzero((stats.slot_ids >= 0) & (stats.slot_tokens > 0))
    texts = [shown(vocabulary.texts[number]) for number in stats.slot_ids[told]]
    came = stats.slot_tokens[told].astype(np.float64)
    top, typical, contexts = (list[tuple[Cell, ...]]() for _ in range(3))
    total = max(int(stats.tokens.sum()), 1)
    for at, layer in enumerate(stats.layers):
        counts = stats.by_token[at, told].astype(np.float64)
        base = stats.load[at] / total  # p(a token chooses the expert)
        lifts = (counts + FEWEST * base) / np.maximum((came + FEWEST)[:, None] * base, 1e-12)
        lifts[(came < FEWEST)[:, None] | (counts == 0)] = 0
        for expert in range(stats.experts):
            for rows, order in ((top, counts[:, expert]), (typical, lifts[:, expert])):
                best = np.argsort(-order, kind="stable")[:TOP]
                rows += [
                    (
                        layer,
                        expert,
                        texts[slot],
                        int(counts[slot, expert]),
                        cell(float(counts[slot, expert] / came[slot])),
                        cell(float(lifts[slot, expert])) if lifts[slot, expert] else None,
                    )
                    for slot in best
                    if order[slot] > 0
                ]
            for weight, ids in zip(stats.example_weights[at, expert], stats.example_ids[at, expert], strict=True):
                if weight > 0:
                    # read as one text: a character may be spread over several tokens
                    parts = (ids[:CONTEXT], ids[CONTEXT : CONTEXT + 1], ids[CONTEXT + 1 :])
                    words = (decode(part[part >= 0].tolist()).strip("\ufffd") for part in parts)
                    contexts.append((layer, expert, cell(float(weight)), *words))
    columns = ("layer", "expert", "token", "choices", "share_of_token", "lift")
    tables = {
        "top": Table(columns, top),
        "typical": Table(columns, typical),
        "contexts": Table(("layer", "expert", "weight", "before", "token", "after"), contexts),
    }
    others = int(stats.slot_tokens[stats.slot_ids < 0].sum())
    reading = (
        "For each expert: the tokens that chose it most often, those that choose it far more often than tokens do on "
        "average (lift), and the places where it got its largest weights, at most one a window. An expert whose "
        "typical tokens have a theme is one that a person can name; many have none."
    )
    if others:
        reading += f" {others:,} tokens are of ids that came too late in the text to be counted one by one."
    return Analysis("tokens", "Which tokens each expert takes", reading, tables, {}, _findings(typical))


def _findings(typical: list[tuple[Cell, ...]]) -> tuple[str, ...]:
    """Returns the expert whose typical tokens choose it most beyond chance."""
    best: dict[tuple[Cell, Cell], list[tuple[Cell, ...]]] = {}
    for row in typical:
        best.setdefault((row[0], row[1]), []).append(row)
    full = {key: rows for key, rows in best.items() if len(rows) >= 4}
    if not full:
        return ()
    (layer, expert), rows = max(full.items(), key=lambda item: sorted(float(row[5] or 0) for row in item[1])[-4])
    words = ", ".join(f"“{row[2]}”" for row in rows[:4])
    return (f"expert {expert} of layer {layer} is the easiest to name: it takes {words}",)

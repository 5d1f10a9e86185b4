"""Which domain each expert serves, and how much of that is more than chance."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from moekit import pictures
from moekit.inspect.collect import Stats
from moekit.inspect.result import Analysis, percentiles, table

BUSY = 0.5
"""Of its fair share: an expert with less is too rarely chosen to be called a specialist."""


class Bits(NamedTuple):
    """Mutual information of domain and expert in each layer, in bits.

    `plain` is that of the counts, which chance makes too large; `corrected` is without that bias, `error` its standard
    error; both NaN where a domain has fewer than two windows.
    """

    plain: Float[np.ndarray, " layers"]
    corrected: Float[np.ndarray, " layers"]
    error: Float[np.ndarray, " layers"]


def domains(stats: Stats) -> Analysis:
    """Returns how each domain uses the experts; every domain counts the same, whatever its size."""
    counts = stats.by_domain.sum(2)
    share = shares(counts.transpose(1, 0, 2))
    of_expert = work(share)
    bits = domain_bits(stats.by_domain, stats.windows)
    favourite = of_expert.argmax(0)
    _, layers, experts = share.shape
    busy = share.mean(0) * experts >= BUSY
    each = table(
        layer=np.repeat(stats.layers, experts),
        expert=np.tile(np.arange(experts), layers),
        favourite=[
            stats.domains[number] if total else None
            for number, total in zip(favourite.ravel(), share.sum(0).ravel(), strict=True)
        ],
        share_of_its_work=of_expert.max(0).ravel(),
        load=(share.mean(0) * experts).ravel(),
        **{f"choices.{name}": counts[:, number].ravel() for number, name in enumerate(stats.domains)},
    )
    measured = {
        "bits": bits.corrected,
        "error": bits.error,
        "plain_bits": bits.plain,
        "specialists": ((of_expert.max(0) >= 0.5) & busy).sum(1),
    }
    text = table(domain=stats.domains, tokens=stats.tokens, windows=stats.windows)
    tables = {"layers": table(layer=stats.layers, **measured), "percentiles": percentiles(measured)}
    tables |= {"experts": each, "text": text}
    maps, order = {}, {}
    for at, layer in enumerate(stats.layers):
        title = f"layer {layer}" + (f", {bits.corrected[at]:.2f} bits" if np.isfinite(bits.corrected[at]) else "")
        order[title] = by_favourite(share[:, at])[0].tolist()
        maps[title] = share[:, at, order[title]] * experts
    across = min(2 if layers <= 8 else 4, layers)
    shown = pictures.tiles("experts by domain", maps, "ratio", across=across, rows=stats.domains, columns=order)
    caption = "A row is a domain, a column an expert: its share of the domain's choices over an equal share"
    reading = (
        "Experts with the same favourite domain stand together, the choosiest first. The mutual information says how "
        "much one choice of an expert tells about the domain of the text: 0 bits if domains use the experts alike, "
        f"{np.log2(max(len(stats.domains), 1)):.2f} bits here if every expert worked for one domain only. Counts of "
        "little text look specialised by chance; that bias is taken off by leaving out an eighth of the windows at a "
        "time (jackknife)."
    )
    findings = _findings(stats, bits, of_expert * busy)
    return Analysis("domains", "Which domain each expert serves", reading, tables, {caption: shown}, findings)


def shares(counts: Int[np.ndarray, "domains layers experts"]) -> Float[np.ndarray, "domains layers experts"]:
    """Returns p(expert | domain) in each layer; zeros where there is no choice."""
    return np.asarray(counts / np.maximum(counts.sum(-1, keepdims=True), 1))


def work(share: Float[np.ndarray, "domains layers experts"]) -> Float[np.ndarray, "domains layers experts"]:
    """Returns how much of an expert's work each domain is, if all domains were of the same size; 0 without a choice."""
    return np.asarray(share / np.maximum(share.sum(0), 1e-12))


def mutual_information(share: Float[np.ndarray, "domains layers experts"]) -> Float[np.ndarray, " layers"]:
    """Returns the mutual information of domain and expert in each layer, in bits, every domain counting the same.

    `share` is p(expert | domain): I = mean over domains of sum over experts of p(e|d) log2(p(e|d) / p(e)).
    """
    ratio = np.divide(share, share.mean(0), out=np.ones_like(share), where=share > 0)
    return np.asarray((share * np.log2(ratio)).sum(-1).mean(0))


def domain_bits(
    by_domain: Int[np.ndarray, "layers domains blocks experts"], windows: Int[np.ndarray, " domains"]
) -> Bits:
    """Returns the mutual information with its bias taken off by the jackknife over blocks of windows, and its error.

    I_corrected = g I - (g - 1) mean of I without block b, b = 1..g. Counts from few tokens make experts look
    specialised, by an amount that falls as 1 / tokens, which is what this removes. Whole windows are left out, not
    tokens, because the tokens of a window are not independent, so a formula that counts them would take off too little.
    """
    counts = by_domain.transpose(1, 0, 2, 3)  # (domains, layers, blocks, experts)
    plain = mutual_information(shares(counts.sum(2)))
    blocks = int(min(by_domain.shape[2], windows.min(initial=by_domain.shape[2])))
    if blocks < 2:
        unknown = np.full_like(plain, np.nan)
        return Bits(plain, unknown, unknown)
    groups = np.stack([counts[:, :, group::blocks].sum(2) for group in range(blocks)])
    without = np.stack([mutual_information(shares(counts.sum(2) - group)) for group in groups])
    mean = without.mean(0)
    error = np.sqrt((blocks - 1) / blocks * ((without - mean) ** 2).sum(0))
    return Bits(plain, np.maximum(blocks * plain - (blocks - 1) * mean, 0), error)


def by_favourite(share: Float[np.ndarray, "domains experts"]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the experts sorted by favourite domain, the choosiest first, and where each next group starts.

    Experts without a token come last.
    """
    total = share.sum(0)
    favourite = np.where(total > 0, share.argmax(0), len(share))
    order = np.lexsort((-share.max(0) / np.maximum(total, 1e-12), favourite))
    return order, np.flatnonzero(np.diff(favourite[order])) + 1


def _findings(stats: Stats, bits: Bits, of_expert: np.ndarray) -> tuple[str, ...]:
    if len(stats.domains) < 2:
        return (f"there is one domain only ({stats.domains[0]}), so no expert can be a specialist",)
    most = f"of {np.log2(len(stats.domains)):.1f} possible"
    domain, at, expert = map(int, np.unravel_index(int(of_expert.argmax()), of_expert.shape))
    choosy = (
        f"the choosiest is expert {expert} of layer {stats.layers[at]}: {of_expert.max():.0%} of its work is "
        f"{stats.domains[domain]} (with all domains of one size)"
    )
    if np.isnan(bits.corrected).any():
        return (
            "there is too little text to tell a specialist from chance: a domain has fewer than two windows",
            choosy,
        )
    top = int(bits.corrected.argmax())
    median = np.median(bits.corrected)
    told = (
        f"one choice of an expert tells {median:.2f} bits {most} about the domain in the median layer, at most "
        f"{bits.corrected[top]:.2f} ± {bits.error[top]:.2f} (layer {stats.layers[top]})"
    )
    return told, choosy

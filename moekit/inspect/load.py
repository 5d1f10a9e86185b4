"""How the work is shared: load, gate mass, entropy, router margin, dead and dominant experts, layer by layer."""

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from moekit import pictures
from moekit.inspect.collect import BINS, Stats, margins, quantile
from moekit.inspect.result import Analysis, percentiles, table

DOMINANT = 4.0
"""Times the fair share: as much as the colours tell apart."""
ALL_BUT = 0.9
"""Share of the tokens that makes an expert dominant too, where there are few experts."""


def load(stats: Stats) -> Analysis:
    """Returns the load of each expert and what it says of each layer."""
    measured = measure(stats)
    loads, fair = stats.load, fair_share(stats.load)
    layers, experts = loads.shape
    relative = loads / np.maximum(fair, 1e-12)
    mass = stats.gate_mass / np.maximum(stats.gate_mass.mean(1, keepdims=True), 1e-12)
    numbered = np.tile(np.arange(experts), layers)
    each = table(
        layer=np.repeat(stats.layers, experts),
        expert=numbered,
        choices=loads.ravel(),
        load=relative.ravel(),
        gate_mass=mass.ravel(),
        mean_weight=(stats.gate_mass / np.where(loads > 0, loads, np.nan)).ravel(),
    )
    by_layer = table(layer=stats.layers, **measured)
    tables = {"layers": by_layer, "percentiles": percentiles(measured), "experts": each}
    rows = [f"layer {layer}" for layer in stats.layers]
    shown = {
        "Load of each expert over its fair share; a row is a layer, a column an expert": pictures.tiles(
            "load of each expert, by layer", {"": relative}, "ratio", rows=rows
        ),
        "Gate mass over its fair share: what the expert adds to the output, as far as weights tell": pictures.tiles(
            "gate mass of each expert, by layer", {"": mass}, "ratio", rows=rows
        ),
    }
    with matplotlib.rc_context(pictures.STYLE):
        shown |= _curves(stats, measured)
    reading = (
        "Load is the number of tokens that choose an expert, 1 being its fair share, the mean of its layer; gate mass "
        "is the sum of the weights that they give it. An even layer is pale all over, and its entropy of the load 1. "
        "A dead expert (grey) is memory for nothing. The entropy of one token's scores says how sure the router is, "
        "and the margin, the gap between the last expert chosen and the next one, how little would change its mind."
    )
    return Analysis("load", "How the work is shared", reading, tables, shown, _findings(stats, measured, relative))


def fair_share(loads: Int[np.ndarray, "layers experts"]) -> Float[np.ndarray, "layers 1"]:
    """Returns the mean load of each layer."""
    return np.asarray(loads.mean(1, keepdims=True))


def measure(stats: Stats) -> dict[str, np.ndarray]:
    """Returns one number a layer of each measure.

    entropy: of the load, as a share of its largest value. max_load, min_load: of the fair share. dead: experts without
    a choice. dominant: with at least 4 times the fair share, or chosen by nine tokens in ten. token_entropy: mean over
    the tokens of the entropy of the router's scores, in bits, and its 10th and 90th percentile. margin: percentiles of
    the gap between the k-th and the next score that choose. weight_sum: mean sum of a token's weights.
    """
    loads, tokens = stats.load.astype(np.float64), max(int(stats.tokens.sum()), 1)
    layers, experts = loads.shape
    share = loads / np.maximum(loads.sum(1, keepdims=True), 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = -np.where(share > 0, share * np.log2(share), 0).sum(1)
    relative = loads / np.maximum(fair_share(stats.load), 1e-12)
    ruling = (relative >= DOMINANT) | ((loads >= ALL_BUT * tokens) & (stats.k < ALL_BUT * experts))
    unknown = np.full(layers, np.nan)
    most = np.log2(max(experts, 2))
    found = {
        "entropy": bits / most if experts > 1 else np.ones(layers),
        "max_load": relative.max(1),
        "min_load": relative.min(1),
        "dead": (loads == 0).sum(1),
        "dominant": ruling.sum(1),
        "weight_sum": stats.gate_mass.sum(1) / tokens,
        "token_entropy": unknown if stats.entropy_sum is None else stats.entropy_sum / tokens,
    }
    for at in (10, 90):
        spread = unknown if stats.entropy is None else quantile(stats.entropy, at / 100) / BINS * most
        found[f"token_entropy_p{at}"] = spread
    for at in (10, 50, 90):
        found[f"margin_p{at}"] = unknown if stats.margin is None else margins(stats.margin, at / 100)
    return found


def _curves(stats: Stats, measured: dict[str, np.ndarray]) -> dict[str, str]:
    """Returns the entropies and the margin over the layers."""
    if len(stats.layers) < 2 or stats.entropy is None or not np.isfinite(measured["margin_p50"]).all():
        return {}
    shown = {}
    for name, middle, caption in (
        ("token_entropy", "token_entropy", "Entropy of a token's scores, bits: mean, 10th to 90th percentile"),
        ("margin", "margin_p50", "Router margin: median, 10th to 90th percentile"),
    ):
        axes = pictures.plot(x="layer")
        low, high = measured[f"{name}_p10"], measured[f"{name}_p90"]
        axes.fill_between(stats.layers, low, high, color=pictures.THEME["second"], alpha=0.2, linewidth=0)
        axes.plot(stats.layers, measured[middle], color=pictures.THEME["second"])
        pictures.grid_lines(axes)
        axes.set_xlim(stats.layers[0], stats.layers[-1])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        if name == "margin":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.set_ylim(bottom=0)
            axes.axhline(np.log2(stats.experts), color=pictures.THEME["muted"], linewidth=0.8, linestyle="--")
        shown[caption] = pictures.svg(axes, caption)
    return shown


def _findings(stats: Stats, measured: dict[str, np.ndarray], relative: np.ndarray) -> tuple[str, ...]:
    dead, layers = measured["dead"], stats.layers
    places = [f"{int(dead[at])} in layer {layers[at]}" for at in np.flatnonzero(dead)]
    if not places:
        idle = f"no expert is dead: each of the {relative.size} was chosen"
    elif len(places) > 4:
        idle = f"{int(dead.sum())} dead experts in {len(places)} of {len(layers)} layers"
    else:
        one = int(dead.sum()) == 1
        idle = f"{'1 dead expert' if one else f'{int(dead.sum())} dead experts'} ({', '.join(places)})"
    at, expert = np.unravel_index(int(relative.argmax()), relative.shape)
    busiest = f"the busiest is expert {expert} of layer {layers[at]}, with {relative.max():.1f} times its fair share"
    said = [idle, busiest]
    if ruling := int(measured["dominant"].sum()):
        said.append(f"{ruling} {'expert takes' if ruling == 1 else 'experts take'} 4 times the fair share or more")
    if stats.entropy is None:
        said.append("the router has no scores, so there is no entropy of a token and no margin")
    return tuple(said)

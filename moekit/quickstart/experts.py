"""What the report shows of experts: how the work was shared over time, and which domain uses which of them."""

from typing import NamedTuple

import numpy as np

from moekit import pictures
from moekit.inspect.domains import by_favourite, mutual_information, shares, work
from moekit.quickstart.results import Result


def load_maps(result: Result) -> dict[int, str]:
    """Returns a heat map of each layer: the experts' load, relative to its mean, over the steps."""
    load = pictures.pool([r["tokens_per_expert"] for r in result.train])
    relative = load / np.maximum(load.mean(-1, keepdims=True), 1e-9)
    last, experts = result.train[-1]["step"], load.shape[-1]
    maps = {}
    for at, layer in enumerate(result.config.model.moe_layers):
        axes = pictures.plot((2.7, 2.1), x="step", y="expert")
        pictures.heat_map(axes, relative[:, at].T, (0, last, experts - 0.5, -0.5))
        axes.set_xticks([0, last])
        axes.set_yticks([0, experts - 1])
        maps[layer] = pictures.svg(axes, f"layer {layer}: load of each expert over the steps")
    return maps


def load_curve(result: Result, name: str) -> str:
    """Returns the curve of each layer of one measure of load."""
    axes = pictures.plot(x="step")
    axes.set_prop_cycle(color=pictures.layer_colours(len(result.config.model.moe_layers)))
    steps, values = pictures.pool([r["step"] for r in result.train]), [r["load"][name] for r in result.train]
    axes.plot(steps, pictures.pool(values), linewidth=1.4)
    pictures.grid_lines(axes)
    return pictures.svg(axes, f"{name} of each layer over the steps")


class Specialists(NamedTuple):
    """Which domain uses which experts: by layer a picture and the mutual information of domain and expert, in bits.

    `most_bits` would be the mutual information if every expert worked for one domain only. `domain`, `layer` and
    `expert` are the most specialised expert that has at least half its fair share of the work, and `share` is how much
    of its work that domain is, if every domain were of the same size.
    """

    maps: dict[int, str]
    bits: dict[int, float]
    most_bits: float
    domain: str
    layer: int
    expert: int
    share: float


def specialists(result: Result) -> Specialists:
    """Returns what the last validation says of them; the run has MoE layers and was validated."""
    domains, layers = result.evals[-1]["domains"], result.config.model.moe_layers
    counts = np.array([score["tokens_per_expert"] for score in domains.values()], dtype=np.float64)
    share = shares(counts)
    maps = {}
    for at, layer in enumerate(layers):
        order, starts = by_favourite(share[:, at])
        axes = pictures.plot((4.9, 0.34 + 0.2 * max(len(domains), 3)), x="experts, by favourite domain")
        pictures.heat_map(axes, share[:, at, order] * share.shape[-1])
        axes.set_yticks(range(len(domains)), list(domains))
        axes.set_xticks([])
        axes.tick_params(length=0)
        for start in starts:
            axes.axvline(start - 0.5, color=pictures.THEME["paper"], linewidth=1.5)
        maps[layer] = pictures.svg(axes, f"layer {layer}: use of each expert by each domain")
    bits = dict(zip(layers, mutual_information(share).tolist(), strict=True))
    of_expert = work(share)
    busy = share.mean(0) * share.shape[-1] >= 0.5
    domain, at, expert = map(int, np.unravel_index(np.argmax(of_expert * busy), of_expert.shape))
    best = (list(domains)[domain], layers[at], expert, float(of_expert[domain, at, expert]))
    return Specialists(maps, bits, float(np.log2(len(domains))), *best)

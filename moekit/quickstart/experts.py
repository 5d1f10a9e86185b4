"""The report's two sections on experts: how the work was shared over time, and which domain uses which of them."""

from collections.abc import Sequence
from html import escape

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes

from moekit.config import MoEConfig
from moekit.quickstart import pictures
from moekit.quickstart.results import Result


def load_over_time(result: Result) -> str:
    """Returns the section on load: a heat map per layer, maximum violation and entropy; empty for a dense model."""
    ffn, layers = result.config.model.ffn, result.config.model.moe_layers
    if not isinstance(ffn, MoEConfig):
        return ""
    experts = ffn.n_routed_experts
    steps = np.array([r["step"] for r in result.train])
    load = pictures.pool([r["tokens_per_expert"] for r in result.train])
    relative = load / np.maximum(load.mean(-1, keepdims=True), 1e-9)
    colours = [pictures.layer_colour(i, len(layers)) for i in range(len(layers))]

    def one_map(at: int) -> str:
        def draw(axes: Axes) -> None:
            pictures.heat_map(axes, relative[:, at].T, (0, steps[-1], experts - 0.5, -0.5))
            axes.set_xticks([0, steps[-1]])
            axes.set_yticks([0, experts - 1])

        label = f"layer {layers[at]}: load of each expert over the steps"
        caption = f"<strong>Layer {layers[at]}</strong>"
        return pictures.figure(caption, label, draw, size=(2.7, 2.1), margins=(0.36, 0.36), x="step", y="expert")

    def curves(name: str, caption: str) -> str:
        def draw(axes: Axes) -> None:
            at, values = pictures.pool(steps), pictures.pool([r["load"][name] for r in result.train])
            for position, colour in enumerate(colours):
                axes.plot(at, values[:, position], color=colour, linewidth=1.4)
            pictures.grid_lines(axes)

        return pictures.figure(caption, f"{name} of each layer over the steps", draw, x="step")

    return pictures.section(
        "How the work was shared",
        f"{_what_experts_are(ffn, len(layers))} {_load_at_the_end(result)}",
        pictures.LOAD_SCALE,
        pictures.grid("four", [one_map(at) for at in range(len(layers))]),
        pictures.key({f"layer {layer}": colour for layer, colour in zip(layers, colours, strict=True)}),
        pictures.grid(
            "two",
            [
                curves(
                    "max_violation", "<strong>Maximum violation</strong>, load of the busiest expert less 1; 0 is even"
                ),
                curves("entropy", "<strong>Entropy</strong> of the load, share of its largest value; 1 is even"),
            ],
        ),
    )


def _what_experts_are(ffn: MoEConfig, layers: int) -> str:
    shared = (
        ", beside 1 shared expert" if ffn.n_shared_experts == 1 else f", beside {ffn.n_shared_experts} shared experts"
    )
    return (
        f"An expert is a small network inside a layer. In each of {layers} layers every token goes to "
        f"{ffn.num_experts_per_tok} of {ffn.n_routed_experts} experts{shared if ffn.n_shared_experts else ''}"
        f"{' that all tokens visit' if ffn.n_shared_experts else ''}. The load of an expert is the number of tokens "
        "that it gets, here divided by its fair share, the mean of its layer."
    )


def _load_at_the_end(result: Result) -> str:
    last, layers = result.train[-1]["load"], result.config.model.moe_layers
    window = result.train[-1]["step"] - (result.train[-2]["step"] if len(result.train) > 1 else 0)
    uneven = int(np.argmax(last["max_violation"]))
    idle, experts = sum(last["dead"]), len(layers) * len(result.train[-1]["tokens_per_expert"][0])
    return (
        f"In the last {window} steps the busiest expert of all, in layer {layers[uneven]}, had "
        f"{last['max_violation'][uneven] + 1:.1f} times its fair share, and "
        + (
            f"{idle} of all {experts} experts had no token."
            if idle
            else f"each of the {experts} experts had some tokens."
        )
    )


def alarms(result: Result, most: int = 8) -> str:
    """Returns the run's alarms, the first `most` in full; empty if there were none."""
    if not result.alarms:
        return ""
    items = [f"<li>Step {r['step']}: {escape(r['text'])}.</li>" for r in result.alarms[:most]]
    if len(result.alarms) > most:
        items.append(f"<li>And {len(result.alarms) - most} more.</li>")
    return pictures.section("Alarms", f"Raised while {result.html} was trained.", f"<ul>{''.join(items)}</ul>")


def specialists(result: Result) -> str:
    """Returns the section on domains and experts; empty without MoE layers or without validation text."""
    layers = result.config.model.moe_layers
    if not layers or not result.evals:
        return ""
    scores = result.evals[-1]["domains"]
    domains = list(scores)
    counts = np.array([score["tokens_per_expert"] for score in scores.values()], dtype=np.float64)
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    bits = mutual_information(share)

    def one_map(at: int) -> str:
        order, starts = by_favourite(share[:, at])

        def draw(axes: Axes) -> None:
            pictures.heat_map(axes, share[:, at, order] * share.shape[-1])
            axes.set_yticks(range(len(domains)), domains)
            axes.set_xticks([])
            axes.tick_params(length=0)
            for start in starts:
                axes.axvline(start - 0.5, color=pictures.THEME["paper"], linewidth=1.5)

        size = (4.9, 0.34 + 0.2 * max(len(domains), 3))
        margins = (0.12 + 0.06 * max(map(len, domains)), 0.26)
        caption = f"<strong>Layer {layers[at]}</strong>, {bits[at]:.2f} bits"
        label = f"layer {layers[at]}: use of each expert by each domain"
        return pictures.figure(caption, label, draw, size=size, margins=margins, x="experts, by favourite domain")

    return pictures.section(
        "Who does what",
        "A row is a domain, a column an expert. The colour compares the expert's share of the domain's tokens with the "
        "share that it would have if all experts were used alike. Experts with the same favourite domain stand "
        "together, the choosiest first.</p><p>" + _specialisation(share, domains, layers),
        pictures.LOAD_SCALE,
        pictures.grid("two", [one_map(at) for at in range(len(layers))]),
    )


def _specialisation(share: np.ndarray, domains: Sequence[str], layers: Sequence[int]) -> str:
    """The same in words: mutual information, and the most specialised expert that has at least half its fair share."""
    if len(domains) < 2:
        return "There is one domain only, so no expert can be a specialist."
    bits = mutual_information(share)
    of_expert = share / np.maximum(share.sum(0), 1e-12)
    busy = share.mean(0) * share.shape[-1] >= 0.5
    domain, layer, expert = map(int, np.unravel_index(np.argmax(of_expert * busy), of_expert.shape))
    listed = ", ".join(f"{value:.2f} in layer {layer}" for layer, value in zip(layers, bits, strict=True))
    if len(layers) > 8:
        ends = (int(bits.argmin()), int(bits.argmax()))
        listed = (
            f"from {bits[ends[0]]:.2f} in layer {layers[ends[0]]} to {bits[ends[1]]:.2f} in layer {layers[ends[1]]}"
        )
    return (
        "The mutual information says how much one chosen expert tells about the domain of the text: 0 bits if all "
        f"domains used the experts alike, {np.log2(len(domains)):.2f} bits if every expert worked for one domain only. "
        f"Here it is {listed}. The most specialised expert is number {expert} of layer {layers[layer]}: "
        f"{of_expert[domain, layer, expert]:.0%} of its tokens are {escape(domains[domain])}, where "
        f"{1 / len(domains):.0%} would show no preference (each domain counts the same, whatever its size)."
    )


def mutual_information(share: Float[np.ndarray, "domains layers experts"]) -> Float[np.ndarray, " layers"]:
    """Returns the mutual information of domain and expert in each layer, in bits, every domain counting the same.

    `share` is p(expert | domain): I = mean over domains of sum over experts of p(e|d) log2(p(e|d) / p(e)).
    """
    ratio = np.divide(share, share.mean(0), out=np.ones_like(share), where=share > 0)
    return np.asarray((share * np.log2(ratio)).sum(-1).mean(0))


def by_favourite(share: Float[np.ndarray, "domains experts"]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the experts sorted by favourite domain, the choosiest first, and where each next group starts.

    Experts without a token come last.
    """
    total = share.sum(0)
    favourite = np.where(total > 0, share.argmax(0), len(share))
    order = np.lexsort((-share.max(0) / np.maximum(total, 1e-12), favourite))
    return order, np.flatnonzero(np.diff(favourite[order])) + 1

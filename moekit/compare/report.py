"""The report of a comparison: one HTML file, pictures inside, that needs no network and runs no script.

All numbers come from the result and from the runs' own curves, so the words follow the figures, whichever way they go.
The words and the layout are in report.html beside this file.
"""

from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np

from moekit import page, pictures
from moekit.version import __version__

FILE = "report.html"
TEMPLATES = page.templates(Path(__file__).parent)
COLOURS = ("#c4561c", "#3f86b8", "#8a5aa8", "#c49a1f", "#4c9a6a", "#8d877c", "#c8536f", "#5a6fc0", "#7d8c2e", "#2e9a9a")
"""Of the architectures, in order; they stand out from paper and from a dark page."""

MINUS = "\N{MINUS SIGN}"

Curves = Mapping[str, Mapping[int, Sequence[Mapping[str, Any]]]]
"""Architecture -> seed -> points of its curves, as `results.curve` gives them."""


@matplotlib.rc_context(pictures.STYLE)
def write_report(out: Path, result: Mapping[str, Any], curves: Curves, plan: Mapping[str, Any]) -> Path:
    """Returns the path of `out`/report.html, written at once or not at all.

    `result` is what result.json holds, `plan` what compare.yaml holds.
    """
    names = [name for name, row in result["architectures"].items() if row["seeds"]]
    colours = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(result["architectures"])}
    validated = {name: band(curves[name], "eval") for name in names}
    several = any(len(one.steps) > 1 for one in validated.values())
    text = TEMPLATES.get_template(FILE).render(
        result=result,
        plan=plan,
        out=out,
        names=names,
        colours=colours,
        order=sorted(names, key=lambda name: result["loss"]["mean"]["summaries"][name]["mean"]),
        version=__version__,
        forest=forest(result, colours),
        curves={x: learning_curves(validated, colours, x) for x in ("tokens", "flops", "seconds")} if several else {},
        gaps=gap_curves(curves, names, result["baseline"], colours) if several else "",
        fixed=fixed,
        signed=signed,
        timedelta=timedelta,
    )
    return page.write(out / FILE, text)


def fixed(value: float | None, digits: int = 4) -> str:
    return "" if value is None else f"{value:.{digits}f}".replace("-", MINUS)


def signed(value: float | None, digits: int = 4) -> str:
    """Returns the value with its sign; what rounds to 0 has none."""
    if value is None:
        return ""
    text = f"{value:+.{digits}f}".replace("-", MINUS)
    return text[1:] if not round(value, digits) else text


class Band(NamedTuple):
    """A measure of one architecture over its seeds, at the steps that all of them have logged."""

    steps: list[int]
    x: dict[str, np.ndarray]
    """Tokens, FLOPs and seconds, mean over the seeds."""
    low: np.ndarray
    mean: np.ndarray
    high: np.ndarray


def band(seeds: Mapping[int, Sequence[Mapping[str, Any]]], kind: str, measure: str = "loss") -> Band:
    """Returns the band of an architecture's points of one kind, train or eval."""
    points = [{point["step"]: point for point in one if point["kind"] == kind} for one in seeds.values()]
    steps = sorted(set.intersection(*(set(one) for one in points)))
    values = np.array([[one[step][measure] for step in steps] for one in points]).reshape(len(points), len(steps))
    x = {
        key: np.array([[one[step][key] for step in steps] for one in points]).reshape(values.shape).mean(0)
        for key in ("tokens", "flops", "seconds")
    }
    return Band(steps, x, values.min(0), values.mean(0), values.max(0))


def _raised(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


AXES: dict[str, tuple[str, dict[float, str]]] = {
    "tokens": ("tokens read", {1e9: "billion ", 1e6: "million ", 1e3: "thousand "}),
    "flops": ("training FLOPs", {10.0**n: f"10{_raised(n)} " for n in range(27, 2, -3)}),
    "seconds": ("of training", {3600: "hours ", 60: "minutes ", 1: "seconds "}),
}


def axis(x: str, largest: float) -> tuple[float, str]:
    """Returns the unit in which the largest value is one or more, and the label of the axis."""
    what, units = AXES[x]
    unit = next((unit for unit in units if largest >= 2 * unit), 1.0)
    return unit, units.get(unit, "") + what


def learning_curves(bands: Mapping[str, Band], colours: Mapping[str, str], x: str) -> str:
    """Returns a picture of the loss on unseen text, mean over the seeds in a band from the lowest to the highest."""
    unit, label = axis(x, max(one.x[x][-1] for one in bands.values()))
    axes = pictures.plot(x=label)
    for name, one in bands.items():
        axes.fill_between(one.x[x] / unit, one.low, one.high, color=colours[name], alpha=0.2, linewidth=0)
        axes.plot(one.x[x] / unit, one.mean, color=colours[name], marker="o", markersize=2.5)
    pictures.grid_lines(axes)
    return pictures.svg(axes, f"loss on unseen text of each architecture over {label}")


def gap_curves(curves: Curves, names: Sequence[str], baseline: str, colours: Mapping[str, str]) -> str:
    """Returns a picture of the paired difference to the baseline while they learn; "" where nothing can be paired."""
    unit, label = axis("tokens", max(p["tokens"] for of in curves.values() for one in of.values() for p in one))
    axes = pictures.plot(x=label)
    drawn = False
    for name in names:
        seeds = curves[name].keys() & curves.get(baseline, {}).keys()
        points = [
            {point["step"]: point for point in curves[who][seed] if point["kind"] == "eval"}
            for seed in sorted(seeds)
            for who in (name, baseline)
        ]
        steps = sorted(set.intersection(*(set(one) for one in points))) if points else []
        if name == baseline or len(steps) < 2:
            continue
        drawn = True
        gaps = np.array(
            [[a[s]["loss"] - b[s]["loss"] for s in steps] for a, b in zip(points[::2], points[1::2], strict=True)]
        )
        tokens = np.array([points[0][step]["tokens"] for step in steps]) / unit
        axes.fill_between(tokens, gaps.min(0), gaps.max(0), color=colours[name], alpha=0.2, linewidth=0)
        axes.plot(tokens, gaps.mean(0), color=colours[name], marker="o", markersize=2.5)
    axes.axhline(0, color=colours[baseline], linewidth=1.4)
    pictures.grid_lines(axes)
    return pictures.svg(axes, f"loss less that of {baseline}, over the tokens read") if drawn else ""


def forest(result: Mapping[str, Any], colours: Mapping[str, str]) -> str:
    """Returns a picture of each difference to the baseline: every seed a dot, the interval a bar; "" without any.

    Where somebody else's losses are given, their difference is an open diamond.
    """
    baseline, rows = result["baseline"], result["architectures"]
    differences = result["loss"]["mean"]["differences"]
    if not differences:
        return ""
    theirs: Mapping[str, float] = next(
        (one["differences"] for one in result["expected"] if one["better"] == "lower"), {}
    )
    axes = pictures.plot((8.2, 0.75 + 0.36 * len(differences)), x=f"loss less that of {baseline}, nats per token")
    axes.axvline(0, color=colours[baseline], linewidth=1.4)
    for at, (name, one) in enumerate(differences.items()):
        if one["low"] is not None:
            axes.plot(
                [one["low"], one["high"]], [at, at], color=colours[name], linewidth=5, alpha=0.3, solid_capstyle="butt"
            )
        seeds = rows[baseline]["seeds"]
        gaps = [score["loss"] - seeds[seed]["loss"] for seed, score in rows[name]["seeds"].items() if seed in seeds]
        axes.plot(gaps, [at] * len(gaps), "o", color=colours[name], markersize=3.5, alpha=0.7, linewidth=0)
        axes.plot(one["mean"], at, "|", color=colours[name], markersize=13, markeredgewidth=2.4)
        if name in theirs:
            axes.plot(theirs[name], at, "D", color="none", markeredgecolor=pictures.THEME["muted"], markersize=5)
    axes.set_yticks(range(len(differences)), list(differences))
    axes.set_ylim(len(differences) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=pictures.THEME["rule"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    return pictures.svg(axes, f"difference of each architecture to {baseline}")

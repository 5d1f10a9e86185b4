"""Curves and heat maps as SVG for the inside of a page.

matplotlib draws with stand-in colours, and the page's own variables take their places, so that pictures follow a light
or a dark theme; text stays text, in the page's font. Heat maps are PNG inside the SVG, one pixel a value.
"""

import io
import re
import warnings
from collections.abc import Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure

Array = Float[np.ndarray, "..."]

THEME = {name: f"#01020{i}" for i, name in enumerate(("ink", "muted", "rule", "paper", "first", "second"))}
"""Variable of the page -> the colour to draw with."""

# a domain may be called $x$
STYLE: Any = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 8.5, "lines.linewidth": 1.7}
"""matplotlib's settings, to be in force from the first axes to the last svg."""

POINTS = 160
"""Most points of time in a picture; more are pooled, so that a long run's report stays small."""

LOAD_COLOURS = ["#174a73", "#79aed0", "#f4f1ea", "#eb9a5f", "#9c3a0c"]
_LOAD = LinearSegmentedColormap.from_list("load", LOAD_COLOURS).with_extremes(bad="#8d877c")
_LAYERS = LinearSegmentedColormap.from_list("layers", ["#d49b2f", "#c8553d", "#8a5aa8", "#3b86bd"])


def plot(size: tuple[float, float] = (4.9, 2.7), x: str = "", y: str = "") -> Axes:
    """Returns empty axes in the page's colours; `size` is in inches, the page scales the picture to its column."""
    axes = Figure(figsize=size, layout="constrained", facecolor="none").add_subplot(facecolor="none")
    axes.set_xlabel(x, color=THEME["muted"])
    axes.set_ylabel(y, color=THEME["muted"])
    axes.tick_params(color=THEME["rule"], labelcolor=THEME["muted"])
    axes.spines[:].set_color(THEME["rule"])
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def grid_lines(axes: Axes) -> None:
    """Adds horizontal lines and few, round ticks to curves, and lets them start at 0."""
    axes.grid(axis="y", color=THEME["rule"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(nbins=5)
    axes.set_xlim(left=0)


def heat_map(axes: Axes, values: Array, extent: tuple[float, float, float, float] | None = None) -> None:
    """Draws values relative to a fair share of 1, from 1/4 to 4 in powers of two; zeros have a colour of their own."""
    with np.errstate(divide="ignore"):
        logs = np.ma.masked_where(values == 0, np.log2(values))
    axes.imshow(logs, _LOAD, aspect="auto", interpolation="none", vmin=-2, vmax=2, extent=extent)
    axes.spines[:].set_visible(False)


def svg(axes: Axes, label: str) -> str:
    """Returns the picture for use inside HTML: without prologue, name spaces, metadata and unused ids, in page colours.

    `label` is its text for those who cannot see it.
    """
    file = io.StringIO()
    # the salt makes the same picture the same bytes
    with matplotlib.rc_context({"svg.hashsalt": label}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the font
        axes.figure.canvas.print_figure(file, format="svg")
    text = re.sub(r"<metadata>.*?</metadata>", "", file.getvalue(), flags=re.DOTALL)
    view, content = re.findall(r'<svg .*?(viewBox="[^"]*").*?>(.*)', text, flags=re.DOTALL)[0]
    used = set(re.findall(r"#([\w-]+)", content))
    content = re.sub(r' id="([\w-]+)"', lambda found: found[0] if found[1] in used else "", content)
    for name, colour in THEME.items():
        content = content.replace(colour, f"var(--{name})")
    return f'<svg {view} role="img" aria-label="{escape(label)}">' + re.sub(r">\s+<", "><", content)


def layer_colours(layers: int) -> list[str]:
    """Returns the colour of each layer's curve; neighbours are alike."""
    return [to_hex(colour) for colour in _LAYERS(np.linspace(0, 1, layers))]


def pool(values: Sequence[Any] | np.ndarray, most: int = POINTS) -> Array:
    """Returns the values, or the means of `most` runs of neighbours if there are more, along the first axis."""
    array = np.asarray(values, dtype=np.float64)
    return np.stack([part.mean(0) for part in np.array_split(array, min(most, len(array)))])


def smooth(values: Array) -> Array:
    """Returns the centred mean over about 1/30 of the values; the ends use what is there."""
    window = np.ones(1 + 2 * (len(values) // 60))
    return np.asarray(np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same"))

"""The parts of a page: curves and heat maps as inline SVG, sections, grids and keys.

matplotlib draws with stand-in colours, and the page's own variables take their places, so that pictures follow a light
or a dark theme; text stays text, in the page's font. Heat maps are PNG inside the SVG, one pixel a value.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Array = Float[np.ndarray, "..."]
Draw = Callable[[Axes], None]

THEME = {name: f"#01020{i}" for i, name in enumerate(("ink", "muted", "rule", "paper", "first", "second"))}
"""Variable of the page -> the colour to draw with."""

POINTS = 160
"""Most points of time in a picture; more are pooled, so that a long run's report stays small."""

_STOPS = ["#174a73", "#79aed0", "#f4f1ea", "#eb9a5f", "#9c3a0c"]
_LOAD = LinearSegmentedColormap.from_list("load", _STOPS, N=256).with_extremes(bad="#8d877c")
_LAYERS = LinearSegmentedColormap.from_list("layers", ["#d49b2f", "#c8553d", "#8a5aa8", "#3b86bd"])
LOAD_SCALE = (
    f'<div class="scale"><span>¼ or less</span><i style="background:linear-gradient(90deg,{",".join(_STOPS)})"></i>'
    "<span>4 times the fair share or more; the middle is a fair share</span>"
    '<span><i class="none"></i> no token at all</span></div>'
)


def figure(
    caption: str,
    label: str,
    draw: Draw,
    *,
    size: tuple[float, float] = (4.9, 2.7),
    margins: tuple[float, float] = (0.45, 0.42),
    x: str = "",
    y: str = "",
) -> str:
    """Returns an HTML figure of what `draw` puts on the axes; `label` is its text for those who cannot see it.

    `caption` is HTML, the other texts are plain. `size` and `margins` (left, bottom) are in inches; the page scales the
    picture to its column.
    """
    (width, height), (left, bottom) = size, margins
    # a domain may be called $x$; the salt makes the same picture the same bytes
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": label, "text.parse_math": False, "font.size": 8.5}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the font
        drawing = Figure(figsize=size)
        canvas = FigureCanvasSVG(drawing)
        axes = drawing.add_axes((left / width, bottom / height, 1 - (left + 0.1) / width, 1 - (bottom + 0.08) / height))
        axes.set_xlabel(x, color=THEME["muted"], labelpad=3)
        axes.set_ylabel(y, color=THEME["muted"], labelpad=2)
        axes.tick_params(color=THEME["rule"], labelcolor=THEME["muted"], length=3, pad=3)
        axes.patch.set_visible(False)
        drawing.patch.set_visible(False)
        axes.spines[:].set_color(THEME["rule"])
        axes.spines[["top", "right"]].set_visible(False)
        draw(axes)
        file = io.StringIO()
        canvas.print_svg(file)
    return f"<figure><figcaption>{caption}</figcaption>{_inline(file.getvalue(), label)}</figure>"


def _inline(svg: str, label: str) -> str:
    """Returns the SVG for use inside HTML: without prologue, name spaces, metadata and unused ids, in page colours."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None  # matplotlib always writes it
    svg = f'<svg {box[0]} role="img" aria-label="{escape(label)}">' + svg[svg.index(">") + 1 :]
    used = set(re.findall(r"#([\w-]+)", svg))
    svg = re.sub(r' id="([\w-]+)"', lambda found: found[0] if found[1] in used else "", svg)
    for name, colour in THEME.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r">\s+<", "><", svg)


def grid_lines(axes: Axes) -> None:
    """Adds horizontal lines and few, round ticks; large numbers along x are written short."""
    axes.grid(axis="y", color=THEME["rule"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlim(left=0)


def heat_map(axes: Axes, values: Array, extent: tuple[float, float, float, float] | None = None) -> None:
    """Draws values relative to a fair share of 1, from 1/4 to 4 in powers of two; zeros have a colour of their own."""
    with np.errstate(divide="ignore"):
        logs = np.ma.masked_where(values == 0, np.log2(values))
    axes.imshow(logs, _LOAD, aspect="auto", interpolation="none", vmin=-2, vmax=2, extent=extent)
    axes.spines[:].set_visible(False)


def layer_colour(position: int, layers: int) -> str:
    """Returns the colour of a layer's curve; neighbours are alike."""
    return to_hex(_LAYERS(position / max(layers - 1, 1)))


def pool(values: Sequence[Any] | np.ndarray, most: int = POINTS) -> Array:
    """Returns the values, or the means of `most` runs of neighbours if there are more, along the first axis."""
    array = np.asarray(values, dtype=np.float64)
    return np.stack([part.mean(0) for part in np.array_split(array, min(most, len(array)))])


def smooth(values: Array) -> Array:
    """Returns the centred mean over about 1/30 of the values; the ends use what is there."""
    window = np.ones(1 + 2 * (len(values) // 60))
    return np.asarray(np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same"))


def section(title: str, intro: str, *content: str) -> str:
    """Returns a titled part of the page; all arguments are HTML."""
    return "\n".join([f"<section>\n<h2>{title}</h2>", f"<p>{intro}</p>" if intro else "", *content, "</section>"])


def grid(kind: str, cells: Sequence[str]) -> str:
    """Returns cells side by side, `kind` (two, four) across where the window is wide enough."""
    return f'<div class="grid {kind}">{"".join(cells)}</div>'


def key(colours: Mapping[str, str]) -> str:
    """Returns what each colour stands for: plain text -> CSS colour."""
    spans = (f'<span style="--c:{colour}">{escape(name)}</span>' for name, colour in colours.items())
    return f'<div class="key">{"".join(spans)}</div>'


def short(count: float) -> str:
    """Returns 5677536 as 5.68M, 1600 as 1.6K: at most three digits."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(count) >= 0.9995 * size:
            return f"{float(f'{count / size:.3g}'):g}{unit}"
    return f"{count:.3g}"

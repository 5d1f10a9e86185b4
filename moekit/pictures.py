"""Curves, heat maps and tiles of them as SVG for the inside of a page.

matplotlib draws with stand-in colours, and the page's own variables take their places, so that pictures follow a light
or a dark theme; text stays text, in the page's font. Heat maps are PNG inside the SVG, one pixel a value.
"""

import base64
import io
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal

import matplotlib
import matplotlib.image
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex
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


Scale = Literal["ratio", "cosine"]
_SCALES: dict[Scale, tuple[Colormap, float, float, tuple[str, str, str]]] = {
    "ratio": (_LOAD, -2, 2, ("¼ or less", "1", "4 or more; grey: none")),
    "cosine": (_LOAD, -1, 1, ("-1", "0", "1")),
}
"""Colours, the least and the most that they tell apart, and the words under them. A ratio is shown in powers of two."""
_WIDTH, _LABEL, _GAP, _HEAD = 1000, 12, 14, 18  # of a page of tiles, its letters, between tiles, a tile's title


def tiles(
    label: str,
    maps: Mapping[str, Array],
    scale: Scale,
    *,
    across: int = 1,
    rows: Sequence[str] = (),
    columns: Sequence[int] | Mapping[str, Sequence[int]] = (),
    names: tuple[str, str] = ("", "expert"),
    square: bool = False,
) -> str:
    """Returns heat maps by title, `across` in a row, each value a cell that a page's script can tell the reader of.

    `rows` name the rows, beside the first map of each row of maps; `columns` number the columns where they are not in
    order (by title, if each map has its own order). `names` are what a row and a column is. Drawn without matplotlib's
    axes: dozens of maps take no time.
    """
    wide = max((_LABEL * 0.6 * len(row) for row in rows), default=0) + (8 if rows else 0)
    width = (_WIDTH - wide - (across - 1) * _GAP) / across
    parts, y, x = list[str](), 0.0, wide
    for number, (title, values) in enumerate(maps.items()):
        high = len(values)
        height = width if square else high * min(22.0 if len(maps) <= 8 else 12.0, max(9.0, 300 / high))
        if number and number % across == 0:
            y, x = y + height + _GAP + (_HEAD if title else 0), wide
        top = y + (_HEAD if title else 0)
        if title:
            parts.append(f'<text x="{x:.1f}" y="{y + _LABEL:.1f}" fill="var(--ink)">{escape(title)}</text>')
        if x == wide and rows:
            every = -(-len(rows) * 11 // round(height))  # no more names than there is room for
            for row in range(0, len(rows), max(every, 1)):
                at = top + (row + 0.5) * height / high + 4
                parts.append(
                    f'<text x="{wide - 6:.1f}" y="{at:.1f}" text-anchor="end" fill="var(--muted)">'
                    f"{escape(rows[row])}</text>"
                )
        numbered = columns.get(title, ()) if isinstance(columns, Mapping) else columns
        told = {
            "title": title,
            "names": names,
            "rows": list(rows) if len(rows) == high else [],
            "columns": list(map(int, numbered)),
            "values": [[None if v != v else round(v, 2) for v in line] for line in values.tolist()],
        }
        data = escape(json.dumps(told, separators=(",", ":"), ensure_ascii=False))
        parts.append(
            f'<image x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none" '
            f'data-map="{data}" href="{_png(_coloured(values, scale))}"/>'
        )
        x += width + _GAP
    y = top + height + _GAP
    low, middle, high_word = _SCALES[scale][3]
    _, least, most, _ = _SCALES[scale]
    ramp = np.linspace(least, most, 64)[None]
    picture = _png(_coloured(2**ramp if scale == "ratio" else ramp, scale))
    parts.append(
        f'<image x="{wide:.1f}" y="{y:.1f}" width="180" height="8" preserveAspectRatio="none" href="{picture}"/>'
    )
    for place, word, anchor in ((0, low, "start"), (90, middle, "middle"), (180, high_word, "start")):
        at = wide + place + (-18 if place == 180 else 0)
        parts.append(
            f'<text x="{at:.1f}" y="{y + 21:.1f}" text-anchor="{anchor}" fill="var(--muted)">{escape(word)}</text>'
        )
    head = f'<svg class="tiles" viewBox="0 0 {_WIDTH} {y + 26:.0f}" font-size="{_LABEL}" role="img"'
    return f'{head} aria-label="{escape(label)}">{"".join(parts)}</svg>'


def _coloured(values: Array, scale: Scale) -> np.ndarray:
    colours, least, most, _ = _SCALES[scale]
    with np.errstate(divide="ignore", invalid="ignore"):
        shown = np.log2(values) if scale == "ratio" else np.asarray(values, dtype=np.float64)
    shown = np.ma.masked_where(~np.isfinite(shown), shown)
    return np.asarray(colours((shown - least) / (most - least), bytes=True))


def _png(pixels: np.ndarray) -> str:
    """Returns a data address of an image, one pixel a value."""
    file = io.BytesIO()
    matplotlib.image.imsave(file, pixels, format="png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


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

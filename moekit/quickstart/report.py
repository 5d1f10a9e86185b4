"""The report of a quickstart: one HTML file, pictures inside, that needs no network and runs no script.

All numbers come from metrics.jsonl and config.yaml of the runs, so the words follow the result, whichever way it goes.
The words and the layout are in report.html beside this file.
"""

import shlex
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from moekit import files, page, pictures
from moekit.config import preset_names
from moekit.generate.complete import Completion
from moekit.quickstart import experts
from moekit.quickstart.results import Result, read_result
from moekit.tables import short
from moekit.version import __version__

FILE = "report.html"
TEMPLATES = page.templates(Path(__file__).parent, short=short, quote=shlex.quote)


@matplotlib.rc_context(pictures.STYLE)
def write_report(
    out: Path,
    runs: Mapping[str, Path],
    samples: Mapping[str, Sequence[Completion]],
    corpus: Mapping[str, Mapping[str, int]],
) -> Path:
    """Returns the path of `out`/report.html, written at once or not at all.

    `runs` holds the run under study and, if there is one, its baseline, by name; more are left out. `samples` are
    continuations by domain, `corpus` the documents, tokens and bytes of each domain's training text. Raises DataError
    for a run that has not logged a step yet.
    """
    named = zip(runs.items(), ("first", "second"), strict=False)
    text = TEMPLATES.get_template(FILE).render(
        results=[read_result(name, Path(path), theme) for (name, path), theme in named],
        samples=samples,
        corpus=corpus,
        presets=preset_names(),
        timedelta=timedelta,
        version=__version__,
        load_colours=pictures.LOAD_COLOURS,
        layer_colours=pictures.layer_colours,
        learning_curve=learning_curve,
        load_curve=experts.load_curve,
        load_maps=experts.load_maps,
        specialists=experts.specialists,
    )
    files.write(Path(out) / FILE, page.allowed(text))
    return Path(out) / FILE


def learning_curve(results: Sequence[Result], measure: str) -> str:
    """Returns a picture of a measure: in training faint as it was and strong smoothed, in validation as dots."""
    axes = pictures.plot(x="million tokens read")
    for result in results:
        style: dict[str, Any] = {
            "color": pictures.THEME[result.theme],
            "mec": pictures.THEME["paper"],
            "mew": 0.8,
            "ms": 5.5,
        }
        if trained := [(r["tokens"] / 1e6, r[measure]) for r in result.train if measure in r]:
            tokens, values = pictures.pool(trained, 4 * pictures.POINTS).T
            axes.plot(tokens, values, **style, alpha=0.35, linewidth=0.9)
            axes.plot(tokens, pictures.smooth(values), **style)
        judged = np.array([(r["tokens"] / 1e6, r[measure]) for r in result.evals]).reshape(-1, 2)
        axes.plot(*judged.T, "o" if trained else "o-", **style)
    pictures.grid_lines(axes)
    return pictures.svg(axes, f"{measure} over the tokens read")

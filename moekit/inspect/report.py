"""The report of an inspection: one HTML file that needs no network, and every table as JSON and CSV beside it."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moekit import files, page
from moekit.inspect.result import Analysis, Table
from moekit.inspect.vocabulary import shown
from moekit.version import __version__

FILE = "report.html"
ROWS = 40
"""Rows of a table that the page holds; all are in the CSV file."""
TEMPLATES = page.templates(Path(__file__).parent)


class Inspected(NamedTuple):
    """A model and what was found. `facts` are words about it by name, for the strip at the top."""

    name: str
    path: str
    facts: dict[str, str]
    analyses: list[Analysis]


def write_report(
    out: str | Path, subjects: Sequence[Inspected], extra: Sequence[Analysis] = (), trace: str | None = None
) -> list[str]:
    """Returns the names of the files written to `out`, each in one atomic step: the page, and the tables.

    `subjects` holds the model, and if there is one the other model beside it; `extra` are analyses of both together.
    `trace` is the name of the trace's page, which lies in `out` too.
    """
    folder, written = Path(out), list[str]()
    for number, subject in enumerate(subjects):
        for analysis in (*subject.analyses, *(extra if number == 0 else ())):
            written += write_tables(folder / ("against" if number else ""), analysis)
    text = TEMPLATES.get_template(FILE).render(
        subjects=subjects,
        sections=sections(subjects, extra),
        headline=headline,
        experts=[_experts(subject.analyses) for subject in subjects],
        trace=trace,
        most_rows=ROWS,
        version=__version__,
        typeset=typeset,
    )
    page.write(folder / FILE, text)
    return [FILE, *written]


def write_tables(folder: Path, analysis: Analysis) -> list[str]:
    """Returns the names of the files: NAME.json with everything but the pictures, and NAME-TABLE.csv for each table."""
    content = {
        "name": analysis.name,
        "title": analysis.title,
        "reading": analysis.reading,
        "findings": list(analysis.findings),
        "tables": {name: {"columns": one.columns, "rows": one.rows} for name, one in analysis.tables.items()},
    }
    files.write(folder / f"{analysis.name}.json", json.dumps(content, ensure_ascii=False) + "\n")
    for name, one in analysis.tables.items():
        files.write(folder / _csv(analysis, name), as_csv(one))
    prefix = f"{folder.name}/" if folder.name == "against" else ""
    return [f"{prefix}{analysis.name}.json", *(f"{prefix}{_csv(analysis, name)}" for name in analysis.tables)]


def _csv(analysis: Analysis, table: str) -> str:
    return f"{analysis.name}-{table.replace(' ', '_')}.csv"


def as_csv(found: Table) -> str:
    """Returns a table as CSV with a header; what could not be measured is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(found.columns)
    writer.writerows(found.rows)
    return text.getvalue()


class Section(NamedTuple):
    """An analysis of each model that has it, by the model's place; a section has at least one."""

    name: str
    title: str
    reading: str
    of: list[tuple[int, Analysis]]


def sections(subjects: Sequence[Inspected], extra: Sequence[Analysis]) -> list[Section]:
    """Returns the sections of the page, what concerns both models first."""
    found = [Section(one.name, one.title, one.reading, [(0, one)]) for one in extra]
    for name in dict.fromkeys(one.name for subject in subjects for one in subject.analyses):
        of = [(at, one) for at, subject in enumerate(subjects) for one in subject.analyses if one.name == name]
        found.append(Section(name, of[0][1].title, of[0][1].reading, of))
    return found


def headline(analyses: Sequence[Analysis]) -> str:
    """Returns the first findings on load and domains as one sentence."""
    said = [one.findings[0] for one in analyses if one.name in ("load", "domains") and one.findings]
    text = "; ".join(said or [one.findings[0] for one in analyses if one.findings][:1])
    return f"{text[:1].upper()}{text[1:]}." if text else "What the experts do."


def typeset(value: Any) -> str:
    """Returns a cell as it is shown."""
    if value is None:
        return "–"  # noqa: RUF001
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _experts(analyses: Sequence[Analysis]) -> str | None:
    """Returns what the page's browser of experts shows, as JSON: tokens and contexts by layer and expert."""
    found = next((one for one in analyses if one.name == "tokens"), None)
    if found is None:
        return None
    layers: dict[str, dict[str, Any]] = {}

    def expert(row: Sequence[Any]) -> dict[str, Any]:
        of_layer = layers.setdefault(str(row[0]), {})
        found: dict[str, Any] = of_layer.setdefault(str(row[1]), {"top": [], "typical": [], "contexts": []})
        return found

    for name in ("top", "typical"):
        for row in found.tables[name].rows:
            expert(row)[name].append([row[2], row[3], row[4], row[5]])
    for row in found.tables["contexts"].rows:
        expert(row)["contexts"].append([row[2], *(shown(str(part)) for part in row[3:])])
    text = json.dumps(layers, separators=(",", ":"), ensure_ascii=False)
    return text.replace("</", "<\\/").replace("<!", "<\\u0021")

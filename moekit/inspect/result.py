"""What every analysis returns: tables for programs, pictures for people, and how to read them."""

from typing import Any, NamedTuple

import numpy as np

Cell = str | int | float | None


class Table(NamedTuple):
    """Named columns, one row a finding. Numbers stay numbers; None is what could not be measured."""

    columns: tuple[str, ...]
    rows: list[tuple[Cell, ...]]


class Analysis(NamedTuple):
    """One question about a model, answered. `name` is that of its files."""

    name: str
    title: str
    reading: str
    """What is shown, in what unit, and what it would look like in a healthy model: two or three sentences."""
    tables: dict[str, Table]
    pictures: dict[str, str]
    """Caption -> SVG."""
    findings: tuple[str, ...] = ()
    """What was found, in words, each a clause that can stand in a summary; the most telling one first."""


def table(**columns: Any) -> Table:
    """Returns a table of columns, each a sequence or an array of equal length; what is not finite becomes None."""
    lists = [column.tolist() if isinstance(column, np.ndarray) else list(column) for column in columns.values()]
    return Table(tuple(columns), [tuple(map(cell, row)) for row in zip(*lists, strict=True)])


def cell(value: Any) -> Cell:
    """Returns a value as a cell: five significant digits of a number that is not whole."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if np.isfinite(value) else None
    assert value is None or isinstance(value, str | int)
    return value


def percentiles(values: dict[str, Any]) -> Table:
    """Returns the 10th, 50th and 90th percentile of each measure over the layers; None where there is no number."""
    rows: list[tuple[Cell, ...]] = []
    for name, column in values.items():
        found = np.asarray([value for value in column if value is not None], dtype=np.float64)
        found = found[np.isfinite(found)]
        low, middle, high = np.percentile(found, (10, 50, 90)).tolist() if len(found) else (None, None, None)
        rows.append((name, cell(low), cell(middle), cell(high)))
    return Table(("measure", "p10", "p50", "p90"), rows)

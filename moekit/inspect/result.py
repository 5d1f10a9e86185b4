"""What every analysis returns: tables for programs, pictures for people, and how to read them."""

from typing import NamedTuple

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

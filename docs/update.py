"""Writes the tables that follow from the code: settings in docs/verbs/train.md, and defaults in docs/layouts.md.

Run it when a setting or a layout has changed.
"""

import json
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from moekit.config import Key, describe_keys
from moekit.formats.layouts import LAYOUTS
from moekit.formats.layouts.layout import REQUIRED, Null

BEGIN, END = "<!-- {}: written by docs/update.py -->\n", "<!-- end of {} -->\n"


def settings() -> str:
    """Returns one Markdown table per part of a run, a row per setting."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    def rows(keys: list[Key]) -> str:
        lines = [f"| `{k.key}` | {cell(k.type)} | {cell(k.default)} | {cell(k.description)} |\n" for k in keys]
        return "| key | type | default | what it is |\n| --- | --- | --- | --- |\n" + "".join(lines)

    parts = {part: list(keys) for part, keys in groupby(describe_keys(), lambda key: key.key.rpartition(".")[0])}
    return "\n".join(f"### {f'`{part}`' if part else 'The run'}\n\n{rows(keys)}" for part, keys in parts.items())


def defaults() -> str:
    """Returns one Markdown table, a row per field of a config.json and a column per layout."""

    def cell(default: Any) -> str:
        if default is REQUIRED or callable(default):
            return "required" if default is REQUIRED else "derived"
        return json.dumps(default.default if isinstance(default, Null) else default)

    columns = {
        name: {key: cell(value) for part in layout.parts for key, value in part.defaults.items()}
        for name, layout in LAYOUTS.items()
    }
    fields = sorted({key for column in columns.values() for key in column})
    lines = [f"| `{key}` | {' | '.join(column.get(key, '') for column in columns.values())} |\n" for key in fields]
    head = f"| field | {' | '.join(f'`{name}`' for name in columns)} |\n| --- |{' --- |' * len(columns)}\n"
    return head + "".join(lines)


DOCS = Path(__file__).parent
TABLES: dict[Path, tuple[str, Callable[[], str]]] = {
    DOCS / "verbs" / "train.md": ("settings", settings),
    DOCS / "layouts.md": ("defaults", defaults),
}


def updated(path: Path) -> str:
    """Returns a page with the tables between its two marks replaced."""
    name, table = TABLES[path]
    begin, end = BEGIN.format(name), END.format(name)
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    assert all((found, closed)), f"{path} has lost a mark: {begin.strip()} or {end.strip()}"
    return f"{before}{begin}\n{table()}\n{end}{after}"


if __name__ == "__main__":
    for page in TABLES:
        page.write_text(updated(page), encoding="utf-8")

"""Writes the tables of settings in docs/verbs/train.md from the configuration; run it when a setting has changed."""

from itertools import groupby
from pathlib import Path

from moekit.config import Key, describe_keys

PAGE = Path(__file__).parent / "verbs" / "train.md"
BEGIN, END = "<!-- settings: written by docs/update.py -->\n", "<!-- end of settings -->\n"


def settings() -> str:
    """Returns one Markdown table per part of a run, a row per setting."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|")

    def rows(keys: list[Key]) -> str:
        lines = [f"| `{k.key}` | {cell(k.type)} | {cell(k.default)} | {cell(k.description)} |\n" for k in keys]
        return "| key | type | default | what it is |\n| --- | --- | --- | --- |\n" + "".join(lines)

    parts = {part: list(keys) for part, keys in groupby(describe_keys(), lambda key: key.key.rpartition(".")[0])}
    return "\n".join(f"### {f'`{part}`' if part else 'The run'}\n\n{rows(keys)}" for part, keys in parts.items())


def updated(page: str) -> str:
    """Returns the page with the table between its two marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    assert end, f"{PAGE} has lost a mark: {BEGIN.strip()} or {END.strip()}"
    return f"{before}{BEGIN}\n{settings()}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text(encoding="utf-8")), encoding="utf-8")

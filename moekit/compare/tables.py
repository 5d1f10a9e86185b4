"""What `moekit compare` shows in the terminal."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from moekit.tables import short, table


def list_tables(rows: list[dict[str, Any]]) -> list[Table | str]:
    """Returns one row per ready-made comparison."""
    listed = table("comparison", "question", "architectures")
    for row in rows:
        listed.add_row(row["name"], row["title"], ", ".join(row["architectures"]))
    return [listed, "each at --size tiny, mini or 2b; next: moekit compare NAME --size tiny --data DATA --out DIR"]


def plan_tables(document: dict[str, Any]) -> list[Table | str]:
    """Returns what would be trained, and what it would spend."""
    budget, seeds = document["budget"], document["seeds"]
    listed = table(
        "architecture", ">total", ">active", ">FLOPs per token", ">steps", ">tokens", ">training FLOPs", "note"
    )
    for name, row in document["architectures"].items():
        note = "baseline" if name == document["baseline"] else ""
        note += f" taken from {escape(row['run'])}" if row["run"] else ""
        counts = (short(row[key]) for key in ("parameters", "active_parameters", "flops_per_token"))
        spent = (short(row[key]) for key in ("tokens", "training_flops"))
        listed.add_row(name, *counts, f"{row['steps']:,}", *spent, note.strip())
    rule = f"budget: {budget['rule']}, within {budget['tolerance']:.1%} of the baseline"
    if budget["rule"] == "equal_data":
        rule = "budget: equal_data, the same steps and batches for all"
    count = f"{document['runs']} runs (seeds {', '.join(map(str, seeds))}), {short(document['training_flops'])} FLOPs"
    return [f"[bold]{escape(document['title'])}[/bold]", listed, rule, count]


def result_tables(result: dict[str, Any]) -> list[Table | str]:
    """Returns the losses."""
    listed = table("architecture", "loss of each seed")
    for name, row in result["architectures"].items():
        listed.add_row(name, ", ".join(f"{one['loss']:.4f}" for one in row["seeds"].values()))
    failed = [f"{one['run']} failed: {escape(one['error'])} ({one['log']})" for one in result["failed"]]
    return [listed, *failed]

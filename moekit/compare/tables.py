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
    return [listed, "next: moekit compare NAME --size tiny --data DATA --out DIR"]


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
        spent = f"{row['steps']:,}", short(row["tokens"]), flops(row["training_flops"])
        listed.add_row(name, *counts, *spent, note.strip())
    rule = f"budget: {budget['rule']}, within {budget['tolerance']:.1%} of the baseline"
    if budget["rule"] == "equal_data":
        rule = "budget: equal_data, the same steps and batches for all"
    count = f"{document['runs']} runs (seeds {', '.join(map(str, seeds))}), {flops(document['training_flops'])} FLOPs"
    return [f"[bold]{escape(document['title'])}[/bold]", listed, rule, count]


def result_tables(result: dict[str, Any]) -> list[Table | str]:
    """Returns losses and differences, all pairs, domains, costs, somebody else's figures, and what failed."""
    baseline, rows = result["baseline"], result["architectures"]
    overall, bits = result["loss"]["mean"], result["bits_per_byte"]
    names = [*overall["summaries"]]
    scores = table("architecture", ">loss", ">sd", ">bits/byte", f">less {baseline}", ">95% interval")
    for name, one in overall["summaries"].items():
        gap = overall["differences"].get(name)
        shown = _number(one["mean"]), _number(one["sd"]), _number(bits["mean"]["summaries"][name]["mean"])
        between = f"{_signed(gap['low'])} to {_signed(gap['high'])}" if gap and gap["low"] is not None else ""
        scores.add_row(name, *shown, "baseline " if name == baseline else _gap(gap), between)

    spent = table("architecture", ">total", ">active", ">tokens", ">FLOPs", ">FLOPs/token", ">s", ">tokens/s")
    for name in names:
        row, timing = rows[name], rows[name]["timing"]
        counts = (short(row[key]) for key in ("parameters", "active_parameters", "tokens"))
        times = f"{timing['seconds']:,.0f}", f"{timing['tokens_per_second']:,.0f}"
        spent.add_row(name, *counts, flops(row["training_flops"]), short(row["flops_per_token"]), *times)

    domains = table("bits per byte", *(f">{name}" for name in names))
    for domain, one in bits["domains"].items():
        domains.add_row(escape(domain), *(_number(one["summaries"][name]["mean"]) for name in names))

    answers = [_answers(result["accuracy"], names, baseline)] if "accuracy" in result else []

    pairs = table("row less column", *(f">{name}" for name in names))
    for row in names:
        cells = (result["loss"]["pairs"][row].get(column) for column in names)
        pairs.add_row(row, *(_gap(cell) for cell in cells))
    seeds = ", ".join(map(str, result["seeds"]))
    marked = (
        f"seeds {seeds}; a star: the 95% interval of the paired difference excludes 0, each by itself: "
        "of twenty differences that mean nothing, one would too"
    )
    if len(result["seeds"]) == 1:
        marked = f"seed {seeds} alone: no interval, and nothing can be concluded"

    failed = [f"{one['run']} failed: {escape(one['error'])} ({escape(one['log'])})" for one in result["failed"]]
    parts: list[Table | str] = [
        f"[bold]{escape(result['title'])}[/bold]",
        scores,
        pairs,
        marked,
        *answers,
        domains,
        spent,
    ]
    return [*parts, *(_expected(one, baseline, overall) for one in result["expected"]), *failed, result["report"]]


def _answers(accuracy: dict[str, Any], names: list[str], baseline: str) -> Table:
    """Returns the shares of right answers, in all and by group, with the difference to the baseline."""
    overall, groups = accuracy["mean"], accuracy["domains"]
    columns = (f">right of {accuracy['questions']:,}", ">sd", f">less {baseline}", *(f">{group}" for group in groups))
    listed = table("answers", *columns)
    for name in names:
        one, gap = overall["summaries"][name], overall["differences"].get(name)
        shares = (_number(of["summaries"][name]["mean"]) for of in groups.values())
        listed.add_row(name, _number(one["mean"]), _number(one["sd"]), _gap(gap), *shares)
    return listed


def _expected(one: dict[str, Any], baseline: str, ours: dict[str, Any]) -> Table:
    listed = table(escape(one["measure"]), ">printed", f">less {baseline}", ">our loss less it", "direction")
    for name, value in one["values"].items():
        gap, theirs = ours["differences"].get(name), one["differences"].get(name)
        shown = f"{value:g}", "" if theirs is None else f"{theirs:+.3f}", _signed(gap["mean"]) if gap else ""
        listed.add_row(name, *shown, one["agreement"].get(name, ""))
    return listed


def flops(count: float) -> str:
    """Returns 346.37T, or from 10^15 on 3.46e+15."""
    return short(count) if count < 1e15 else f"{count:.2e}"


def _gap(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    clear = one["low"] is not None and (one["low"] > 0 or one["high"] < 0)
    return _signed(one["mean"]) + ("*" if clear else " ")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _signed(value: float) -> str:
    return f"{value:+.4f}"

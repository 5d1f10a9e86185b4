"""A run in the terminal: progress, loss, speed, and the load of every layer at a glance."""

from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from moekit.config import RunConfig

BARS = " ▁▂▃▄▅▆▇█"
MOST_LAYERS = 12
"""Layers shown; of deeper models an even choice."""


class TerminalProgress:
    """A sink for standard error: one line a record; on a terminal a live display of the latest ones, below alarms."""

    def __init__(self, config: RunConfig, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._progress = Progress(TextColumn("[bold]training"), *columns, console=self.console)
        self._task = self._progress.add_task("steps", total=config.steps)
        self._latest: dict[str, dict[str, Any]] = {}
        self._live = Live(get_renderable=self._picture, console=self.console, refresh_per_second=4)
        if self.console.is_terminal:
            self._live.start()

    def record(self, record: dict[str, Any]) -> None:
        self._latest = self._latest | {record["kind"]: record}  # a new one: the display reads it in its own thread
        self._progress.update(self._task, completed=record["step"])
        if not self._live.is_started or record["kind"] == "alarm":
            style = "bold red" if record["kind"] == "alarm" else None
            self.console.print(
                line(record, self.config.steps), style=style, highlight=False, soft_wrap=True, markup=False
            )

    def close(self) -> None:
        self._live.stop()

    def _picture(self) -> Group:
        parts: list[RenderableType] = [self._progress]
        if train := self._latest.get("train"):
            aux = (f"  {name.replace('_', ' ')} {value:.4f}" for name, value in train["aux"].items())
            parts.append(Text("".join([line(train, self.config.steps), *aux]), style="bold"))
            if train["load"]:
                parts.append(self._load(train))
        if validation := self._latest.get("eval"):
            parts.append(Text(line(validation, self.config.steps)))
        return Group(*parts)

    def _load(self, record: dict[str, Any]) -> Table:
        titles = ("layer", "load of each expert, busiest first", "max violation", "entropy", "dead")
        columns = (Column(title, justify="left" if "load" in title else "right", no_wrap=True) for title in titles)
        table = Table(*columns, box=None, header_style="dim", padding=(0, 2))
        layers, load = self.config.model.moe_layers, record["load"]
        for i in range(0, len(layers), -(-len(layers) // MOST_LAYERS)):
            violation, entropy, dead = (load[name][i] for name in ("max_violation", "entropy", "dead"))
            bars = spark(record["tokens_per_expert"][i])
            alive = f"[red]{dead}[/]" if dead else "0"
            table.add_row(str(layers[i]), bars, f"{violation:.2f}", f"{entropy:.3f}", alive)
        return table


def line(record: dict[str, Any], steps: int) -> str:
    """Returns a record in one line."""
    step = f"step {record['step']}"
    if record["kind"] == "alarm":
        return f"{step}  ALARM {record['text']}"
    if record["kind"] == "eval":
        if "metrics" in record:
            metrics = "  ".join(f"{name} {value:.4f}" for name, value in record["metrics"].items())
            return f"{step}  validation loss {record['loss']:.4f}  {metrics}"
        measure = "accuracy" if "accuracy" in record else "bits_per_byte"
        domains = "  ".join(f"{name} {s[measure]:.3f}" for name, s in record["domains"].items())
        return f"{step}  validation loss {record['loss']:.4f}  {measure.replace('_', ' ')}: {domains}"
    load = record["load"]
    worst = f"  load +{max(load['max_violation']):.0%}" if load else ""
    dead = f"  dead {sum(load['dead'])}" if load and sum(load["dead"]) else ""
    return (
        f"{step}/{steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
        f"{record['tokens_per_second']:,.0f} tokens/s  {record['matmul_share']:.0%} of matmul{worst}{dead}"
    )


def spark(counts: list[int], width: int = 64) -> str:
    """Returns one bar per expert, tallest first, a full bar being twice the mean load; wide layers are thinned out."""
    ordered = sorted(counts, reverse=True)
    ordered = ordered[:: -(-len(ordered) // width)]
    mean = max(sum(counts) / len(counts), 1e-9)
    return "".join(BARS[0 if not c else min(8, max(1, round(c / mean * 4)))] for c in ordered)

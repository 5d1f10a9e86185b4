"""A run in the terminal: progress, loss, speed, and the load of every layer at a glance."""

from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from moekit.config import RunConfig

BARS = " ▁▂▃▄▅▆▇█"
MOST_LAYERS = 12
"""Layers shown; of deeper models an even choice."""


class TerminalProgress:
    """A sink for standard error: a live display on a terminal, one line a log step elsewhere."""

    def __init__(self, config: RunConfig, console: Console | None = None) -> None:
        self.config = config
        self.console = console or Console(stderr=True)
        self._train: dict[str, Any] = {}
        self._eval: dict[str, Any] = {}
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._task = self._progress.add_task("steps", total=config.steps)
        self._live = None
        if self.console.is_terminal:
            self._live = Live(self._picture(), console=self.console, refresh_per_second=4)
            self._live.start()

    def record(self, record: dict[str, Any]) -> None:
        kind = record["kind"]
        if kind == "train":
            self._train = record
            self._progress.update(self._task, completed=record["step"])
        elif kind == "eval":
            self._eval = record
        if self._live is not None:
            if kind == "alarm":
                self._live.console.print(
                    f"[bold red]alarm[/] step {record['step']}: {escape(record['text'])}", highlight=False
                )
            self._live.update(self._picture())
        else:
            self.console.print(self._line(record), highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()

    def _line(self, record: dict[str, Any]) -> str:
        if record["kind"] == "alarm":
            return f"step {record['step']}  ALARM {record['text']}"
        if record["kind"] == "eval":
            domains = "  ".join(f"{name} {s['bits_per_byte']:.3f}" for name, s in record["domains"].items())
            return f"step {record['step']}  validation loss {record['loss']:.4f}  bits per byte: {domains}"
        worst = f"  load +{max(record['load']['max_violation']):.0%}" if record["load"] else ""
        dead = f"  dead {sum(record['load']['dead'])}" if record["load"] and sum(record["load"]["dead"]) else ""
        return (
            f"step {record['step']}/{self.config.steps}  loss {record['loss']:.4f}  lr {record['lr']:.2e}  "
            f"{record['tokens_per_second']:,.0f} tokens/s  {record['matmul_share']:.0%} of matmul{worst}{dead}"
        )

    def _picture(self) -> Group:
        parts: list[Any] = [self._progress]
        if self._train:
            facts = Table.grid(padding=(0, 3))
            record = self._train
            cells = [
                f"loss [bold]{record['loss']:.4f}[/]",
                *(f"{name.replace('_', ' ')} {value:.4f}" for name, value in record["aux"].items()),
                f"lr {record['lr']:.2e}",
                f"{record['tokens_per_second']:,.0f} tokens/s",
                f"{record['matmul_share']:.0%} of the machine's matmul speed",
            ]
            facts.add_row(*cells)
            parts.append(facts)
            if record["load"]:
                parts.append(self._load(record))
        if self._eval:
            scores = "   ".join(f"{name} {score['bits_per_byte']:.3f}" for name, score in self._eval["domains"].items())
            parts.append(escape(f"validation at step {self._eval['step']}, bits per byte: {scores}"))
        return Group(*parts)

    def _load(self, record: dict[str, Any]) -> Table:
        table = Table(box=None, header_style="dim", padding=(0, 2))
        for title in ("layer", "load of each expert, busiest first", "max violation", "entropy", "dead"):
            table.add_column(title, justify="left" if title.startswith("load") else "right", no_wrap=True)
        layers = self.config.model.moe_layers
        step = -(-len(layers) // MOST_LAYERS)
        for i in range(0, len(layers), step):
            load = record["load"]
            dead = load["dead"][i]
            table.add_row(
                str(layers[i]),
                spark(record["tokens_per_expert"][i]),
                f"{load['max_violation'][i]:.2f}",
                f"{load['entropy'][i]:.3f}",
                f"[red]{dead}[/]" if dead else "0",
            )
        return table


def spark(counts: list[int], width: int = 64) -> str:
    """Returns one bar per expert, tallest first, a full bar being twice the mean load; wide layers are thinned out."""
    ordered = sorted(counts, reverse=True)
    ordered = ordered[:: -(-len(ordered) // width)]
    mean = max(sum(counts) / len(counts), 1e-9)
    return "".join(BARS[0 if not c else min(8, max(1, round(c / mean * 4)))] for c in ordered)

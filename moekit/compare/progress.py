"""A comparison in the terminal: what is done, what runs, how long it will take."""

from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moekit.compare.plan import training_flops
from moekit.compare.runner import Status


class TerminalProgress:
    """A watch for standard error: on a terminal a bar for all of it and one for each run at work, else a line a run."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
        times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self._bars = Progress(*columns, *times, console=self.console, speed_estimate_period=600)
        self._all: TaskID | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told: dict[str, str] = {}

    def __call__(self, statuses: Sequence[Status]) -> None:
        if self.console.is_terminal:
            self._draw(statuses)
        for number, status in enumerate(statuses, start=1):
            label, now = status.run.label, status.state
            if self._told.get(label, "waiting") != now:
                self._told[label] = now
                loss = f", loss {status.loss:.4f}" if status.loss is not None else ""
                text = f"{number}/{len(statuses)}  {label}  {now}, step {status.step}/{status.run.config.steps}{loss}"
                if now != "running" or not self.console.is_terminal:
                    text = f"{text}  {status.error}" if status.error else text
                    self.console.print(text, highlight=False, soft_wrap=True, markup=False)

    def _draw(self, statuses: Sequence[Status]) -> None:
        """Moves the bars. All of the work is counted in FLOPs, as runs of one comparison can cost differently."""
        costs = [training_flops(status.run.config) for status in statuses]
        done = [cost * s.step // s.run.config.steps for cost, s in zip(costs, statuses, strict=True)]
        if self._all is None:
            # what was done before must not count as speed
            self._all = self._bars.add_task("[bold]all runs", total=sum(costs), completed=sum(done), text="")
            self._bars.start()
        finished = sum(status.state == "done" for status in statuses)
        self._bars.update(self._all, completed=sum(done), text=f"{finished}/{len(statuses)} runs")
        for status in statuses:
            label, total = status.run.label, status.run.config.steps
            loss = f" loss {status.loss:.4f}" if status.loss is not None else ""
            if status.state == "running":
                if label not in self._tasks:
                    self._tasks[label] = self._bars.add_task(label, total=total, completed=status.step, text="")
                self._bars.update(self._tasks[label], completed=status.step, text=f"{status.step}/{total}{loss}")
            elif label in self._tasks:
                self._bars.remove_task(self._tasks.pop(label))

    def close(self) -> None:
        self._bars.stop()

"""A training run as it goes on: the load of every expert and the domains that it works for, as its records come in.

Only what the run writes is read: config.yaml, metrics.jsonl, and receipt.json, which ends it. The run knows nothing.
"""

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from moekit import files, receipts
from moekit.config import RunConfig, load_run_config
from moekit.errors import CheckpointError, ConfigError
from moekit.inspect.domains import shares, work
from moekit.train.metrics import FILE
from moekit.train.progress import BARS, MOST_LAYERS, line

LOADS = ("blue", "cyan", "default", "yellow", "red")
"""Colours of a quarter, half, once, twice and four times the mean load."""
DOMAINS = ("green", "magenta", "yellow", "blue", "red", "cyan", "bright_green", "bright_magenta", "bright_yellow")
MOST = 0.5
"""An expert is a domain's own if that is more than this of its work."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
NONE, NOBODY = "·", " "
"""An expert without a token, and one that no domain uses much more than the others do."""


class State(NamedTuple):
    """The newest of a run's records by kind, and what became of the domains' own experts so far."""

    train: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None
    alarms: tuple[dict[str, Any], ...] = ()
    own: tuple[float, ...] = ()
    """At each validation, the fraction of all experts that have most of their work from one domain."""


class Follower:
    """The records of a file that grows, each once; all from the beginning again when the file was written anew."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset, self._file = 0, -1

    def new(self) -> tuple[bool, list[dict[str, Any]]]:
        """Returns whether the file began anew (a resumed run), and its records since. No file yet: no records.

        A last line without its end waits for the rest; a line that is no record (a kill may cut one) is passed over.
        """
        try:
            with self.path.open("rb") as file:
                found = os.fstat(file.fileno())
                anew = found.st_ino != self._file or found.st_size < self._offset
                self._file, self._offset = found.st_ino, 0 if anew else self._offset
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:
            return False, []
        whole = text[: text.rfind(b"\n") + 1]
        self._offset += len(whole)
        return anew, list(_records(whole))


def watch(run: Path, console: Console | None = None, poll: float = 1.0) -> State:
    """Returns the last state of a run after showing every one, until the run ends or Ctrl-C is pressed.

    In a terminal it is a picture that changes in place; elsewhere each record is a line, which a resumed run does not
    repeat. A run that has not begun is waited for; one that was killed has no end, so it is watched on, and when it is
    resumed it is seen. Raises ConfigError for a directory that holds something else. `poll` is in seconds.
    """
    console = console or Console()
    _check(run)
    follower, state, told = Follower(run / FILE), State(), set[tuple[str, int]]()
    with suppress(KeyboardInterrupt), ExitStack() as screen:
        live = screen.enter_context(Live(console=console, auto_refresh=False)) if console.is_terminal else None
        if live is not None:
            live.update(_text(f"waiting for {run / FILE}", "dim"), refresh=True)
        elif not (run / FILE).exists():
            console.print(f"waiting for {run / FILE}", highlight=False, soft_wrap=True, markup=False)
        while True:
            over = status(run) != "running"  # asked first: what was written before the end is still read
            anew, records = follower.new()
            for record in records:
                state, anew = after(State() if anew else state, record), False
                key = record["kind"], record["step"]
                if live is None and key not in told:
                    console.print(_line(record, _config(run).steps), highlight=False, soft_wrap=True, markup=False)
                told.add(key)
            if live is not None and state.train:
                live.update(picture(state, _config(run), status(run), console), refresh=True)
            if over:
                break
            time.sleep(poll)
    return state


def latest(run: Path) -> dict[str, Any]:
    """Returns what a run has come to so far, as one document: its status and its newest records."""
    _check(run)
    if not (run / FILE).is_file():
        raise ConfigError(f"{run} has no {FILE} yet; is it the directory that `moekit train --out` was given?")
    state = State()
    for record in Follower(run / FILE).new()[1]:
        state = after(state, record)
    return {"run": str(run), "status": status(run), "steps": _config(run).steps, **state._asdict()}


def status(run: Path) -> str:
    """Returns running, or what the run's receipt says if it is younger than the last record: done, interrupted."""
    try:
        ended = (run / receipts.FILE).stat().st_mtime_ns >= (run / FILE).stat().st_mtime_ns
    except FileNotFoundError:
        return "running"
    if not ended:
        return "running"
    return str(files.read_json(run / receipts.FILE, dict[str, Any], CheckpointError).get("status", "done"))


def after(state: State, record: dict[str, Any]) -> State:
    """Returns the state after one more record."""
    if record["kind"] == "alarm":
        return state._replace(alarms=(*state.alarms, record))
    if record["kind"] != "eval":
        return state._replace(train=record)
    own = _own(use_of(record))
    return state._replace(eval=record, own=state.own if own is None else (*state.own, own))


def use_of(validation: dict[str, Any]) -> Float[np.ndarray, "domains layers experts"]:
    """Returns how much of an expert's work each domain is, as a validation's record has counted it."""
    counts = [one["tokens_per_expert"] for one in validation["domains"].values()]
    return work(shares(np.array(counts, dtype=np.float64)))


def picture(state: State, config: RunConfig, status: str, console: Console) -> Group:
    """Returns the loss, a strip of experts for each layer by load, another by domain, and the domains."""
    width = max(8, console.width - 44)
    domains = len(state.eval["domains"]) if state.eval else 0
    rows = max(1, min(MOST_LAYERS, (console.height - 10 - domains) // (2 if domains > 1 else 1)))
    parts: list[RenderableType] = [_text(f"{status}  {line(state.train, config.steps) if state.train else ''}", "bold")]
    if state.train and state.train["load"]:
        parts.append(_loads(state.train, config.model.moe_layers, rows, width))
    if state.eval:
        use = use_of(state.eval)
        if _own(use) is not None:
            parts.append(_uses(use, config.model.moe_layers, rows, width))
        parts.append(_domains(state.eval, use))
    if state.own:
        parts.append(
            _text("experts that work mostly for one domain: " + ", ".join(f"{own:.0%}" for own in state.own[-8:]))
        )
    parts += [_text(alarm["text"], "bold red") for alarm in state.alarms[-2:]]
    return Group(*parts)


def _loads(record: dict[str, Any], layers: Sequence[int], rows: int, width: int) -> Table:
    table = _table("layer", "load of each expert, in their order", ">max/mean", ">entropy", ">dead")
    for at in _spread(len(layers), rows):
        violation, entropy, dead = (record["load"][name][at] for name in ("max_violation", "entropy", "dead"))
        load = _pooled(np.array(record["tokens_per_expert"][at], dtype=np.float64), width)
        relative = load / max(load.mean(), 1e-9)
        strip = Text()
        for one in relative:
            height = BARS[min(8, max(1, round(4 * one)))]
            colour = LOADS[int(np.clip(round(np.log2(max(one, 1e-9))), -2, 2)) + 2]
            strip.append(height if one else NONE, style=colour if one else "red")
        alive = Text(str(dead), style="red" if dead else "")
        table.add_row(str(layers[at]), strip, f"{1 + violation:.2f}", f"{entropy:.3f}", alive)
    return table


def _uses(use: Float[np.ndarray, "domains layers experts"], layers: Sequence[int], rows: int, width: int) -> Table:
    table = _table("layer", "domain that each expert works for", ">of one")
    for at in _spread(len(layers), rows):
        strip = Text()
        for one in _pooled(use[:, at].T, width):
            best = int(one.argmax())
            letter = LETTERS[best % len(LETTERS)]
            mine = letter.upper() if one[best] > MOST else letter if one[best] * len(one) >= 1.5 else NOBODY
            strip.append(mine if one.any() else NONE, style=DOMAINS[best % len(DOMAINS)] if one.any() else "red")
        table.add_row(str(layers[at]), strip, f"{(use[:, at].max(0) > MOST).mean():.0%}")
    return table


def _domains(record: dict[str, Any], use: Float[np.ndarray, "domains ..."]) -> Table:
    table = _table("", "domain", ">loss", ">bits per byte", ">experts of its own")
    for at, (name, score) in enumerate(record["domains"].items()):
        letter = Text(LETTERS[at % len(LETTERS)], style=DOMAINS[at % len(DOMAINS)])
        own = str(int((use[at] > MOST).sum())) if use.size and len(use) > 1 else ""
        table.add_row(letter, Text(name), f"{score['loss']:.4f}", f"{score['bits_per_byte']:.3f}", own)
    return table


def _line(record: dict[str, Any], steps: int) -> str:
    """Returns a record in one line, with the domains' experts."""
    text = line(record, steps)
    if record["kind"] != "eval" or _own(use_of(record)) is None:
        return text
    own = {name: int((use > MOST).sum()) for name, use in zip(record["domains"], use_of(record), strict=True)}
    return f"{text}  experts of its own: {'  '.join(f'{name} {number}' for name, number in own.items())}"


def _own(use: Float[np.ndarray, "domains ..."]) -> float | None:
    """Returns the fraction of experts that have most of their work from one domain; None where nothing can be told."""
    return float((use.max(0) > MOST).mean()) if use.size and len(use) > 1 else None


def _pooled(values: Float[np.ndarray, "experts ..."], width: int) -> Float[np.ndarray, "cells ..."]:
    """Returns a value for each expert, or the means of neighbours where there are more than `width`."""
    return np.stack([part.mean(0) for part in np.array_split(values, min(width, len(values)))])


def _text(text: str, style: str = "") -> Text:
    """Returns a text that takes one line, cut where the screen ends."""
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _spread(layers: int, rows: int) -> range:
    return range(0, layers, -(-layers // rows))


def _table(*headers: str) -> Table:
    """Returns an empty table; a header that begins with > is a column of numbers."""
    columns = (Column(h.lstrip(">"), justify="right" if h[:1] == ">" else "left", no_wrap=True) for h in headers)
    return Table(*columns, box=None, header_style="dim", padding=(0, 2, 0, 0))


def _records(text: bytes) -> Iterator[dict[str, Any]]:
    for found in text.split(b"\n"):
        with suppress(ValueError):
            record = json.loads(found)
            if isinstance(record, dict) and {"kind", "step"} <= record.keys():
                yield record


def _config(run: Path) -> RunConfig:
    return load_run_config(run / "config.yaml")


def _check(run: Path) -> None:
    """Raises ConfigError for what is no run and will become none."""
    if not run.exists() or (run / "config.yaml").is_file():
        return
    if not run.is_dir() or any(not entry.name.startswith(".") for entry in run.iterdir()):
        raise ConfigError(
            f"{run} has no config.yaml, so it is no training run; give what `moekit train --out` was given"
        )

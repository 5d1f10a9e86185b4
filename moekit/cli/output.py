"""What a verb says: one document or tables on standard output, bars on standard error; and what it reads."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moekit.errors import DataError

if TYPE_CHECKING:
    from rich.table import Table

    from moekit.config import Strict


def emit(args: argparse.Namespace, document: Any, make_tables: Callable[[], Sequence["Table | str"]]) -> int:
    """Writes the document with --json, else the tables; returns the exit status 0."""
    if args.json:
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        return 0
    from rich.console import Console

    # a pipe has no width, for which rich would take 80 and cut figures
    wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 200
    console = Console(highlight=False, width=wide)
    with console.capture() as text:  # rich would end the process by itself on a broken pipe
        for part in make_tables():
            console.print(part, soft_wrap=isinstance(part, str))  # a command must stay in one piece
    sys.stdout.write(text.get())
    return 0


def emit_config(args: argparse.Namespace, config: "Strict") -> int:
    from moekit.config import dump

    if args.json:
        return emit(args, config.model_dump(mode="json"), list)
    sys.stdout.write(dump(config, comments=True))
    return 0


@contextlib.contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields what draws a bar on standard error for each phase, given bytes done and bytes in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:>10}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    tasks = {}

    def progress(phase: str, done: int, total: int) -> None:
        bars.start()  # only now: it writes an empty line even for a mistake that is found before any work
        if phase not in tasks:
            for earlier in bars.tasks:  # the tokenizer is done when its text runs out, below its limit
                bars.update(earlier.id, total=earlier.completed)
            tasks[phase] = bars.add_task(phase)
        bars.update(tasks[phase], completed=done, total=total)

    try:
        yield progress
    finally:
        if tasks:
            bars.stop()


def read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")  # a byte-order mark is no text
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: byte {error.start}") from None

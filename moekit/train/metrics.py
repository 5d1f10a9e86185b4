"""Where measurements go: metrics.jsonl always, the terminal and TensorBoard on request."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from moekit import files
from moekit.errors import UnsupportedError

FILE = "metrics.jsonl"


class Sink(Protocol):
    """Takes every record of a run. `kind` is train, eval or alarm."""

    def record(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """RUN/metrics.jsonl, one record a line, each line written through at once."""

    def __init__(self, run: Path, step: int) -> None:
        """Opens the file; lines after `step`, which a killed run left behind, are removed in one atomic step."""
        self.path = run / FILE
        if self.path.exists():
            text = self.path.read_text(encoding="utf-8", errors="replace")  # a kill may have cut a character
            kept = [line for line in text.split("\n") if _step(line) <= step]
            files.write(self.path, "".join(f"{line}\n" for line in kept))
        self._file = self.path.open("a", buffering=1, encoding="utf-8")  # a line is on its way when it is written

    def record(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """RUN/tensorboard: losses, rates and load as scalars."""

    def __init__(self, run: Path, step: int) -> None:
        """Opens the folder; what a killed run wrote after `step` is hidden."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UnsupportedError(
                "tensorboard is true but the package is missing; pip install 'moekit[track]'"
            ) from None
        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def record(self, record: dict[str, Any]) -> None:
        if record["kind"] == "alarm":
            self._writer.add_text("alarm", record["text"], record["step"])
            return
        for name, value in _scalars(record):
            self._writer.add_scalar(f"{record['kind']}/{name}", value, record["step"])

    def close(self) -> None:
        self._writer.close()


def read(run: Path) -> list[dict[str, Any]]:
    """Returns all records of a run."""
    return [json.loads(line) for line in (run / FILE).read_text(encoding="utf-8").split("\n") if line]


def _step(line: str) -> float:
    """Returns the step of a line; infinity for one that a kill cut short."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _scalars(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yields every number of a record under its path; layers become path elements, single experts are left out."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, list) and key != "tokens_per_expert":
            yield from ((f"{prefix}{key}/layer{i}", float(number)) for i, number in enumerate(value))
        elif isinstance(value, int | float) and key != "step":
            yield prefix + key, float(value)

"""What the report knows of a run: its configuration and its log, read back from the run's directory."""

from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from moekit.config import RunConfig, load_run_config
from moekit.errors import DataError
from moekit.train import metrics


class Result(NamedTuple):
    """One run. `theme` is the page's colour for it, first or second."""

    name: str
    path: Path
    theme: str
    config: RunConfig
    train: list[dict[str, Any]]
    evals: list[dict[str, Any]]
    alarms: list[dict[str, Any]]

    @property
    def tokens(self) -> int:
        """Tokens read."""
        return int(self.train[-1]["tokens"])

    @property
    def seconds(self) -> float:
        """Time spent on training, validation and checkpoints aside."""
        return max(float(self.train[-1]["seconds"]), 1e-9)

    @property
    def flops(self) -> float:
        """Training FLOPs per token."""
        length = self.config.data.sequence_length
        return self.config.model.flops(length) / length

    @property
    def matmul_share(self) -> float:
        """Share of the measured matmul speed, of 1, in half of the log's steps."""
        return float(median(record["matmul_share"] for record in self.train))

    @property
    def score(self) -> float | None:
        """Bits per byte of unseen text at the end, mean of the domains; None without validation text."""
        return float(self.evals[-1]["bits_per_byte"]) if self.evals else None

    @property
    def domains(self) -> dict[str, float]:
        """Bits per byte of unseen text at the end, by domain."""
        return {name: d["bits_per_byte"] for name, d in self.evals[-1]["domains"].items()} if self.evals else {}


def read_result(name: str, path: Path, theme: str) -> Result:
    """Returns the run in `path`. Raises DataError when it has not logged a training step yet."""
    records = metrics.read(path)
    train, evals, alarms = ([r for r in records if r["kind"] == kind] for kind in ("train", "eval", "alarm"))
    if not train:
        file = path / metrics.FILE
        raise DataError(f"{file} has no record of kind train, so there is nothing to report; train first")
    return Result(name, path, theme, load_run_config(path / "config.yaml"), train, evals, alarms)

"""What a run can learn: a file each, with where its batches come from, its loss and its validation."""

from pathlib import Path

from moekit.config import RunConfig
from moekit.train.hardware import Hardware
from moekit.train.objectives.masked import Masked
from moekit.train.objectives.next_token import NextToken
from moekit.train.objectives.objective import Objective as Objective
from moekit.train.objectives.sentences import Sentences

OBJECTIVES: dict[str, type[NextToken] | type[Masked] | type[Sentences]] = {
    "next_token": NextToken,
    "masked": Masked,
    "sentences": Sentences,
}


def open_objective(config: RunConfig, hardware: Hardware, weights: Path | None = None) -> Objective:
    """Returns the objective of a run, its data opened and checked.

    `weights` is the directory that its weights are read from, where they are not drawn.
    """
    return OBJECTIVES[config.objective.kind](config, hardware, weights)

"""What a run can learn: a file each, with where its batches come from, its loss and its validation."""

from moekit.config import RunConfig
from moekit.train.hardware import Hardware
from moekit.train.objectives.masked import Masked
from moekit.train.objectives.next_token import NextToken
from moekit.train.objectives.objective import Objective as Objective

OBJECTIVES: dict[str, type[NextToken] | type[Masked]] = {"next_token": NextToken, "masked": Masked}


def open_objective(config: RunConfig, hardware: Hardware) -> Objective:
    """Returns the objective of a run, its data opened and checked."""
    return OBJECTIVES[config.objective.kind](config, hardware)

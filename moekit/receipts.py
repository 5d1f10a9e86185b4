"""What a step consumed, created and proved, in a form that a machine can check again."""

import datetime
import math
import operator
import platform
from typing import Any

import numpy
import safetensors
import torch
from pydantic import Field

from moekit.config import ModelConfig, Strict, parameters
from moekit.version import __version__

FILE = "receipt.json"


def now() -> str:
    """Returns the time, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def versions() -> dict[str, str]:
    """Returns the versions that a result can depend on."""
    return {
        "moekit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "safetensors": safetensors.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


class Receipt(Strict):
    """The fields of receipt.json."""

    action: str
    time: str = Field(default_factory=now)
    config: dict[str, Any] = Field(description="what the step was told")
    inputs: dict[str, Any] = Field({}, description="what it read, by hash")
    outputs: dict[str, Any] = Field({}, description="what it wrote, by hash")
    tensors: dict[str, dict[str, Any] | list[str]] = Field(
        {}, description="every source tensor: used, created, dropped and why"
    )
    parameters_by_role: dict[str, int]
    trained_by_role: dict[str, int]
    health: dict[str, Any] = Field({}, description="the state of the routing")
    checks: list[dict[str, Any]] = Field([], description="measured values, each with its bound and whether it held")
    seed: int | None = None
    device: str = "cpu"
    seconds: float | None = None
    versions: dict[str, str] = Field(default_factory=versions)


def make(action: str, model: ModelConfig, *, trains: bool = False, **account: Any) -> dict[str, Any]:
    """Returns the receipt of one step, JSON-ready; `account` holds the other fields of `Receipt`.

    `trains` says that every parameter was trained.
    """
    roles = {role: count.total for role, count in parameters(model).items()}
    trained = roles if trains else {}
    return Receipt(action=action, parameters_by_role=roles, trained_by_role=trained, **account).model_dump()


def faults(receipt: Receipt) -> list[str]:
    """Returns where a receipt contradicts itself."""
    roles, trained = receipt.parameters_by_role, receipt.trained_by_role
    found = [f"{role}: more is trained than there is" for role in trained if trained[role] > roles.get(role, 0)]
    for check in receipt.checks:
        name, value, held = (check.get(key) for key in ("name", "value", "held"))
        sign, _, bound = str(check.get("bound")).partition(" ")
        try:
            measured = math.nan if value is None else value  # null: it was not a number
            holds = {"<=": operator.le, ">=": operator.ge}[sign](measured, float(bound))
        except (KeyError, TypeError, ValueError):
            found.append(f"the check {name!r} has no value or no bound")
            continue
        if holds is not held:
            found.append(f"the check {name!r} says that {value} {sign} {bound} is {held}")
    used = {*receipt.tensors.get("used", ())}
    return found + [
        f"{key} is {what} and used"
        for what in ("created", "dropped")
        for key in receipt.tensors.get(what, ())
        if key in used
    ]

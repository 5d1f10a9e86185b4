"""What every configuration is: typed, frozen, strict."""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, model_validator

FLOAT32 = 3.4e38
"""No number of a setting may be larger: torch would fail where it is used."""


class Strict(BaseModel):
    """Base of every configuration: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
    default_kinds: ClassVar[dict[str, str]] = {}
    """The `kind` of a part that does not name its own."""

    @model_validator(mode="before")
    @classmethod
    def _default_kinds(cls, values: Any) -> Any:
        if isinstance(values, dict):
            for key, kind in cls.default_kinds.items():
                part = values.get(key)
                if isinstance(part, dict) and "kind" not in part:
                    values = {**values, key: {"kind": kind, **part}}
        return values

    @model_validator(mode="after")
    def _held(self) -> Self:
        for name, value in self:
            if isinstance(value, int | float) and abs(value) > FLOAT32:
                raise ValueError(f"{name} is larger than float32 holds, {FLOAT32:g}")
        return self

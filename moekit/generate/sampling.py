"""Logits to the next token."""

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field, model_validator
from torch import Tensor

from moekit.config import Strict


class SamplingSettings(Strict):
    """How the next token is drawn. Filters apply in this order: repetition, temperature, top-k, top-p, min-p."""

    temperature: float = Field(0.0, ge=0, description="0: the likeliest token; 1: the model's own distribution")
    top_k: int | None = Field(None, gt=0, description="only the k likeliest tokens")
    top_p: float | None = Field(None, gt=0, le=1, description="the fewest tokens whose probability reaches p")
    min_p: float | None = Field(None, ge=0, le=1, description="tokens of at least p times the likeliest's probability")
    repetition_penalty: float = Field(1.0, gt=0, description="above 1: tokens seen before get less likely (CTRL)")
    seed: int | None = Field(None, ge=0, lt=2**63, description="of the draws; null: another text every time")

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn: at 0, and where float32 does not tell the temperature from it."""
        return self.temperature < torch.finfo(torch.float32).tiny

    @model_validator(mode="after")
    def _check(self) -> "SamplingSettings":
        for name in ("top_k", "top_p", "min_p"):
            if self.temperature == 0 and getattr(self, name) is not None:
                found = f"{name} is {getattr(self, name)} but temperature is 0, at which nothing is drawn"
                raise ValueError(f"{found}; set a temperature, 1 for the model's own distribution")
        return self


def filtered(
    logits: Float[Tensor, "batch vocab"], settings: SamplingSettings, seen: Bool[Tensor, "batch vocab"] | None = None
) -> Float[Tensor, "batch vocab"]:
    """Returns the logits to draw from, minus infinity where a token is ruled out; at least one token stays.

    The repetition penalty divides positive logits of seen tokens and multiplies negative ones (CTRL, arXiv 1909.05858).
    """
    logits = logits.float()
    if seen is not None and settings.repetition_penalty != 1.0:
        penalty = settings.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if settings.greedy:
        return logits
    logits = (logits - logits.amax(-1, keepdim=True)) / settings.temperature  # the largest is 0: no overflow
    if settings.top_k is not None:
        order = logits.sort(descending=True, stable=True).indices  # among equals the lower id stays, as in greedy
        logits = logits.scatter(1, order[:, settings.top_k :], -torch.inf)
    if settings.top_p is not None and settings.top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        beyond = p.cumsum(-1) - p >= settings.top_p  # what stands before already reaches p
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    if settings.min_p:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < settings.min_p * p.amax(-1, keepdim=True), -torch.inf)
    return logits


def draw(
    logits: Float[Tensor, "batch vocab"],
    settings: SamplingSettings,
    seen: Bool[Tensor, "batch vocab"] | None,
    generators: list[torch.Generator],
) -> Int[Tensor, " batch"]:
    """Returns one token per sequence; each sequence has its own random stream, so a batch does not change a text."""
    logits = filtered(logits, settings, seen)
    if settings.greedy:
        return logits.argmax(-1)
    p = logits.softmax(-1)
    return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(p, generators, strict=True)])

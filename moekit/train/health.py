"""Load health: how evenly experts are used, and which of them died."""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moekit.ops.balance import LoadSums
from moekit.ops.routing import Routing


class Health(NamedTuple):
    """One number per MoE layer."""

    max_violation: list[float]
    """Largest load / mean load - 1 (arXiv 2408.15664): 0 is perfect balance."""
    entropy: list[float]
    """Entropy of the load as a fraction of its largest value: 1 is perfect balance."""
    dead: list[int]
    """Experts without a token."""
    router_z: list[float]
    """Root mean square of the log-sum-exp of the router's logits; 0 for hash routing."""


class LoadWindow:
    """Sums of routing results over the micro-batches of a step and over the steps of a log window.

    It can be written down and taken up again, so that a resumed run logs what a straight run would.
    """

    def __init__(self, layers: int, experts: int) -> None:
        self.tokens_per_expert = torch.zeros(layers, experts, dtype=torch.int64)
        self.units = torch.zeros(layers, dtype=torch.int64)
        self.squared_lse = torch.zeros(layers, dtype=torch.float64)

    def add(self, routings: list[Routing]) -> None:
        """Adds a micro-batch; the sums stay where the routing is, so that a GPU is not waited for."""
        if not routings:
            return
        device = routings[0].expert_ids.device
        if self.tokens_per_expert.device != device:
            self.to(device)
        self.tokens_per_expert += torch.stack([routing.tokens_per_expert.sum(0) for routing in routings])
        self.units += torch.stack([routing.units.sum() for routing in routings])
        if routings[0].squared_lse_sums is not None:
            lse = [
                routing.squared_lse_sums.detach().sum() for routing in routings if routing.squared_lse_sums is not None
            ]
            self.squared_lse += torch.stack(lse).double()

    def add_window(self, other: "LoadWindow") -> None:
        """Adds another window's sums."""
        device = other.tokens_per_expert.device
        if self.tokens_per_expert.device != device:
            self.to(device)
        self.tokens_per_expert += other.tokens_per_expert
        self.units += other.units
        self.squared_lse += other.squared_lse

    def sums(self) -> list[LoadSums]:
        """Returns one load per MoE layer, for balance over the global batch."""
        return [LoadSums(tokens, units) for tokens, units in zip(self.tokens_per_expert, self.units, strict=True)]

    def health(self) -> Health:
        """Returns the window's health, on the CPU."""
        tokens, units = self.tokens_per_expert.double().cpu(), self.units.double().cpu().clamp(min=1)
        mean = tokens.mean(1).clamp(min=1e-9)
        lse = (self.squared_lse.cpu() / units).sqrt()
        return Health(
            max_violation=(tokens.amax(1) / mean - 1).tolist(),
            entropy=[load_entropy(row) for row in tokens],
            dead=(tokens == 0).sum(1).tolist(),
            router_z=lse.tolist(),
        )

    def state(self) -> dict[str, Tensor]:
        """Returns the sums as tensors, to be written down."""
        return {"tokens_per_expert": self.tokens_per_expert, "units": self.units, "squared_lse": self.squared_lse}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes up what `state` gave."""
        for name, value in state.items():
            setattr(self, name, value)

    def to(self, device: torch.device) -> "LoadWindow":
        """Moves the sums and returns the window."""
        for name, value in self.state().items():
            setattr(self, name, value.to(device))
        return self


def load_entropy(tokens_per_expert: Float[Tensor, " experts"]) -> float:
    """Returns the entropy of the load, as a fraction of log(experts); 1 for a single expert or no tokens."""
    total, experts = float(tokens_per_expert.sum()), len(tokens_per_expert)
    if experts == 1 or total == 0:
        return 1.0
    p = tokens_per_expert / total
    return float(torch.special.entr(p).sum() / torch.tensor(float(experts)).log())


class DeadExperts:
    """Counts the log windows in a row in which an expert had no token, and says when it must be called dead."""

    def __init__(self, layers: int, experts: int, after: int) -> None:
        self.idle = torch.zeros(layers, experts, dtype=torch.int64)
        self.after = after

    def update(self, tokens_per_expert: Int[Tensor, "layers experts"]) -> dict[int, list[int]]:
        """Returns the experts of each MoE layer that have just reached `after` idle windows; each is told once."""
        self.idle = torch.where(tokens_per_expert.cpu() == 0, self.idle + 1, 0)
        died: dict[int, list[int]] = {}
        for layer, expert in (self.idle == self.after).nonzero().tolist():
            died.setdefault(layer, []).append(expert)
        return died


def as_json(health: Health) -> dict[str, Any]:
    """Returns the health with four decimals."""
    return {name: [round(value, 4) for value in values] for name, values in health._asdict().items()}

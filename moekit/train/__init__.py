"""Training: one loop over a pure sampler, exact to resume, with the routing's health beside the loss."""

from moekit.train.loop import train

__all__ = ["train"]

"""Generation: sampling with a key-value cache, a batch of prompts of different lengths at a time."""

from moekit.generate.complete import Completion, complete
from moekit.generate.decode import generate, tokens
from moekit.generate.sampling import SamplingSettings

__all__ = ["Completion", "SamplingSettings", "complete", "generate", "tokens"]

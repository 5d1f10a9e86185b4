"""Generation: sampling with a key-value cache, a batch of prompts of different lengths at a time."""

import sys
from types import ModuleType

from moekit.generate.complete import Completion, complete
from moekit.generate.decode import generate, tokens
from moekit.generate.sampling import SamplingSettings

__all__ = ["Completion", "SamplingSettings", "complete", "generate", "tokens"]


class _Callable(ModuleType):
    """This folder has the name of the public function: `moekit.generate` is both, whatever is imported first."""

    __call__ = staticmethod(generate)


sys.modules[__name__].__class__ = _Callable

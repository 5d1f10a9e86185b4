"""moekit: the whole life of a fine-grained Mixture-of-Experts language model.

The public names are below; each is imported when it is first used, so `import moekit` and `moekit --help` are fast.
"""

import importlib
from typing import TYPE_CHECKING, Any

from moekit.version import __version__ as __version__

if TYPE_CHECKING:
    from moekit.config import ModelConfig as ModelConfig
    from moekit.config import RunConfig as RunConfig
    from moekit.config import preset as preset
    from moekit.formats.checkpoint import load as load
    from moekit.formats.checkpoint import save as save
    from moekit.formats.tokenizer import load_tokenizer as load_tokenizer
    from moekit.generate import generate as generate
    from moekit.nn.cache import KVCache as KVCache
    from moekit.nn.model import Model as Model
    from moekit.nn.model import ModelOutput as ModelOutput
    from moekit.ops.routing import Routing as Routing

_WHERE = {
    "KVCache": "moekit.nn.cache",
    "Model": "moekit.nn.model",
    "ModelConfig": "moekit.config",
    "ModelOutput": "moekit.nn.model",
    "Routing": "moekit.ops.routing",
    "RunConfig": "moekit.config",
    "generate": "moekit.generate",
    "load": "moekit.formats.checkpoint",
    "load_tokenizer": "moekit.formats.tokenizer",
    "preset": "moekit.config",
    "save": "moekit.formats.checkpoint",
}
__all__ = [*_WHERE, "__version__"]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'moekit' has no attribute {name!r}")
    found = getattr(importlib.import_module(_WHERE[name]), name)
    return globals().setdefault(name, found)  # `generate` is set already: the folder, which can be called

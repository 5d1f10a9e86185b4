"""To come."""

from moekit.config import MEOConfig
from moekit.nn.variants.layer import VariantLayer


class MEO(VariantLayer):
    """To come."""

    def __init__(self, config: MEOConfig, dim: int, vocab_size: int) -> None:
        super().__init__()

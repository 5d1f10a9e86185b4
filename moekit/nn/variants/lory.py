"""To come."""

from moekit.config import LoryConfig
from moekit.nn.variants.layer import VariantLayer


class Lory(VariantLayer):
    """To come."""

    def __init__(self, config: LoryConfig, dim: int, layer: int) -> None:
        super().__init__()

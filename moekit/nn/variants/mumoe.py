"""To come."""

from moekit.config import MuMoEConfig
from moekit.nn.variants.layer import VariantLayer


class MuMoE(VariantLayer):
    """To come."""

    def __init__(self, config: MuMoEConfig, dim: int) -> None:
        super().__init__()

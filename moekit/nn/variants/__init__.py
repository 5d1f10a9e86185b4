"""Other papers' feed-forward layers: one file each, all with the same call signature."""

from moekit.config import LoryConfig, MEOConfig, MuMoEConfig, Variant
from moekit.nn.variants.layer import VariantLayer
from moekit.nn.variants.lory import Lory
from moekit.nn.variants.meo import MEO
from moekit.nn.variants.mumoe import MuMoE


def build(config: Variant, dim: int, layer: int) -> VariantLayer:
    """Returns the layer that these settings describe."""
    if isinstance(config, MEOConfig):
        return MEO(config, dim, layer)
    if isinstance(config, LoryConfig):
        return Lory(config, dim, layer)
    assert isinstance(config, MuMoEConfig)
    return MuMoE(config, dim)

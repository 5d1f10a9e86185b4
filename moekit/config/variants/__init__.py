"""Feed-forward layers of other papers: one file each, with its settings and what it counts."""

from moekit.config.variants.lory import LoryConfig as LoryConfig
from moekit.config.variants.meo import MEOConfig as MEOConfig
from moekit.config.variants.mumoe import MuMoEConfig as MuMoEConfig
from moekit.config.variants.variant import Variant as Variant

"""Architectures against each other, fairly: one file, one budget, the same data in the same order, several seeds."""

from moekit.compare.config import Comparison as Comparison
from moekit.compare.config import comparison_names as comparison_names
from moekit.compare.config import load_comparison as load_comparison
from moekit.compare.job import compare as compare
from moekit.compare.plan import Plan as Plan
from moekit.compare.plan import resolve as resolve

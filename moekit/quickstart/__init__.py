"""The main job, from text to report, on text that the package carries."""

from moekit.quickstart.job import quickstart

__all__ = ["quickstart"]

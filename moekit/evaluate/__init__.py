"""Evaluation: loss on text, and benchmark tasks through lm-evaluation-harness."""

from moekit.evaluate.text import DomainScore, score_text

__all__ = ["DomainScore", "score_text"]

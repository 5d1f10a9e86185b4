"""Architectures against each other, fairly: one file, one budget, the same data in the same order, several seeds."""

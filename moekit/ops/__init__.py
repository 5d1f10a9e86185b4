"""Pure functions on tensors: the papers' formulas. Parameters live in `nn`, loops in `train` and `generate`."""

"""Fast paths. Nobody imports them but `ops/experts.py` and `ops/merge.py`, and each can say why it cannot run."""

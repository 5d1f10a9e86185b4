"""count a model's parameters, FLOPs and bytes; no weights are made

example:
  moekit plan deepseekmoe-2b --model.ffn.n_routed_experts 127 --batch 8
"""

import argparse

from moekit.cli.output import emit, emit_config
from moekit.cli.parser import SHOWN, Add, given, positive

SETTINGS = "model"


def options(add: Add) -> None:
    add("source", type=given, metavar="PRESET|FILE", help="a preset, or a YAML file of a run or of a model")
    add("--sequence-length", type=positive, help="tokens (the model's context, at most 4096)")
    add("--batch", type=positive, default=1, help="sequences in one forward pass, for memory (1)")
    add("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the compute (bfloat16)")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="whose states to count (adamw)")
    add("--recompute", action="store_true", help="activations are recomputed in the backward pass")
    add("--print_config", "--print-config", **SHOWN)


def run(args: argparse.Namespace) -> int:
    from moekit.config import load_model_config, plan, summary
    from moekit.tables import plan_tables

    config = load_model_config(args.source, args.overrides)
    if args.print_config:
        return emit_config(args, config)
    document = plan(config, args.sequence_length, args.batch, args.precision, args.optimizer, args.recompute)
    return emit(args, {"model": args.source, **document}, lambda: plan_tables(args.source, summary(config), document))

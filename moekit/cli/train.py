"""train a model, or go on with a run

example:
  moekit train tiny-deepseekmoe --data data --out run --steps 300 --optimizer.lr 1e-3
  moekit train --resume --out run
"""

import argparse
from pathlib import Path

from moekit.cli.output import emit, emit_config
from moekit.cli.parser import SHOWN, Add
from moekit.errors import ConfigError

SETTINGS = ""


def options(add: Add) -> None:
    add("source", nargs="?", metavar="PRESET|FILE", help="a preset or a run's YAML file; not needed to resume")
    add("--data", metavar="DATA", help="directory that `moekit prepare` wrote; sets data.path")
    add("--out", type=Path, metavar="RUN", help="directory of the run; it must not exist, unless --resume")
    add("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    add("--quiet", action="store_true", help="no progress display")
    add("--print_config", "--print-config", **SHOWN)


def run(args: argparse.Namespace) -> int:
    from moekit.config import load_run_config

    fixed = {} if args.data is None else {"data.path": args.data}
    if fixed.keys() & args.overrides.keys():
        raise ConfigError("--data and --data.path are both given; they are the same setting")
    if args.out is None and (args.resume or not args.print_config):
        raise ConfigError("--out is missing: the directory of the run")
    if args.source is None and not args.resume:
        raise ConfigError("PRESET or FILE is missing: what to train; `moekit presets` lists the presets")
    source = args.source or args.out / "config.yaml"
    config = load_run_config(source, args.overrides, template=args.print_config, **fixed)
    if args.print_config:
        return emit_config(args, config)
    from moekit.train import train
    from moekit.train.progress import TerminalProgress

    receipt = train(config, args.out, resume=args.resume, sinks=[] if args.quiet else [TerminalProgress(config)])
    if receipt["status"] != "done":
        emit(args, receipt, lambda: [f"saved; `moekit train --resume --out {args.out}` goes on"])
        return 130
    return emit(args, receipt, lambda: [f"{args.out} holds the run; next: moekit generate {args.out} --prompt ..."])

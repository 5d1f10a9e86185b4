"""train a model, or go on with a run

example:
  moekit train tiny-deepseekmoe --data data --out run --steps 300 --optimizer.lr 1e-3
  moekit train --resume --out run
  moekit train --from run --data other --out tuned --steps 100
"""

import argparse
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from moekit.cli.output import emit, emit_config
from moekit.cli.parser import SHOWN, Add, given, path
from moekit.errors import ConfigError

if TYPE_CHECKING:
    from moekit.config import ModelConfig

SETTINGS = ""


def options(add: Add) -> None:
    add(
        "source",
        type=given,
        nargs="?",
        metavar="PRESET|FILE",
        help="a preset or a run's YAML file; not needed to resume, or with --from",
    )
    add("--from", type=given, dest="init", metavar="DIR", help="model or run whose weights to start from; sets init")
    add("--data", type=given, metavar="DATA", help="what `moekit prepare` wrote, or files of sentences; sets data.path")
    add("--out", type=path, metavar="RUN", help="directory of the run; it must not exist, unless --resume")
    add("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    add("--quiet", action="store_true", help="no progress display")
    add("--print_config", "--print-config", **SHOWN)


def run(args: argparse.Namespace) -> int:
    from moekit.config import load_run_config

    given = {"data.path": ("--data", args.data), "init": ("--from", args.init)}
    fixed = {key: value for key, (_, value) in given.items() if value is not None}
    for key in fixed.keys() & args.overrides.keys():
        raise ConfigError(f"{given[key][0]} and --{key} are both given; they are the same setting")
    if args.out is None and (args.resume or not args.print_config):
        raise ConfigError("--out is missing: the directory of the run")
    if args.source is None and args.init is None and not args.resume:
        raise ConfigError("PRESET or FILE is missing: what to train; `moekit presets` lists the presets")
    source = args.out / "config.yaml" if args.source is None and args.resume else args.source
    model = None if args.init is None or args.resume else _model(Path(args.init))
    config = load_run_config(source, args.overrides, template=args.print_config, model=model, **fixed)
    if args.print_config:
        return emit_config(args, config)
    from moekit.start import origin
    from moekit.train import train
    from moekit.train.progress import TerminalProgress

    sinks = [] if args.quiet else [TerminalProgress(config)]
    receipt = train(config, args.out, resume=args.resume, sinks=sinks, origin=origin)
    if receipt["status"] != "done":
        emit(args, receipt, lambda: [f"saved; `moekit train --resume --out {quote(str(args.out))}` goes on"])
        return 130
    then = {
        "next_token": f"generate {quote(str(args.out))} --prompt ...",
        "masked": f"train --from {quote(str(args.out))} --objective.kind sentences ...",
        "sentences": f"evaluate {quote(str(args.out))} --sentences FILE",
    }[config.objective.kind]
    return emit(args, receipt, lambda: [f"{args.out} holds the run; next: moekit {then}"])


def _model(init: Path) -> "ModelConfig":
    """Returns the settings of the model to start from, which the source and the overrides go on top of."""
    from moekit.formats.checkpoint import load_config
    from moekit.train.state import model_folder

    return load_config(model_folder(init))

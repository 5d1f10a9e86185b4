"""the main job, from text to report, in minutes

example:
  moekit quickstart --out first
"""

import argparse
from pathlib import Path

from moekit.cli.output import emit
from moekit.cli.parser import DEVICE, Add, positive


def options(add: Add) -> None:
    add("--out", type=Path, default=Path("moekit-quickstart"), help="directory to write (moekit-quickstart)")
    add("--steps", type=positive, help="training steps of each model (the recipe's, two to four minutes)")
    add("--device", **DEVICE)


def run(args: argparse.Namespace) -> int:
    from moekit.quickstart import quickstart
    from moekit.tables import quickstart_tables
    from moekit.train.progress import TerminalProgress

    result = quickstart(args.out, steps=args.steps, device=args.device, sinks=lambda config: [TerminalProgress(config)])
    if result["status"] != "done":
        emit(args, result, lambda: [f"saved; `moekit quickstart --out {args.out}` goes on"])
        return 130
    return emit(args, result, lambda: quickstart_tables(result))

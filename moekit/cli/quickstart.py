"""the main job, from text to report, in minutes

example:
  moekit quickstart --out first
"""

import argparse
from pathlib import Path
from shlex import quote

from moekit.cli.output import emit
from moekit.cli.parser import DEVICE, Add, path, positive


def options(add: Add) -> None:
    add("--out", type=path, default=Path("moekit-quickstart"), help="directory to write (moekit-quickstart)")
    add("--steps", type=positive, help="training steps of each model (the recipe's, two to four minutes)")
    add("--device", **DEVICE)


def run(args: argparse.Namespace) -> int:
    from moekit.quickstart import quickstart
    from moekit.tables import quickstart_tables
    from moekit.train.progress import TerminalProgress

    result = quickstart(args.out, steps=args.steps, device=args.device, sinks=lambda config: [TerminalProgress(config)])
    if result["status"] != "done":
        emit(args, result, lambda: [f"saved; `moekit quickstart --out {quote(str(args.out))}` goes on"])
        return 130
    return emit(args, result, lambda: quickstart_tables(result))

"""show what this machine has, what computes the experts on it, and how fast

example:
  moekit doctor --device cpu
"""

import argparse

from moekit.cli.output import emit
from moekit.cli.parser import DEVICE, Add


def options(add: Add) -> None:
    add("--device", **DEVICE)
    add("--quick", action="store_true", help="measure nothing")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from moekit.doctor import examine
    from moekit.tables import doctor_tables

    with Console(stderr=True).status("looking") as shown:
        document = examine(args.device, not args.quick, lambda doing: shown.update(f"measuring {doing}"))
    return emit(args, document, lambda: doctor_tables(document))

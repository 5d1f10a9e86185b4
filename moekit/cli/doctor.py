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
    from moekit.doctor import examine
    from moekit.tables import doctor_tables

    document = examine(args.device, measure=not args.quick)
    return emit(args, document, lambda: doctor_tables(document))

"""is a model directory what it claims to be: files, receipt, tensors, values

example:
  moekit verify small --against run
"""

import argparse

from moekit.cli.output import bars, emit, read_text
from moekit.cli.parser import Add, path


def options(add: Add) -> None:
    add("model", type=path, metavar="DIR", help="a model directory or a run")
    add("--against", type=path, metavar="OTHER", help="another one, to compare weights, logits and routing with")
    add("--text", type=path, metavar="FILE", help="text to compare on (random tokens)")


def run(args: argparse.Namespace) -> int:
    from moekit.formats.verify import verify
    from moekit.tables import verify_tables
    from moekit.train.state import model_folder

    text = None if args.text is None else read_text(args.text)
    other = None if args.against is None else model_folder(args.against)
    with bars() as progress:
        document = verify(model_folder(args.model), other, text=text, progress=progress)
    emit(args, document, lambda: verify_tables(document))
    return 0 if document["held"] else 1

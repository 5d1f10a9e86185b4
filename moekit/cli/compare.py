"""train architectures against each other: one budget, the same data, several seeds

example:
  moekit compare table1 --size tiny --data data --out table1
  moekit compare table1 --size mini --dry-run
"""

import argparse
import sys
from shlex import quote

from moekit.cli.output import emit
from moekit.cli.parser import SHOWN, Add, given, path, positive
from moekit.errors import ConfigError

SETTINGS = "recipe"


def options(add: Add) -> None:
    add(
        "source",
        type=given,
        nargs="?",
        metavar="NAME|FILE",
        help="a ready-made comparison or a YAML file; not needed to go on",
    )
    add("--data", type=given, metavar="DATA", help="directory that `moekit prepare` wrote; sets recipe.data.path")
    add("--out", type=path, metavar="DIR", help="directory of the comparison; one that was interrupted goes on")
    add("--size", help="family whose variants are compared: tiny, mini or 2b (the file's)")
    add("--seeds", type=_seeds, metavar="A,B,...", help="seeds, each trains every architecture once (the file's)")
    add("--baseline", metavar="NAME", help="architecture that differences are taken from (the file's)")
    add("--jobs", type=positive, default=1, metavar="N", help="runs at once, which share the threads (1)")
    add("--list", action="store_true", help="list the ready-made comparisons and exit")
    add("--dry-run", action="store_true", help="show what would be trained and exit")
    add("--report", action="store_true", help="train nothing, write the result of the runs that are finished")
    add("--quiet", action="store_true", help="no progress display")
    add("--print_config", "--print-config", **SHOWN)


def run(args: argparse.Namespace) -> int:
    from moekit.compare.config import comparison_names, load_comparison
    from moekit.compare.plan import plan_document, resolve

    if args.list:
        from moekit.compare.tables import list_tables

        found = {name: load_comparison(name) for name in comparison_names()}
        listed = [{"name": n, "title": c.title, "architectures": [*c.architectures]} for n, c in found.items()]
        return emit(args, {"comparisons": listed}, lambda: list_tables(listed))
    only_shown = args.print_config or args.dry_run
    if args.out is None and not only_shown:
        raise ConfigError("--out is missing: the directory of the comparison")
    if args.source is None and (args.out is None or not (args.out / "compare.yaml").is_file()):
        raise ConfigError("NAME or FILE is missing: what to compare; `moekit compare --list` lists what comes with it")
    given = {"size": args.size, "seeds": args.seeds, "baseline": args.baseline}
    comparison = load_comparison(args.source or args.out / "compare.yaml", args.overrides, data=args.data, **given)
    plan = resolve(comparison, template=only_shown)
    if args.print_config:
        from moekit.config.files import write_yaml

        document = plan.comparison.model_dump(mode="json")
        if args.json:
            return emit(args, document, list)
        sys.stdout.write(write_yaml(document))
        return 0
    from moekit.compare.tables import plan_tables, result_tables

    if args.dry_run:
        document = plan_document(plan)
        return emit(args, document, lambda: plan_tables(document))
    from moekit.compare.job import compare
    from moekit.compare.progress import TerminalProgress

    progress = None if args.quiet else TerminalProgress()
    try:
        result = compare(plan, args.out, jobs=args.jobs, train=not args.report, watch=progress or (lambda shown: None))
    finally:
        if progress:
            progress.close()
    if result["status"] == "interrupted":
        emit(args, result, lambda: [f"saved; `moekit compare --out {quote(str(args.out))}` goes on"])
        return 130
    emit(args, result, lambda: result_tables(result))
    return 1 if result["failed"] else 0


def _seeds(text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.isascii() and part.isdecimal() for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers, as 0,1,2 is")
    return [int(part) for part in parts]

"""The `moekit` command: one sub-command a verb, one file each: parse, make a configuration, one library call.

Results go to standard output, as a table or with --json as one document; everything else goes to standard error. Exit
status: 0 done, 1 a check did not hold, 2 bad usage or input. A verb's `--help` is the docstring of its file; `options`
adds what it takes, `SETTINGS` names the part of a run whose settings are options too. Whatever is slow to import is
imported inside the function that needs it, so that --help answers at once.
"""

import argparse
import contextlib
import io
import logging
import os
import sys
from collections.abc import Sequence
from types import ModuleType

from moekit.cli import (
    compare,
    convert,
    doctor,
    evaluate,
    generate,
    inspect,
    plan,
    prepare,
    presets,
    quickstart,
    train,
    verify,
)
from moekit.cli.parser import Parser, settings_help, take_overrides
from moekit.errors import ConfigError, MoekitError, nearest
from moekit.version import __version__

VERBS: dict[str, ModuleType] = {
    "quickstart": quickstart,
    "doctor": doctor,
    "presets": presets,
    "plan": plan,
    "prepare": prepare,
    "train": train,
    "compare": compare,
    "generate": generate,
    "evaluate": evaluate,
    "inspect": inspect,
    "convert": convert,
    "verify": verify,
}
"""In the order in which --help lists them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status of the command line `argv` (that of the process if None)."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started us; another file must not take its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale, text of any language can be written
            stream.reconfigure(encoding="utf-8", errors="replace")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's large blocks in huge pages; read when it starts
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("moekit").setLevel(logging.INFO)
    status = 0
    try:
        with contextlib.suppress(SystemExit):  # argparse's --help and --version
            status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except MoekitError as error:
        message = str(error)
    except OSError as error:
        if error.filename is None:  # under a file that is open already: a full disk, or a reader that has gone
            with contextlib.suppress(OSError):  # what is still buffered must not raise again at exit
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        message = f"{error.filename or 'cannot write or read'}: {error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        # torch's are told by name and words, for which it is not imported
        refused = type(error).__name__ == "OutOfMemoryError" or "DefaultCPUAllocator: can't alloc" in str(error)
        if not (refused or isinstance(error, MemoryError)):
            raise
        reason = str(error).partition("DefaultCPUAllocator: ")[2] or str(error).partition(". ")[0] or "out of memory"
        message = f"{reason}; in training, a smaller data.micro_batch_size or recompute true needs less memory"
    except KeyboardInterrupt:
        sys.stderr.write("\nmoekit: interrupted\n")
        return 130
    sys.stderr.write(f"moekit: error: {' '.join(message.split())}\n")
    return 2


def _run(argv: list[str]) -> int:
    parser, verbs = parsers()
    name, *words = argv or ["--help"]
    if name in ("-h", "--help", "--version"):
        parser.parse_args([name])
    if name.startswith("-"):
        raise ConfigError(f"{name} stands before the verb; write `moekit VERB {name}`, see `moekit --help`")
    if name not in verbs:
        raise ConfigError(f"there is no verb {name!r}{nearest(name, verbs)}; verbs: {', '.join(verbs)}")
    verb = verbs[name]
    root = verb.get_default("settings")
    if root is not None and {"-h", "--help"} & {*words}:
        verb.epilog = f"{verb.epilog}\n\n{settings_help(root)}"
    words, overrides = take_overrides(verb, words)
    args = verb.parse_args(words, argparse.Namespace(overrides=overrides))
    status: int = args.run(args)
    return status


def parsers() -> tuple[Parser, dict[str, Parser]]:
    """Returns the parser of the command and that of each verb."""
    parser = Parser(
        prog="moekit",
        description="Plan, train and talk to fine-grained Mixture-of-Experts language models (DeepSeekMoE).",
        epilog="start here:\n  moekit quickstart              train a tiny model on text that is included\n"
        "  moekit presets                 the models that can be named\n"
        "  moekit plan deepseekmoe-16b    what a model costs\n\n`moekit VERB --help` explains a verb.",
    )
    parser.add_argument("--version", action="version", version=f"moekit {__version__}")
    subparsers = parser.add_subparsers(metavar="VERB", title="verbs", parser_class=Parser)
    for name, verb in VERBS.items():
        text, _, example = (verb.__doc__ or "").strip().partition("\n\n")
        added = subparsers.add_parser(name, help=text, description=text, epilog=example)
        added.set_defaults(run=verb.run, settings=getattr(verb, "SETTINGS", None))
        added.add_argument("--json", action="store_true", help="one JSON document on standard output")
        verb.options(added.add_argument)
    return parser, dict(subparsers.choices)

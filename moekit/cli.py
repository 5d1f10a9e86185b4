"""The `moekit` command: one sub-command a verb; parse, make a configuration, one library call.

Results go to standard output, as a table or with --json as one document; everything else goes to standard error. Exit
status: 0 done, 1 a check did not hold, 2 bad usage or input. Whatever is slow to import is imported inside the verb
that needs it, so that --help answers at once.
"""

import argparse
import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moekit.errors import ConfigError, DataError, MoekitError, nearest
from moekit.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

    from moekit.config import RunConfig


class _Parser(argparse.ArgumentParser):
    """Raises our one-line error instead of printing a usage block, and takes an epilog that is made when shown."""

    make_epilog: Callable[[], str] | None = None

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")

    def format_help(self) -> str:
        if self.make_epilog is not None:
            self.epilog = f"{self.epilog}\n\n{self.make_epilog()}"
            self.make_epilog = None
        return super().format_help()


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status of the command line `argv` (that of the process if None)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # whatever the locale, text of any language can be written
            stream.reconfigure(encoding="utf-8", errors="replace")
    logging.basicConfig(stream=sys.stderr, format="%(message)s")
    logging.getLogger("moekit").setLevel(logging.INFO)
    try:
        try:
            status = _run(list(sys.argv[1:] if argv is None else argv))
        except SystemExit as done:  # argparse's --help and --version
            status = int(done.code or 0)
        sys.stdout.flush()
        return status
    except MoekitError as error:
        return _fail(str(error))
    except BrokenPipeError:  # the reader of our output has gone
        _drop_output()
        return 141
    except OSError as error:
        if error.filename is None:  # a full disk, say, under a file that is open already, standard output included
            _drop_output()
            return _fail(f"cannot write or read: {error.strerror or error}")
        return _fail(f"{error.filename}: {error.strerror}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        reason = str(error).partition(". ")[0]
        return _fail(f"{reason}; in training, a smaller data.micro_batch_size or recompute true needs less memory")
    except KeyboardInterrupt:
        sys.stderr.write("\nmoekit: interrupted\n")
        return 130


def _drop_output() -> None:
    """Makes sure that what is still buffered does not raise again at exit."""
    with contextlib.suppress(OSError):  # a stream without a file, in a test say, has nothing that could
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(message: str) -> int:
    sys.stderr.write(f"moekit: error: {' '.join(message.split())}\n")
    return 2


def _run(argv: list[str]) -> int:
    parser, verbs = _parsers()
    verb = next((word for word in argv if not word.startswith("-")), None)
    if verb is None:
        parser.parse_args(argv or ["--help"])
        return 0
    if argv[0] != verb:
        raise ConfigError(f"{argv[0]} stands before the verb; write `moekit {verb} {argv[0]}`")
    if verb not in verbs:
        raise ConfigError(f"there is no verb {verb!r}{nearest(verb, verbs)}; verbs: {', '.join(verbs)}")
    words, overrides = _take_overrides(verbs[verb], argv[1:])
    args = verbs[verb].parse_args(words)
    args.overrides = overrides
    run: Callable[[argparse.Namespace], int] = args.run
    return run(args)


def _take_overrides(parser: _Parser, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the words that are the parser's own, and the overrides, `--a.b v` or `--a.b=v`, wherever they stand.

    A dotted name is an override where the verb takes them, and so is the name of any setting of a run.
    """
    known = {option for action in parser._actions for option in action.option_strings}
    kept: list[str] = []
    overrides: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in known:
            kept.append(word)
            continue
        key = option[2:].replace("-", "_")
        if not _is_override(parser, key):
            raise ConfigError(f"unknown option {option}{_hint(parser, key, known)}; see `{parser.prog} --help`")
        if not equals:
            following = next(rest, None)
            if following is None or following.startswith("--"):
                raise ConfigError(f"{option} needs a value: `{option} VALUE`")
            value = following
        overrides[key] = value
    return kept, overrides


def _is_override(parser: _Parser, key: str) -> bool:
    if parser.get_default("takes_overrides") is None:
        return False
    from moekit.config import RunConfig

    return "." in key or key in RunConfig.model_fields


def _hint(parser: _Parser, key: str, known: set[str]) -> str:
    if near := nearest("--" + key.replace("_", "-"), known):
        return near
    if parser.get_default("takes_overrides") is None:
        return ""
    from moekit.config import where

    return where(key)


def _parsers() -> tuple[_Parser, dict[str, _Parser]]:
    parser = _Parser(
        prog="moekit",
        description="Plan, train and talk to fine-grained Mixture-of-Experts language models (DeepSeekMoE).",
        epilog="start here:\n  moekit quickstart              train a tiny model on text that is included\n"
        "  moekit presets                 the models that can be named\n"
        "  moekit plan deepseekmoe-16b    what a model costs\n\n`moekit VERB --help` explains a verb.",
    )
    parser.add_argument("--version", action="version", version=f"moekit {__version__}")
    subparsers = parser.add_subparsers(metavar="VERB", title="verbs", parser_class=_Parser)
    verbs: dict[str, _Parser] = {}

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str, example: str) -> _Parser:
        verbs[name] = subparsers.add_parser(name, help=text, description=text, epilog=f"example:\n  {example}")
        verbs[name].set_defaults(run=run)
        verbs[name].add_argument("--json", action="store_true", help="one JSON document on standard output")
        return verbs[name]

    p = verb(
        "quickstart", run_quickstart, "the main job, from text to report, in minutes", "moekit quickstart --out first"
    )
    p.add_argument("--out", type=Path, default=Path("moekit-quickstart"), help="directory to write (moekit-quickstart)")
    p.add_argument("--steps", type=_positive, help="training steps of each model (the recipe's, about four minutes)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")

    verb("presets", run_presets, "list the models that can be named", "moekit presets --json")

    p = verb(
        "plan",
        run_plan,
        "count a model's parameters, FLOPs and bytes; no weights are made",
        "moekit plan deepseekmoe-2b --model.ffn.n_routed_experts 127 --batch 8",
    )
    p.add_argument("source", metavar="PRESET|FILE", help="a preset, or a YAML file of a run or of a model")
    p.add_argument("--sequence-length", type=_positive, help="tokens (the model's context, at most 4096)")
    p.add_argument("--batch", type=_positive, default=1, help="sequences in one forward pass, for memory (1)")
    p.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the compute (bfloat16)")
    p.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="whose states to count (adamw)")
    p.add_argument("--recompute", action="store_true", help="activations are recomputed in the backward pass")
    _takes_overrides(p, "model")

    p = verb(
        "prepare",
        run_prepare,
        "turn text into a tokenizer and tokenised shards; run again, it goes on where it stopped",
        "moekit prepare books/ news.jsonl.gz --out data --vocab-size 4096",
    )
    p.add_argument(
        "files", nargs="+", metavar="FILE", help="jsonl, txt or parquet, plain, .gz or .zst; or folders of them"
    )
    p.add_argument("--out", type=Path, required=True, metavar="DATA", help="directory to write")
    p.add_argument("--valid", nargs="+", metavar="FILE", help="validation text; else a part of FILES is held out")
    p.add_argument("--valid-fraction", type=float, metavar="F", help="documents held out without --valid (0.01)")
    p.add_argument("--vocab-size", type=_positive, metavar="N", help="of the tokenizer that is trained (4096)")
    p.add_argument("--tokenizer", metavar="FILE|DIR", help="use this tokenizer.json instead of training one")
    p.add_argument("--text-field", default="text", help="field of a record that holds its text (text)")
    p.add_argument("--domain-field", default="domain", help="field that names its domain (domain)")

    p = verb(
        "train",
        run_train,
        "train a model, or go on with a run",
        "moekit train tiny-deepseekmoe --data data --out run --steps 300 --optimizer.lr 1e-3\n"
        "  moekit train --resume --out run",
    )
    p.add_argument(
        "source", nargs="?", metavar="PRESET|FILE", help="a preset or a run's YAML file; not needed to resume"
    )
    p.add_argument("--data", metavar="DATA", help="directory that `moekit prepare` wrote; sets data.path")
    p.add_argument("--out", type=Path, metavar="RUN", help="directory of the run; it must not exist, unless --resume")
    p.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    p.add_argument("--quiet", action="store_true", help="no progress display")
    _takes_overrides(p, "")

    p = verb(
        "generate",
        run_generate,
        "continue a text",
        'moekit generate run --prompt "Once upon a time" --temperature 0.8',
    )
    p.add_argument("model", type=Path, metavar="DIR", help="a model directory or a run")
    p.add_argument("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated")
    p.add_argument("--prompts-file", type=Path, metavar="FILE", help="one prompt per line")
    p.add_argument("--max-new-tokens", type=_positive, default=64, metavar="N", help="(64)")
    p.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    p.add_argument("--top-k", type=_positive, metavar="N", help="sample among the N likeliest tokens")
    p.add_argument("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of total probability P")
    p.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest one's probability")
    p.add_argument("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: avoid tokens seen (1)")
    p.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    p.add_argument("--seed", type=int, default=0, help="of the sampling (0)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    p.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (as saved)")
    return parser, verbs


def _takes_overrides(parser: _Parser, root: str) -> None:
    parser.add_argument(
        "--print_config", "--print-config", action="store_true", help="print the resolved YAML and exit"
    )
    parser.add_argument_group("settings", f"--{root or 'model'}.x.y VALUE changes one; they are listed below")
    parser.set_defaults(takes_overrides=root)
    parser.make_epilog = lambda: _settings_help(root)


def _settings_help(root: str) -> str:
    """Returns all settings below `root`, by part, each as the option that changes it."""
    from moekit.config import describe_keys

    lines: list[str] = []
    part = None
    for key, kind, default, description in describe_keys():
        if not key.startswith(root):
            continue
        if part != (part := key.rpartition(".")[0]):
            lines.append(f"\n{part or 'run'}:")
        lines += [f"  --{key} {kind.replace(' | ', '|')} ({default})", f"        {description}"]
    return "settings, (default):" + "\n".join(["", *lines])


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _emit(args: argparse.Namespace, document: Any, make_tables: Callable[[], Sequence["Table | str"]]) -> int:
    """Writes the document with --json, else the tables; returns the exit status 0."""
    if args.json:
        sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        return 0
    from rich.console import Console

    console = Console(highlight=False)
    with console.capture() as text:  # rich would end the process by itself on a broken pipe
        for part in make_tables():
            console.print(part, soft_wrap=isinstance(part, str))  # a command must stay in one piece
    sys.stdout.write(text.get())
    return 0


def run_presets(args: argparse.Namespace) -> int:
    """Lists the presets with their total and active parameters."""
    from moekit.config import preset, preset_names, summary
    from moekit.tables import presets_tables

    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "parameters": {"total": config.num_parameters, "active": config.num_active_parameters},
            "description": summary(config),
        }
        for name, config in ((name, preset(name)) for name in preset_names())
    ]

    return _emit(args, {"presets": rows}, lambda: presets_tables(rows))


def run_plan(args: argparse.Namespace) -> int:
    """Shows what a model costs."""
    from moekit.config import dump, load_model_config, plan, summary
    from moekit.tables import plan_tables

    config = load_model_config(args.source, args.overrides)
    if args.print_config:
        text = json.dumps(config.model_dump(mode="json"), indent=2) + "\n" if args.json else dump(config, comments=True)
        sys.stdout.write(text)
        return 0
    document = plan(config, args.sequence_length, args.batch, args.precision, args.optimizer, args.recompute)
    return _emit(args, {"model": args.source, **document}, lambda: plan_tables(args.source, summary(config), document))


def run_prepare(args: argparse.Namespace) -> int:
    """Turns text into a tokenizer and shards, with a bar per phase."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from moekit.data.prepare import prepare
    from moekit.tables import prepare_tables

    columns = (TextColumn("{task.description:>10}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    bars = Progress(*columns, console=Console(stderr=True))
    tasks = {}

    def progress(phase: str, done: int, total: int) -> None:
        bars.start()  # only now: it writes an empty line even for a mistake that is found before any work
        if phase not in tasks:
            for earlier in bars.tasks:  # the tokenizer is done when its text runs out, below its limit
                bars.update(earlier.id, total=earlier.completed)
            tasks[phase] = bars.add_task(phase)
        bars.update(tasks[phase], completed=done, total=total)

    try:
        manifest = prepare(
            args.files,
            args.out,
            valid_paths=args.valid,
            valid_fraction=args.valid_fraction,
            vocab_size=args.vocab_size,
            tokenizer=args.tokenizer,
            text_field=args.text_field,
            domain_field=args.domain_field,
            progress=progress,
        )
    finally:
        if tasks:
            bars.stop()

    return _emit(args, manifest, lambda: prepare_tables(manifest, str(args.out)))


def run_train(args: argparse.Namespace) -> int:
    """Trains, or goes on with a run."""
    from moekit.config import dump

    config = _run_config(args)
    if args.print_config:
        text = json.dumps(config.model_dump(mode="json"), indent=2) + "\n" if args.json else dump(config, comments=True)
        sys.stdout.write(text)
        return 0
    if args.out is None:
        raise ConfigError("--out is missing: the directory of the run")
    from moekit.train import train
    from moekit.train.progress import TerminalProgress

    receipt = train(config, args.out, resume=args.resume, sinks=[] if args.quiet else [TerminalProgress(config)])
    if receipt["status"] != "done":
        _emit(args, receipt, lambda: [f"saved; `moekit train --resume --out {args.out}` goes on"])
        return 130
    return _emit(args, receipt, lambda: [f"{args.out} holds the run; next: moekit generate {args.out} --prompt ..."])


def _run_config(args: argparse.Namespace) -> "RunConfig":
    """Returns the configuration to train with; that of a resumed run keeps its model."""
    from moekit.config import load_run_config

    if args.data is not None and "data.path" in args.overrides:
        raise ConfigError("--data and --data.path are both given; they are the same setting")
    fixed = {} if args.data is None else {"data.path": args.data}
    if not args.resume:
        if args.source is None:
            raise ConfigError("PRESET or FILE is missing: what to train; `moekit presets` lists the presets")
        return load_run_config(args.source, args.overrides, template=args.print_config, **fixed)
    if args.out is None:
        raise ConfigError("--out is missing: the run to go on with")
    saved = args.out / "config.yaml"
    if not saved.is_file():
        raise ConfigError(f"{saved} does not exist, so there is no run to go on with; leave out --resume to start one")
    config = load_run_config(args.source or saved, args.overrides, **fixed)
    if config.model != load_run_config(saved).model:
        raise ConfigError(f"the model differs from the one in {saved}; a run goes on with its own model")
    return config


def run_generate(args: argparse.Namespace) -> int:
    """Continues each prompt."""
    try:
        more = args.prompts_file.read_text(encoding="utf-8").splitlines() if args.prompts_file else []
    except UnicodeDecodeError as error:
        raise DataError(f"{args.prompts_file} is not UTF-8 text: byte {error.start}") from None
    prompts = [*args.prompt, *more]
    if not prompts:
        raise ConfigError("--prompt or --prompts-file is missing: the text to continue")
    import torch

    from moekit.config import validate
    from moekit.formats.checkpoint import load
    from moekit.formats.tokenizer import load_tokenizer
    from moekit.generate import SamplingSettings, complete
    from moekit.train.hardware import choose_device
    from moekit.train.state import newest

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    settings = validate(SamplingSettings, {name: getattr(args, name) for name in names})
    folder = newest(args.model) if (args.model / "checkpoints").is_dir() else args.model
    if folder is None:
        raise ConfigError(f"{args.model} is a run without a checkpoint yet")
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model, tokenizer = (
        load(folder, choose_device(args.device), dtype, check_hashes=folder is args.model),
        load_tokenizer(folder),
    )

    untold = [prompts[0]]  # not written before the first token comes: a mistake must not follow half a line

    def stream(number: int, text: str) -> None:
        sys.stdout.write("".join((*untold, text)))
        sys.stdout.flush()
        untold.clear()

    live = stream if len(prompts) == 1 and not args.json else None  # several prompts grow side by side
    texts = complete(
        model, tokenizer, prompts, settings, max_new_tokens=args.max_new_tokens, stop=args.stop, stream=live
    )
    if args.json:
        return _emit(args, {"completions": [completion._asdict() for completion in texts]}, list)
    ends = untold if live else [completion.prompt + completion.text for completion in texts]
    sys.stdout.write("\n\n".join(ends) + "\n")
    return 0


def run_quickstart(args: argparse.Namespace) -> int:
    """Runs the whole job on the included text."""
    from moekit.quickstart import quickstart
    from moekit.tables import quickstart_tables
    from moekit.train.progress import TerminalProgress

    result = quickstart(args.out, steps=args.steps, device=args.device, sinks=lambda config: [TerminalProgress(config)])
    if result["status"] != "done":
        _emit(args, result, lambda: [f"saved; `moekit quickstart --out {args.out}` goes on"])
        return 130

    return _emit(args, result, lambda: quickstart_tables(result))

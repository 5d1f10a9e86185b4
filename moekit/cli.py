"""The `moekit` command: one sub-command a verb; parse, make a configuration, one library call.

Results go to standard output, as a table or with --json as one document; everything else goes to standard error. Exit
status: 0 done, 1 a check did not hold, 2 bad usage or input. A verb's `--help` is the docstring of its function.
Whatever is slow to import is imported inside the verb that needs it, so that --help answers at once.
"""

import argparse
import contextlib
import inspect
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moekit.errors import ConfigError, DataError, MoekitError, nearest
from moekit.version import __version__

if TYPE_CHECKING:
    from rich.table import Table

    from moekit.config import Strict


class _Parser(argparse.ArgumentParser):
    """Raises our one-line error instead of printing a usage block."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status of the command line `argv` (that of the process if None)."""
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
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for this
            raise
        reason = str(error).partition(". ")[0]
        message = f"{reason}; in training, a smaller data.micro_batch_size or recompute true needs less memory"
    except KeyboardInterrupt:
        sys.stderr.write("\nmoekit: interrupted\n")
        return 130
    sys.stderr.write(f"moekit: error: {' '.join(message.split())}\n")
    return 2


def _run(argv: list[str]) -> int:
    parser, verbs = _parsers()
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
        verb.epilog = f"{verb.epilog}\n\n{_settings_help(root)}"
    words, overrides = _take_overrides(verb, words)
    args = verb.parse_args(words, argparse.Namespace(overrides=overrides))
    status: int = args.run(args)
    return status


def _take_overrides(verb: _Parser, words: list[str]) -> tuple[list[str], dict[str, str]]:
    """Returns the words that are the parser's own, and the overrides, `--a.b v` or `--a.b=v`, wherever they stand."""
    known = verb._option_string_actions
    kept: list[str] = []
    overrides: dict[str, str] = {}
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if not option.startswith("--") or option in known:
            kept.append(word)
            continue
        _check_override(verb, option, known)
        if not equals and (value := next(rest, "--")).startswith("--"):
            raise ConfigError(f"{option} needs a value: `{option} VALUE`")
        overrides[option[2:].replace("-", "_")] = value
    return kept, overrides


def _check_override(verb: _Parser, option: str, known: Mapping[str, Any]) -> None:
    """Raises unless the option is an override, dotted or a setting of a run, and the verb takes them."""
    hint = nearest(option.replace("_", "-"), known)
    if verb.get_default("settings") is not None:
        from moekit.config import RunConfig, where

        key = option[2:].replace("-", "_")
        if "." in key or key in RunConfig.model_fields:
            return
        hint = hint or where(key)
    raise ConfigError(f"unknown option {option}{hint}; see `{verb.prog} --help`")


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

    def verb(name: str, run: Callable[[argparse.Namespace], int]) -> Callable[..., argparse.Action]:
        text, _, example = inspect.cleandoc(run.__doc__ or "").partition("\n\n")
        added = subparsers.add_parser(name, help=text, description=text, epilog=example)
        added.set_defaults(run=run)
        added.add_argument("--json", action="store_true", help="one JSON document on standard output")
        return added.add_argument

    device = {"default": "auto", "help": "auto, cpu, cuda or cuda:N (auto)"}
    shown = {"action": "store_true", "help": "print the resolved YAML and exit"}

    add = verb("quickstart", run_quickstart)
    add("--out", type=Path, default=Path("moekit-quickstart"), help="directory to write (moekit-quickstart)")
    add("--steps", type=_positive, help="training steps of each model (the recipe's, two to four minutes)")
    add("--device", **device)

    add = verb("doctor", run_doctor)
    add("--device", **device)
    add("--quick", action="store_true", help="measure nothing")

    verb("presets", run_presets)

    add = verb("plan", run_plan)
    add("source", metavar="PRESET|FILE", help="a preset, or a YAML file of a run or of a model")
    add("--sequence-length", type=_positive, help="tokens (the model's context, at most 4096)")
    add("--batch", type=_positive, default=1, help="sequences in one forward pass, for memory (1)")
    add("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of the compute (bfloat16)")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="whose states to count (adamw)")
    add("--recompute", action="store_true", help="activations are recomputed in the backward pass")
    add("--print_config", "--print-config", **shown)

    add = verb("prepare", run_prepare)
    add("files", nargs="+", metavar="FILE", help="jsonl, txt or parquet, plain, .gz or .zst; or folders of them")
    add("--out", type=Path, required=True, metavar="DATA", help="directory to write")
    add("--valid", nargs="+", metavar="FILE", help="validation text; else a part of FILES is held out")
    add("--valid-fraction", type=float, metavar="F", help="documents held out without --valid (0.01)")
    add("--vocab-size", type=_positive, metavar="N", help="of the tokenizer that is trained (4096)")
    add("--tokenizer", metavar="FILE|DIR", help="use this tokenizer.json instead of training one")
    add("--text-field", default="text", help="field of a record that holds its text (text)")
    add("--domain-field", default="domain", help="field that names its domain (domain)")

    add = verb("train", run_train)
    add("source", nargs="?", metavar="PRESET|FILE", help="a preset or a run's YAML file; not needed to resume")
    add("--data", metavar="DATA", help="directory that `moekit prepare` wrote; sets data.path")
    add("--out", type=Path, metavar="RUN", help="directory of the run; it must not exist, unless --resume")
    add("--resume", action="store_true", help="go on from the newest checkpoint in RUN")
    add("--quiet", action="store_true", help="no progress display")
    add("--print_config", "--print-config", **shown)

    add = verb("generate", run_generate)
    add("model", type=Path, metavar="DIR", help="a model directory or a run")
    add("--prompt", action="append", default=[], metavar="TEXT", help="text to continue; may be repeated")
    add("--prompts-file", type=Path, metavar="FILE", help="one prompt per line")
    add("--max-new-tokens", type=_positive, default=64, metavar="N", help="(64)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0 takes the likeliest token (0)")
    add("--top-k", type=_positive, metavar="N", help="sample among the N likeliest tokens")
    add("--top-p", type=float, metavar="P", help="sample among the likeliest tokens of total probability P")
    add("--min-p", type=float, metavar="P", help="drop tokens below P times the likeliest one's probability")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="above 1: avoid tokens seen (1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text; may be repeated")
    add("--seed", type=int, default=0, help="of the sampling (0)")
    add("--device", **device)
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the weights (as saved)")
    add("--backend", default="auto", metavar="NAME", help="of the experts' products; see `moekit doctor` (auto)")
    mapped = "read weights from their files as they are needed (where they exceed half of the memory)"
    add("--mapped", action=argparse.BooleanOptionalAction, help=mapped)

    add = verb("convert", run_convert)
    add("source", type=Path, metavar="SRC", help="a model directory, a run or a GGUF file")
    add("target", type=Path, metavar="DST", help="directory, or GGUF file, to write; it must not exist")
    layouts = "moekit, gguf, a model_type such as deepseek_v2, or hf: the first that fits (moekit)"
    add("--to", default="moekit", metavar="LAYOUT", help=layouts)
    precisions = ("float32", "float16", "bfloat16", "int8", "int4", "q8_0", "q4_0")
    add("--dtype", choices=precisions, help="of the weights (as they are)")
    add(
        "--mtp", choices=("drop", "keep"), default="drop", help="DeepSeek-V3's layers for multi-token prediction (drop)"
    )
    add("--text", type=Path, metavar="FILE", help="text to compare the logits on (random tokens)")

    add = verb("verify", run_verify)
    add("model", type=Path, metavar="DIR", help="a model directory or a run")
    add("--against", type=Path, metavar="OTHER", help="another one, to compare weights, logits and routing with")
    add("--text", type=Path, metavar="FILE", help="text to compare on (random tokens)")

    verbs: dict[str, _Parser] = dict(subparsers.choices)
    verbs["plan"].set_defaults(settings="model")
    verbs["train"].set_defaults(settings="")
    return parser, verbs


def _settings_help(root: str) -> str:
    """Returns all settings below `root`, by part, each as the option that changes it."""
    from moekit.config import describe_keys

    lines = ["settings, each changed by --NAME VALUE, (default):"]
    part = None
    for key, kind, default, description in describe_keys():
        if not key.startswith(root):
            continue
        if part != (part := key.rpartition(".")[0]):
            lines.append(f"\n{part or 'run'}:")
        lines += [f"  --{key} {kind.replace(' | ', '|')} ({default})", f"        {description}"]
    return "\n".join(lines)


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


def _emit_config(args: argparse.Namespace, config: "Strict") -> int:
    from moekit.config import dump

    if args.json:
        return _emit(args, config.model_dump(mode="json"), list)
    sys.stdout.write(dump(config, comments=True))
    return 0


def run_presets(args: argparse.Namespace) -> int:
    """list the models that can be named

    example:
      moekit presets --json
    """
    from moekit.config import preset, preset_names, summary
    from moekit.tables import presets_tables

    rows: list[dict[str, Any]] = []
    for name in preset_names():
        config = preset(name)
        parameters = {"total": config.num_parameters, "active": config.num_active_parameters}
        rows.append({"name": name, "parameters": parameters, "description": summary(config)})
    return _emit(args, {"presets": rows}, lambda: presets_tables(rows))


def run_plan(args: argparse.Namespace) -> int:
    """count a model's parameters, FLOPs and bytes; no weights are made

    example:
      moekit plan deepseekmoe-2b --model.ffn.n_routed_experts 127 --batch 8
    """
    from moekit.config import load_model_config, plan, summary
    from moekit.tables import plan_tables

    config = load_model_config(args.source, args.overrides)
    if args.print_config:
        return _emit_config(args, config)
    document = plan(config, args.sequence_length, args.batch, args.precision, args.optimizer, args.recompute)
    return _emit(args, {"model": args.source, **document}, lambda: plan_tables(args.source, summary(config), document))


@contextlib.contextmanager
def _bars() -> Iterator[Callable[[str, int, int], None]]:
    """Yields what draws a bar on standard error for each phase, given bytes done and bytes in all."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

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
        yield progress
    finally:
        if tasks:
            bars.stop()


def run_prepare(args: argparse.Namespace) -> int:
    """turn text into a tokenizer and tokenised shards; run again, it goes on where it stopped

    example:
      moekit prepare books/ news.jsonl.gz --out data --vocab-size 4096
    """
    from moekit.data.prepare import prepare
    from moekit.tables import prepare_tables

    same = ("valid_fraction", "vocab_size", "tokenizer", "text_field", "domain_field")
    options = {name: getattr(args, name) for name in same}
    with _bars() as progress:
        manifest = prepare(args.files, args.out, valid_paths=args.valid, progress=progress, **options)
    return _emit(args, manifest, lambda: prepare_tables(manifest, str(args.out)))


def run_train(args: argparse.Namespace) -> int:
    """train a model, or go on with a run

    example:
      moekit train tiny-deepseekmoe --data data --out run --steps 300 --optimizer.lr 1e-3
      moekit train --resume --out run
    """
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
        return _emit_config(args, config)
    from moekit.train import train
    from moekit.train.progress import TerminalProgress

    receipt = train(config, args.out, resume=args.resume, sinks=[] if args.quiet else [TerminalProgress(config)])
    if receipt["status"] != "done":
        _emit(args, receipt, lambda: [f"saved; `moekit train --resume --out {args.out}` goes on"])
        return 130
    return _emit(args, receipt, lambda: [f"{args.out} holds the run; next: moekit generate {args.out} --prompt ..."])


def run_generate(args: argparse.Namespace) -> int:
    """continue a text

    example:
      moekit generate run --prompt "Once upon a time" --temperature 0.8
    """
    more = _text(args.prompts_file).splitlines() if args.prompts_file else []
    prompts = [*args.prompt, *more]
    if not prompts:
        raise ConfigError("--prompt or --prompts-file is missing: the text to continue")
    import torch

    from moekit.config import validate
    from moekit.formats.checkpoint import load
    from moekit.formats.tokenizer import load_tokenizer
    from moekit.formats.weights import weight_bytes
    from moekit.generate import SamplingSettings, complete
    from moekit.train.hardware import choose_device, memory

    settings = validate(SamplingSettings, {name: getattr(args, name) for name in SamplingSettings.model_fields})
    folder = _model_folder(args.model)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    device, mapped = choose_device(args.device), args.mapped
    if mapped is None:
        mapped = device.type == "cpu" and weight_bytes(folder) > memory() / 2
    check = folder is args.model and not mapped  # which would read all that is to stay in the files
    model = load(folder, device, dtype, check_hashes=check, mapped=mapped)
    model.set_experts_backend(args.backend)
    tokenizer = load_tokenizer(folder)
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


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text: byte {error.start}") from None


def _model_folder(given: Path) -> Path:
    """Returns the newest whole checkpoint of a run, or the model directory that was given."""
    from moekit.train.state import newest

    if not (given / "checkpoints").is_dir():
        return given
    if (folder := newest(given)) is None:
        raise ConfigError(f"{given} is a run without a checkpoint yet")
    return folder


def run_convert(args: argparse.Namespace) -> int:
    """a model in another precision or format, with what that costs

    examples:
      moekit convert run small --dtype int8
      moekit convert run small.gguf --to gguf --dtype q8_0
    """
    from moekit.tables import convert_tables

    text = None if args.text is None else _text(args.text)
    with _bars() as progress:
        receipt = _converter(args, text)(args.source, args.target, args.dtype, progress=progress)
    _emit(args, receipt, lambda: convert_tables(receipt, str(args.target)))
    return 0 if all(check["held"] for check in receipt["checks"]) else 1


def run_verify(args: argparse.Namespace) -> int:
    """is a model directory what it claims to be: files, receipt, tensors, values

    example:
      moekit verify small --against run
    """
    from moekit.formats.verify import verify
    from moekit.tables import verify_tables

    text = None if args.text is None else _text(args.text)
    other = None if args.against is None else _model_folder(args.against)
    with _bars() as progress:
        document = verify(_model_folder(args.model), other, text=text, progress=progress)
    _emit(args, document, lambda: verify_tables(document))
    return 0 if document["held"] else 1


def _converter(args: argparse.Namespace, text: str | None) -> Callable[..., dict[str, Any]]:
    """Returns what converts the source's format into the one that is asked for, after checking the options."""
    from moekit.formats.convert import convert
    from moekit.formats.gguf.export import export_gguf
    from moekit.formats.gguf.restore import import_gguf

    source, target = "GGUF" if args.source.is_file() else "a model directory", args.to
    if source == "GGUF" and target != "moekit":
        raise ConfigError(f"{args.source} is a file; make a model directory of it first (--to moekit)")
    dtypes: tuple[str | None, ...] = (None, "float32", "bfloat16")
    if target == "gguf":
        dtypes = (*dtypes, "float16", "q8_0", "q4_0")
    elif source != "GGUF":
        dtypes = (*dtypes, "int8", "int4")
    if args.dtype not in dtypes:
        allowed = f"{source} to {target} takes {', '.join(name or 'no --dtype' for name in dtypes)}"
        raise ConfigError(f"--dtype is {args.dtype or 'missing'} but {allowed}")
    if source != "GGUF" and target != "gguf":
        return lambda source, *rest, **more: convert(
            _model_folder(source), *rest, layout=target, text=text, mtp=args.mtp, **more
        )
    if args.mtp == "keep":
        raise ConfigError("--mtp is keep but GGUF has no place for those layers here; leave it out")
    if text is not None:
        raise ConfigError("--text compares logits, which takes two model directories; leave it out")
    if target == "gguf":
        return lambda source, *rest, **more: export_gguf(_model_folder(source), *rest, **more)
    return import_gguf


def run_doctor(args: argparse.Namespace) -> int:
    """show what this machine has, what computes the experts on it, and how fast

    example:
      moekit doctor --device cpu
    """
    from moekit.doctor import examine
    from moekit.tables import doctor_tables

    document = examine(args.device, measure=not args.quick)
    return _emit(args, document, lambda: doctor_tables(document))


def run_quickstart(args: argparse.Namespace) -> int:
    """the main job, from text to report, in minutes

    example:
      moekit quickstart --out first
    """
    from moekit.quickstart import quickstart
    from moekit.tables import quickstart_tables
    from moekit.train.progress import TerminalProgress

    result = quickstart(args.out, steps=args.steps, device=args.device, sinks=lambda config: [TerminalProgress(config)])
    if result["status"] != "done":
        _emit(args, result, lambda: [f"saved; `moekit quickstart --out {args.out}` goes on"])
        return 130
    return _emit(args, result, lambda: quickstart_tables(result))

"""how well a model predicts text, and how it does on benchmark tasks

example:
  moekit evaluate run --text books/ news.jsonl.gz
"""

import argparse
import logging
import time
from typing import TYPE_CHECKING, Any

from moekit.cli.output import bars, emit
from moekit.cli.parser import DEVICE, Add, dtype, given, path, positive
from moekit.errors import ConfigError, UnsupportedError

if TYPE_CHECKING:
    from moekit.formats.tokenizer import Tokenizer
    from moekit.nn.model import Model

logger = logging.getLogger(__name__)


def options(add: Add) -> None:
    add("model", type=path, metavar="DIR", help="a model directory or a run")
    add(
        "--text",
        type=given,
        nargs="+",
        metavar="FILE",
        help="jsonl, txt or parquet, plain, .gz or .zst; or folders of them",
    )
    add("--data", type=path, metavar="DATA", help="prepared data, of which the validation text is taken")
    add("--tasks", metavar="NAMES", help="benchmark tasks, between commas, or all")
    add("--task-data", nargs="+", type=path, default=[], metavar="FOLDER", help="where the tasks' files are")
    add(
        "--questions",
        type=path,
        metavar="FILE",
        help="of a synthetic task, as `moekit prepare --synthetic` writes them",
    )
    add("--sentences", type=path, metavar="FILE", help="labelled sentences, or a folder of them, as the run had them")
    add("--limit", type=positive, metavar="N", help="the first N items of each task only")
    add("--allow-code-execution", action="store_true", help="run the programs that the model writes, within limits")
    add("--batch-size", type=positive, default=8, metavar="N", help="sequences at once; no score depends on it (8)")
    add("--sequence-length", type=positive, metavar="N", help="tokens that the model sees at once (all its positions)")
    add("--stride", type=positive, metavar="N", help="tokens that each window of text adds (--sequence-length)")
    add("--text-field", default="text", help="field of a record that holds its text (text)")
    add("--domain-field", default="domain", help="field that names its domain (domain)")
    add("--device", **DEVICE)
    add("--dtype", type=dtype, choices=("float32", "bfloat16", "float16"), help="of the weights (as saved)")
    add("--backend", default="auto", metavar="NAME", help="of the experts' products; see `moekit doctor` (auto)")
    add("--out", type=path, metavar="FILE", help="write the record there too, as JSON")


def run(args: argparse.Namespace) -> int:
    _check(args)
    tasks = _tasks(args) if args.tasks else {}
    import torch

    from moekit.evaluate.record import about
    from moekit.files import check_writable, write_json
    from moekit.formats.checkpoint import load
    from moekit.formats.tokenizer import load_tokenizer
    from moekit.tables import evaluate_tables
    from moekit.train.hardware import choose_device
    from moekit.train.state import model_folder

    start = time.perf_counter()
    if args.out is not None:
        check_writable(args.out)
    folder = model_folder(args.model)
    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    model = load(folder, choose_device(args.device), dtype, check_hashes=folder is args.model)
    model.set_experts_backend(args.backend)
    tokenizer = load_tokenizer(folder)
    record = about(folder, model, tokenizer)
    if leak := record["model"]["looks_ahead"]:
        logger.warning(leak)
    if args.text or args.data:
        record["text"] = _text(args, model, tokenizer)
    if tasks:
        from moekit.evaluate.benchmarks import run_tasks
        from moekit.evaluate.harness import MoekitLM

        harness = MoekitLM(model, tokenizer, args.batch_size, max_length=args.sequence_length)
        record["tasks"] = run_tasks(harness, tasks, args.limit)
    if args.questions:
        record["questions"] = _questions(args, model, tokenizer)
    if args.sentences:
        from moekit.evaluate.sentences import score_sentences

        record["sentences"] = score_sentences(model, tokenizer, folder, args.sentences, args.sequence_length)
    record["seconds"] = round(time.perf_counter() - start, 1)
    if args.out is not None:
        write_json(args.out, record)
    return emit(args, record, lambda: evaluate_tables(record))


def _check(args: argparse.Namespace) -> None:
    """Raises unless there is something to evaluate on and every option has an effect."""
    if not (args.text or args.data or args.tasks or args.questions or args.sentences):
        raise ConfigError("--text, --data, --tasks, --questions or --sentences is missing: what to evaluate on")
    if args.text and args.data:
        raise ConfigError("--text and --data are both given; leave one of them out")
    if args.sequence_length and not (args.text or args.data or args.tasks or args.sentences):
        raise ConfigError("--sequence-length has no effect with --questions alone; leave it out")
    if args.stride and not (args.text or args.data):
        raise ConfigError("--stride has no effect without --text or --data; leave it out")
    if not args.text and (args.text_field, args.domain_field) != ("text", "domain"):
        raise ConfigError("--text-field and --domain-field have no effect without --text; leave them out")
    for name in ("task_data", "limit", "allow_code_execution"):
        if getattr(args, name) and not args.tasks:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without --tasks; leave it out")


def _tasks(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the tasks with their items, read before the model is."""
    try:
        from moekit.evaluate.benchmarks import load_tasks, names
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("lm_eval", "datasets"):
            raise
        raise UnsupportedError("--tasks needs lm-evaluation-harness; pip install 'moekit[eval]'") from None
    given = names() if args.tasks == "all" else args.tasks.replace(",", " ").split()
    return load_tasks(given, args.task_data, allow_code_execution=args.allow_code_execution)


def _text(args: argparse.Namespace, model: "Model", tokenizer: "Tokenizer") -> dict[str, Any]:
    from moekit.data import open_dataset
    from moekit.evaluate.record import text_record
    from moekit.evaluate.text import encoded, read_dataset, read_files

    with bars() as progress:
        if args.text:
            read = read_files(args.text, args.text_field, args.domain_field, progress)
            documents, source = encoded(tokenizer, read), [*args.text]
        else:
            documents = read_dataset(open_dataset(args.data, "valid"), tokenizer, progress)
            source = [str(args.data)]
        windows = {"sequence_length": args.sequence_length, "stride": args.stride}
        return text_record(model, documents, tokenizer, source, batch_size=args.batch_size, **windows)


def _questions(args: argparse.Namespace, model: "Model", tokenizer: "Tokenizer") -> dict[str, Any]:
    from moekit.data.synthetic import read_questions
    from moekit.evaluate.synthetic import score

    found = score(model, tokenizer, read_questions(args.questions), batch_size=args.batch_size)
    return {
        task: {
            "accuracy": one.all.accuracy,
            "stderr": one.all.standard_error,
            "n": one.all.questions,
            "by_group": {group: share.accuracy for group, share in one.by_group.items()},
        }
        for task, one in found.items()
    }

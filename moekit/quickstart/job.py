"""Tokenizer, training, baseline, samples, report: each step is the library call that its verb makes."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from moekit.config import RunConfig, load_run_config
from moekit.data import open_dataset, prepare
from moekit.errors import ConfigError
from moekit.formats.checkpoint import load
from moekit.formats.tokenizer import load_tokenizer
from moekit.generate import Completion, SamplingSettings, complete
from moekit.quickstart.report import write_report
from moekit.quickstart.results import read_result
from moekit.train import train
from moekit.train.metrics import Sink
from moekit.train.state import newest

logger = logging.getLogger(__name__)

TEXT = Path(__file__).parent / "text"
MODEL, BASELINE = "tiny-deepseekmoe", "tiny-dense-x2"
"""The baseline's FFN is two standard FFNs wide, so both models spend the same FLOPs on a token."""
PROMPT_TOKENS, NEW_TOKENS = 24, 60


def quickstart(
    out: str | Path,
    *,
    steps: int | None = None,
    device: str = "auto",
    sinks: Callable[[RunConfig], Sequence[Sink]] = lambda config: (),
) -> dict[str, Any]:
    """Runs the whole job in `out` and returns its figures. `steps` None: the recipe's own, two to four minutes.

    What is finished is not done again: a killed quickstart goes on where it stopped. `sinks` makes the displays of a
    training run.
    """
    start = time.perf_counter()
    folder = Path(out)
    if folder.exists() and not (folder / "data").is_dir() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something else; choose another --out")
    data = folder / "data"
    logger.info("1/5  reading the included text and training a tokenizer")
    texts, unseen = (sorted(TEXT.glob(f"*.{split}.jsonl.gz")) for split in ("train", "valid"))
    manifest = prepare(texts, data, valid_paths=unseen, vocab_size=4096)
    runs = {}
    for number, preset in enumerate((MODEL, BASELINE), start=2):
        config = _config(preset, data, steps, device)
        logger.info("%d/5  training %s, %d steps", number, preset, config.steps)
        runs[preset] = folder / preset
        receipt = train(config, runs[preset], resume=(runs[preset] / "config.yaml").is_file(), sinks=sinks(config))
        if receipt["status"] != "done":
            return {"status": receipt["status"], "signal": receipt.get("signal"), "out": str(folder)}
    logger.info("4/5  letting it write")
    samples = _samples(runs[MODEL], data)
    logger.info("5/5  writing the report")
    report = write_report(folder, runs, samples, manifest["splits"]["train"]["domains"])
    results = [read_result(preset, run, "first") for preset, run in runs.items()]
    return {
        "status": "done",
        "out": str(folder),
        "report": str(report),
        "seconds": round(time.perf_counter() - start, 1),
        "bits_per_byte": {result.name: {"mean": result.score, **result.domains} for result in results},
        "samples": {domain: [completion._asdict() for completion in texts] for domain, texts in samples.items()},
    }


def _config(preset: str, data: Path, steps: int | None, device: str) -> RunConfig:
    fixed: dict[str, Any] = {"data.path": str(data), "device": device}
    if steps is not None:
        warmup = load_run_config(preset, **fixed).schedule.warmup_steps
        fixed |= {"steps": steps, "schedule.warmup_steps": min(warmup, max(1, steps // 6))}
        fixed |= {"eval_every": max(1, steps // 5), "save_every": max(1, steps // 5)}
    return load_run_config(preset, **fixed)


def _samples(run: Path, data: Path) -> dict[str, list[Completion]]:
    """Returns one continuation per domain of the beginning of a validation document."""
    checkpoint = newest(run)
    assert checkpoint is not None  # the run is done
    model, tokenizer = load(checkpoint, check_hashes=False), load_tokenizer(checkpoint)
    valid = open_dataset(data, "valid")
    settings = SamplingSettings(temperature=0.7, top_p=0.9, repetition_penalty=1.1, seed=0)
    samples = {}
    for domain in valid.domains:
        start, _ = valid.domain_range(domain)
        prompt = tokenizer.decode(valid.read(start, PROMPT_TOKENS).tolist()).rstrip("\ufffd")
        samples[domain] = complete(model, tokenizer, [prompt], settings, max_new_tokens=NEW_TOKENS)
    return samples

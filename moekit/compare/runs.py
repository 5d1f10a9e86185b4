"""The runs of a comparison: where each lies, whether it is the run that it should be, how far it is."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

from moekit import files, receipts
from moekit.compare.plan import Plan
from moekit.config import RunConfig, load_run_config
from moekit.data import Sampler, TokenDataset, open_dataset
from moekit.errors import ConfigError, DataError
from moekit.train import directory, metrics

COMPARED: Any = {**directory.KEPT, "eval_tokens": True}
"""Settings that a run must share with the comparison's: what training depends on, and what its score depends on."""


class Run(NamedTuple):
    """One architecture with one seed."""

    name: str
    seed: int
    config: RunConfig
    path: Path
    taken: bool
    """It lies elsewhere and is never written to."""

    @property
    def label(self) -> str:
        return f"{self.name}/seed-{self.seed}"


def runs_of(plan: Plan, out: Path) -> list[Run]:
    """Returns all runs, seed by seed, so that an interrupted comparison has whole seeds to look at."""
    found = []
    for seed in plan.comparison.seeds:
        for name, config in plan.configs.items():
            taken = plan.comparison.architectures[name].run
            path = Path(taken.replace("{seed}", str(seed))) if taken else out / "runs" / name / f"seed-{seed}"
            found.append(Run(name, seed, config.model_copy(update={"seed": seed}), path, taken is not None))
    return found


def state(run: Run) -> Literal["new", "begun", "done"]:
    """Returns how far a run is, from its directory."""
    if (run.path / receipts.FILE).is_file():
        receipt = receipt_of(run)
        if receipt.get("status") == "done" and receipt.get("step") == run.config.steps:
            return "done"
    return "begun" if (run.path / "config.yaml").is_file() else "new"


def receipt_of(run: Run) -> dict[str, Any]:
    return files.read_json(run.path / receipts.FILE, dict[str, Any], DataError)


def check(runs: list[Run]) -> tuple[str, dict[int, str]]:
    """Returns the fingerprint of the data and, by seed, that of the order in which its batches come.

    Raises ConfigError or DataError, before anything is trained, where a run that is there already was trained with
    other settings or on other text, where a run to be taken is not finished, or where the data does not fit.
    """
    data = runs[0].config.data.path
    dataset = open_dataset(data, "train", order=runs[0].config.data.order)
    if "valid" not in dataset.manifest.splits or not dataset.manifest.splits["valid"].tokens:
        raise DataError(f"{data} has no validation text, without which nothing can be compared; prepare it with some")
    for run in runs:
        room = run.config.model.vocab_size
        if room < dataset.vocab_size:
            raise ConfigError(
                f"architectures.{run.name}: model.vocab_size is {room} but the tokenizer of {data} has "
                f"{dataset.vocab_size} entries"
            )
        reached = state(run)
        if reached != "new":
            _check_settings(run)
        if run.taken and reached != "done":
            what = "is not finished" if reached == "begun" else "is not a run (it has no config.yaml)"
            raise ConfigError(f"architectures.{run.name}.run: {run.path} {what}; only a finished run can be taken")
        if reached == "done" and receipt_of(run)["inputs"]["data"]["sha256"] != dataset.fingerprint:
            raise ConfigError(
                f"{run.path} was trained on other text than {data} holds; compare on that text, or "
                + ("take another run" if run.taken else "choose another --out")
            )
    return dataset.fingerprint, {run.seed: _order(runs, run.seed, dataset) for run in runs}


def _check_settings(run: Run) -> None:
    file = run.path / "config.yaml"
    there, wanted = (one.model_dump(include=COMPARED) for one in (load_run_config(file), run.config))
    if there != wanted:
        taken, own = "only a run that was trained as the others are can be taken", "choose another --out, or remove it"
        change = directory.difference(there, wanted)
        raise ConfigError(f"{run.label}: {change} in {file}; {taken if run.taken else own}")


def _order(runs: list[Run], seed: int, dataset: TokenDataset) -> str:
    """Returns the hash of the windows that the seed's batches consist of, up to the shortest run.

    It is taken from every architecture's own configuration: that they are equal is what makes a comparison paired.
    """
    same = [run.config for run in runs if run.seed == seed]
    steps = min(config.steps for config in same)
    hashes = {
        settings: _windows(Sampler(dataset, *settings[:2], seed, settings[2]), steps)
        for settings in {(c.data.sequence_length, c.data.batch_size, c.data.packing) for c in same}
    }
    assert len({*hashes.values()}) == 1, "architectures of one seed would not see the same batches"
    return next(iter(hashes.values()))


def _windows(sampler: Sampler, steps: int) -> str:
    digest = hashlib.sha256()
    for step in range(steps):
        digest.update(json.dumps(sampler.order(step)).encode())
    return digest.hexdigest()


def last_record(run: Run) -> dict[str, Any] | None:
    """Returns the newest training record of a run, or None; reads the end of its log only."""
    try:
        with (run.path / metrics.FILE).open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - 2**18))
            lines = file.read().split(b"\n")
    except OSError:
        return None
    for line in reversed(lines[:-1]):  # behind the last line end is nothing, or a line that is being written
        try:
            record: dict[str, Any] = json.loads(line)
        except ValueError:
            continue
        if record.get("kind") == "train":
            return record
    return None

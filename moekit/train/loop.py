"""The training loop. A step is a function of weights, optimiser state and (seed, step): resuming is exact."""

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moekit import files, receipts
from moekit.config import MoEConfig, RunConfig, Variant
from moekit.data import Batch
from moekit.errors import CheckpointError, ConfigError, TrainingError
from moekit.nn.model import Model
from moekit.ops.balance import LoadSums
from moekit.ops.loss import IGNORED
from moekit.train import directory, health, metrics, optimizer, process, schedule, state
from moekit.train import hardware as machine
from moekit.train.objectives import open_objective

logger = logging.getLogger(__name__)

WRITTEN = ("step", "tokens", "seconds", "sums", "health", "scores", "origin")
"""What a run writes down of itself with every checkpoint."""


class Origin(NamedTuple):
    """The weights that a run starts from, where they are not drawn."""

    model: Model
    account: dict[str, Any]
    """For the receipt: `inputs`, by hash, and `tensors`."""


def train(
    config: RunConfig,
    out: str | Path,
    *,
    resume: bool = False,
    sinks: Sequence[metrics.Sink] = (),
    origin: Callable[[RunConfig], Origin] | None = None,
) -> dict[str, Any]:
    """Trains a model and returns the run's receipt; its "status" is done or interrupted.

    `out` gets config.yaml, metrics.jsonl, checkpoints/ and receipt.json. A killed run continues with `resume` from its
    newest whole checkpoint and ends with the same bits as a straight one, on one device. SIGTERM and SIGINT save and
    return. `origin` gives the weights that `config.init` asks for; it is asked once, when the run begins, and not when
    it goes on. Raises ConfigError for a run that exists (without `resume`) or that was started with other settings, and
    TrainingError when the loss or the gradient is not finite.
    """
    if config.init is not None and origin is None:
        raise ConfigError(f"init is {config.init} but train() has no `origin`; moekit.start.origin reads such weights")
    run, all_sinks = Path(out), list(sinks)
    process.keep_memory()
    with process.deterministic():
        try:
            directory.check(run, config, resume)
            with contextlib.ExitStack() as held:
                return _Run(config, run, resume, all_sinks, origin, held).train()
        finally:  # whatever happened: a display must not stay on the terminal
            for sink in all_sinks:
                sink.close()


class _Run:
    """What one run holds between its steps."""

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        resume: bool,
        sinks: list[metrics.Sink],
        origin: Callable[[RunConfig], Origin] | None,
        held: contextlib.ExitStack,
    ) -> None:
        """Makes or restores everything, and adds the run's own sinks to the caller's and its lock to what is held."""
        self.config, self.run, self.sinks = config, run, sinks
        self.hardware = machine.choose(config.device, config.precision)
        device = self.hardware.device
        folder = self._newest()
        weights = state.model_folder(Path(config.init)) if folder is None and config.init is not None else folder
        self.objective = open_objective(config, self.hardware, weights)
        torch.manual_seed(config.seed)
        self.origin: dict[str, Any] = {}
        if config.init is not None and origin is not None and folder is None:
            self.model, self.origin = origin(config)
        else:
            self.model = Model(config.model)
            self.model.balance_hash(torch.from_numpy(self.objective.token_counts))
        if leak := config.model.looks_ahead:
            logger.warning(leak)
        self.model.recompute = config.recompute
        self.model.to(device).train()
        dtype = torch.bfloat16 if self.hardware.autocast else torch.float32
        self.model.set_experts_backend(config.backend, dtype)
        self.optimizers = optimizer.build(self.model, config.optimizer)
        self.step, self.tokens, self.seconds, self.flops = 0, 0, 0.0, 0
        self.sums: dict[str, float] = {}
        """Over the log window: loss, grad_norm, steps, and each balance term."""
        self.window = health.no_load(config.model, device)
        self.idle = torch.zeros_like(self.window.tokens_per_expert, device="cpu")
        """Log windows in a row in which an expert had no token."""
        self.health: dict[str, Any] = {}
        self.scores: dict[str, Any] = {}
        if folder is not None:
            self._restore(folder)
        if config.compile:
            for block in self.model.layers:
                block.compile()
        self.matmul_flops = machine.matmul_flops(self.hardware)
        held.enter_context(directory.locked(run))  # not before all else is sound: a mistake leaves no directory behind
        directory.check(run, config, resume)  # another process may have begun it, or gone on with it
        if self._newest() != folder:
            raise ConfigError(f"another process has gone on with {run}; run the same command again")
        directory.claim(run, config)
        sinks.insert(0, metrics.JsonLines(run, self.step))
        if config.tensorboard:
            sinks.append(metrics.TensorBoard(run, self.step))

    def train(self) -> dict[str, Any]:
        self.logged, stop = self._reached(), False
        with process.signals() as caught:
            while self.step < self.config.steps and not stop:
                start = time.perf_counter()
                self._one_step()
                logs = self._due(self.config.log_every)
                if logs:
                    machine.synchronize(self.hardware.device)
                self.seconds += time.perf_counter() - start  # logging, validating and saving are not training time
                if logs:
                    self._log()
                if self._due(self.config.eval_every):
                    self._validate()
                stop = bool(caught)  # asked once: a signal after this line waits for the next step
                if stop or self._due(self.config.save_every):
                    self._save()
            return self._finish(caught)

    def _due(self, every: int | None) -> bool:
        return self.step == self.config.steps or bool(every and self.step % every == 0)

    def _one_step(self) -> None:
        """Forward and backward over the micro-batches, then one optimiser step and one bias update."""
        config, batch = self.config, self.objective.batch(self.step)
        self.model.begin_step(self.step)
        optimizer.set_factor(self.optimizers, schedule.factor(config.schedule, self.step, config.steps))
        size = config.data.micro_batch_size or config.data.batch_size
        parts = config.data.batch_size // size
        predicted = max(1, int((batch.labels != IGNORED).sum()))
        load = health.no_load(config.model, self.hardware.device)
        measured: dict[str, torch.Tensor] = {}
        for first in range(0, config.data.batch_size, size):
            part = Batch(*(values[first : first + size] for values in batch))
            prior = [LoadSums(*sums) for sums in zip(load.tokens_per_expert, load.units, strict=True)]
            out = self.objective.forward(self.model, part, prior_load=prior)
            assert out.token_loss is not None
            assert out.routing is not None
            share = {"loss": out.token_loss.total / predicted}
            share |= {name: term / parts for name, term in out.aux.items()}
            torch.stack(list(share.values())).sum().backward()
            health.add_routing(load, out.routing)
            for name, value in share.items():
                measured[name] = measured.get(name, 0) + value.detach()
        measured["grad_norm"] = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        for name, value in measured.items():
            self._add(name, float(value))
        for one in self.optimizers:
            one.step()
            one.zero_grad(set_to_none=True)
        self.model.end_step(self.optimizers)
        if self.model.moe_layers:
            self.model.update_expert_bias(list(load.tokens_per_expert))
        for sums, of_step in zip(self.window, load, strict=True):
            sums += of_step
        self._add("steps", 1.0)
        self.step += 1
        self.tokens += batch.input_ids.size
        self.flops += len(batch.input_ids) * config.model.flops(batch.input_ids.shape[1])

    def _add(self, name: str, value: float) -> None:
        """Adds a step's value to the log window; one that is not finite ends the run."""
        if not math.isfinite(value):
            good = state.newest(self.run, before=self.step)  # one of this step holds these very weights
            where = f"the last good checkpoint is {good}" if good else "there is no good checkpoint yet"
            raise TrainingError(
                f"{name} is {value} at step {self.step + 1}, before the weights were changed; {where}; "
                "lower optimizer.lr or grad_clip, or look at the data of that step"
            )
        self.sums[name] = self.sums.get(name, 0.0) + value

    def _log(self) -> None:
        config, steps, tokens = self.config, self.sums.pop("steps"), self.window.tokens_per_expert.cpu()
        seconds, done, flops = (now - then for now, then in zip(self._reached(), self.logged, strict=True))
        if flops / seconds > self.matmul_flops:  # the machine was busy when it was measured
            self.matmul_flops = max(flops / seconds, machine.matmul_flops(self.hardware))
        means = {name: value / steps for name, value in self.sums.items()}
        self.health = health.measure(self.window)
        self._record(
            "train",
            tokens=self.tokens,
            loss=means.pop("loss"),
            grad_norm=means.pop("grad_norm"),
            aux=means,
            lr=self.optimizers[0].param_groups[0]["lr"],
            seconds=round(self.seconds, 3),
            tokens_per_second=round(done / seconds, 1),
            matmul_share=round(flops / seconds / self.matmul_flops, 4),
            peak_memory_bytes=machine.peak_memory(self.hardware.device),
            load=self.health,
            tokens_per_expert=tokens.tolist(),
        )
        self.idle = torch.where(tokens == 0, self.idle + 1, 0)
        for layer, idle in zip(config.model.gates, self.idle.tolist(), strict=True):
            if dead := [expert for expert, windows in enumerate(idle) if windows == config.dead_after]:
                self._alarm(layer, dead)
        self.sums = {}
        for sums in self.window:
            sums.zero_()
        self.logged = self._reached()

    def _reached(self) -> tuple[float, int, int]:
        return self.seconds, self.tokens, self.flops

    def _alarm(self, layer: int, experts: list[int]) -> None:
        steps, ffn = self.config.dead_after * self.config.log_every, self.config.model.ffn
        if isinstance(ffn, Variant):
            remedy = ffn.remedy
        elif isinstance(ffn, MoEConfig) and ffn.topk_method == "hash":
            remedy = "use ffn.hash_method balanced"
        else:
            remedy = "raise ffn.aux_loss_alpha, or use topk_method noaux_tc with a bias_update_speed"
        who = f"expert{'s' * (len(experts) > 1)} {', '.join(map(str, experts))} of layer {layer}"
        text = f"{who} had no token for {steps} steps; {remedy}"
        if len(self.sinks) == 1:  # with a display, the display tells it
            logger.warning(text)
        self._record("alarm", layer=layer, experts=experts, text=text)

    def _validate(self) -> None:
        if (found := self.objective.validate(self.model)) is not None:
            self.scores = found.scores
            self._record("eval", tokens=self.tokens, **found.record)

    def _record(self, kind: str, **values: Any) -> None:
        for sink in self.sinks:
            sink.record({"kind": kind, "step": self.step, **values})

    def _save(self) -> None:
        sampler = {"seed": self.config.seed, "step": self.step}
        written = {name: getattr(self, name) for name in WRITTEN} | {
            "sampler": sampler,
            "data": self.objective.fingerprint,
        }
        sums = {f"window/{name}": sums for name, sums in self.window._asdict().items()} | {"idle": self.idle}
        keep, receipt = self.config.keep_checkpoints, self._receipt()
        state.write(self.run, self.model, self.optimizers, self.objective.tokenizer, receipt, written, sums, keep)

    def _newest(self) -> Path | None:
        state.clean(self.run)
        folder = state.newest(self.run)
        if folder is None and (damaged := state.finished(self.run)):
            raise CheckpointError(
                f"none of the {len(damaged)} checkpoints is whole; remove {damaged[0].parent} to start again"
            )
        return folder

    def _restore(self, folder: Path) -> None:
        saved, tensors = state.read(folder, self.model, self.optimizers)
        if missing := set(WRITTEN) - saved.keys():
            raise CheckpointError(f"{folder} is of an earlier version of moekit, without {', '.join(sorted(missing))}")
        if saved["data"] != self.objective.fingerprint:
            raise ConfigError(f"data.path {self.config.data.path} holds other text than the run was started with")
        for name in WRITTEN:
            setattr(self, name, saved[name])
        self.idle = tensors["idle"]
        for name, sums in self.window._asdict().items():
            sums.copy_(tensors[f"window/{name}"])
        logger.info("resuming after step %d from %s", self.step, folder)

    def _finish(self, signals: list[int]) -> dict[str, Any]:
        done, folder = self.step == self.config.steps, state.folder_of(self.run, self.step)
        receipt = self._receipt({f"checkpoints/{folder.name}": files.sha256(folder / "manifest.json")})
        receipt |= {"status": "done" if done else "interrupted", "step": self.step}
        if signals:
            receipt["signal"] = signals[0]
        files.write_json(self.run / receipts.FILE, receipt)
        return receipt

    def _receipt(self, outputs: dict[str, Any] | None = None) -> dict[str, Any]:
        return receipts.make(
            "train",
            config=self.config.model_dump(mode="json"),
            model=self.config.model,
            trains=True,
            inputs={**self.objective.inputs, **self.origin.get("inputs", {})},
            outputs=outputs or {},
            tensors=self.origin.get("tensors", {}),
            health=self.health | {"validation": self.scores},
            seed=self.config.seed,
            device=str(self.hardware.device),
            seconds=round(self.seconds, 3),
        )

"""The training loop. A step is a function of weights, optimiser state and (seed, step): resuming is exact."""

import hashlib
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moekit import files, receipts
from moekit.config import MoEConfig, RunConfig
from moekit.data import Batch, Sampler, TokenDataset, open_dataset
from moekit.errors import CheckpointError, ConfigError, TrainingError
from moekit.formats.tokenizer import Tokenizer, load_tokenizer
from moekit.nn.model import Model
from moekit.train import directory, health, metrics, optimizer, process, schedule, state
from moekit.train import hardware as machine
from moekit.train.validation import validate

logger = logging.getLogger(__name__)


def train(
    config: RunConfig, out: str | Path, *, resume: bool = False, sinks: Sequence[metrics.Sink] = ()
) -> dict[str, Any]:
    """Trains a model and returns the run's receipt; its "status" is done or interrupted.

    `out` gets config.yaml, metrics.jsonl, checkpoints/ and receipt.json. A killed run continues with `resume` from its
    newest whole checkpoint and ends with the same bits as a straight one, on one device. SIGTERM and SIGINT save and
    return. Raises ConfigError for a run that exists (without `resume`) or that was started with other settings, and
    TrainingError when the loss or the gradient is not finite.
    """
    run = Path(out)
    with process.deterministic():
        try:
            directory.check(run, config, resume)
            started = _Run(config, run, sinks)
        except BaseException:  # a display must not stay on the terminal
            for sink in sinks:
                sink.close()
            raise
        return started.train()


class _Run:
    """What one run holds between its steps."""

    def __init__(self, config: RunConfig, run: Path, sinks: Sequence[metrics.Sink]) -> None:
        self.config, self.run = config, run
        self.hardware = machine.choose(config.device, config.precision)
        self.dataset: TokenDataset = open_dataset(config.data.path, "train")
        self.valid: TokenDataset | None = (
            open_dataset(config.data.path, "valid") if "valid" in self.dataset.manifest.splits else None
        )
        self.tokenizer: Tokenizer = load_tokenizer(config.data.path)
        if self.dataset.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"model.vocab_size is {config.model.vocab_size} but the tokenizer of {config.data.path} has "
                f"{self.dataset.vocab_size} entries; use --model.vocab_size {self.dataset.vocab_size}"
            )
        self.token_bytes = self.tokenizer.token_bytes()
        self.sampler = Sampler(self.dataset, config.data.sequence_length, config.data.batch_size, config.seed)
        torch.manual_seed(config.seed)
        self.model = Model(config.model)
        counts = torch.zeros(config.model.vocab_size, dtype=torch.int64)
        counts[: self.dataset.vocab_size] = torch.from_numpy(self.dataset.token_counts())
        self.model.balance_hash(counts)
        self.model.recompute = config.recompute
        self.model.to(self.hardware.device).train()
        self.optimizers = optimizer.build(self.model, config.optimizer)
        layers = self.model.moe_layers
        self.shape = (len(layers), layers[0].config.n_routed_experts if layers else 1)
        self.window = health.LoadWindow(*self.shape)
        self.last_health: dict[str, Any] = {}
        self.dead = health.DeadExperts(*self.shape, after=config.dead_after)
        self.sums: dict[str, float] = {}
        """Sums over the log window: loss, grad_norm, steps, and each balance term."""
        self.step = 0
        self.seconds = 0.0
        self.last_scores: dict[str, Any] = {}
        self._restore()
        if config.compile:
            for block in self.model.layers:
                block.compile()
        self.matmul_flops = machine.matmul_flops(self.hardware)
        directory.claim(run, config)  # not before everything else is sound: a mistake leaves no directory behind
        self.sinks: list[metrics.Sink] = [metrics.JsonLines(run, self.step), *sinks]
        if config.tensorboard:
            self.sinks.append(metrics.TensorBoard(run, self.step))

    def train(self) -> dict[str, Any]:
        config, asked_to_stop, stop = self.config, list[int](), False
        self.clock = time.perf_counter()
        self.logged_at, self.logged_step = self.clock, self.step
        with process.signals(asked_to_stop):
            try:
                while self.step < config.steps and not stop:
                    self._one_step(self.sampler.batch(self.step))
                    self.step += 1
                    last = self.step == config.steps
                    if self.step % config.log_every == 0 or last:
                        self._log()
                    if self.valid and (last or (config.eval_every and self.step % config.eval_every == 0)):
                        self._validate(self.valid)
                    stop = bool(asked_to_stop)  # asked once: a signal after this line waits for the next step
                    if last or stop or (config.save_every and self.step % config.save_every == 0):
                        self._save()
                return self._finish(asked_to_stop)
            finally:
                for sink in self.sinks:
                    sink.close()

    def _one_step(self, batch: Batch) -> None:
        """Forward and backward over the micro-batches, then one optimiser step and one bias update."""
        config = self.config
        factor = schedule.factor(config.schedule, self.step, config.steps)
        self.lr = optimizer.set_factor(self.optimizers, factor)
        size = config.data.micro_batch_size or config.data.batch_size
        parts = config.data.batch_size // size
        targets = batch.labels.size
        step_load = health.LoadWindow(*self.shape).to(self.hardware.device)
        measured: dict[str, torch.Tensor] = {}
        for part in range(parts):
            rows = slice(part * size, (part + 1) * size)
            out = self._forward(batch, rows, step_load)
            share = {"loss": out.token_loss.total / targets}
            share |= {name: term / parts for name, term in out.aux.items()}
            torch.stack(list(share.values())).sum().backward()
            step_load.add(out.routing)
            for name, value in share.items():
                measured[name] = measured.get(name, 0) + value.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip or math.inf)
        values = {name: float(value) for name, value in measured.items()} | {"grad_norm": float(norm)}
        for name, value in values.items():
            if not math.isfinite(value):
                self._stop_not_finite(name, value)
        for one in self.optimizers:
            one.step()
            one.zero_grad(set_to_none=True)
        self.model.update_expert_bias(list(step_load.tokens_per_expert) if self.shape[0] else [])
        self.window.add_window(step_load)
        for name, value in (values | {"steps": 1.0}).items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def _forward(self, batch: Batch, rows: slice, step_load: health.LoadWindow) -> Any:
        device = self.hardware.device
        documents = None
        if not self.config.data.cross_document_attention:
            documents = torch.from_numpy(batch.document_ids[rows]).to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.hardware.autocast):
            return self.model(
                torch.from_numpy(batch.input_ids[rows]).to(device),
                targets=torch.from_numpy(batch.labels[rows]).to(device),
                document_ids=documents,
                return_routing=True,
                prior_load=step_load.sums(),
            )

    def _log(self) -> None:
        now = time.perf_counter()
        config, steps = self.config, self.sums.pop("steps")
        per_step = config.data.batch_size * config.data.sequence_length
        speed = (self.step - self.logged_step) * per_step / (now - self.logged_at)
        flops = config.model.flops(config.data.sequence_length) / config.data.sequence_length
        means = {name: value / steps for name, value in self.sums.items()}
        self.last_health = health.as_json(self.window.health()) if self.shape[0] else {}
        tokens_per_expert = self.window.tokens_per_expert.cpu()
        self._record(
            {
                "kind": "train",
                "step": self.step,
                "tokens": self.step * per_step,
                "loss": means.pop("loss"),
                "grad_norm": means.pop("grad_norm"),
                "aux": means,
                "lr": self.lr,
                "seconds": round(self.seconds + now - self.clock, 3),
                "tokens_per_second": round(speed, 1),
                "matmul_share": round(speed * flops / self.matmul_flops, 4),
                "peak_memory_bytes": machine.peak_memory(self.hardware.device),
                "load": self.last_health,
                "tokens_per_expert": tokens_per_expert.tolist() if self.shape[0] else [],
            }
        )
        for layer, experts in self.dead.update(tokens_per_expert).items():
            self._alarm(config.model.moe_layers[layer], experts)
        self.sums, self.window = {}, health.LoadWindow(*self.shape)
        self.logged_at, self.logged_step = time.perf_counter(), self.step

    def _alarm(self, layer: int, experts: list[int]) -> None:
        who = f"expert {experts[0]} of layer {layer} has"
        if len(experts) > 1:
            who = f"{len(experts)} experts of layer {layer} ({', '.join(map(str, experts))}) have"
        ffn = self.config.model.ffn
        remedy = "raise ffn.aux_loss_alpha, or use topk_method noaux_tc with a bias_update_speed"
        if isinstance(ffn, MoEConfig) and ffn.topk_method == "hash":
            remedy = "its hash table gives it no frequent token; ffn.hash_method balanced spreads them"
        text = f"{who} had no token for {self.config.dead_after * self.config.log_every} steps; {remedy}"
        if len(self.sinks) == 1:  # with a display, the display tells it
            logger.warning(text)
        self._record({"kind": "alarm", "step": self.step, "layer": layer, "experts": experts, "text": text})

    def _validate(self, dataset: TokenDataset) -> None:
        start = time.perf_counter()
        data = self.config.data
        scores = validate(
            self.model,
            dataset,
            self.token_bytes,
            sequence_length=data.sequence_length,
            max_tokens=self.config.eval_tokens,
            batch_size=data.micro_batch_size or data.batch_size,
            hardware=self.hardware,
            cross_document_attention=data.cross_document_attention,
        )
        self.last_scores = {name: {"loss": s.loss, "bits_per_byte": s.bits_per_byte} for name, s in scores.items()}
        self._record(
            {
                "kind": "eval",
                "step": self.step,
                "tokens": self.step * data.batch_size * data.sequence_length,
                "loss": sum(s.loss for s in scores.values()) / len(scores),
                "bits_per_byte": sum(s.bits_per_byte for s in scores.values()) / len(scores),
                "domains": {name: s._asdict() for name, s in scores.items()},
            }
        )
        spent = time.perf_counter() - start  # validation is not training time
        self.logged_at, self.clock = self.logged_at + spent, self.clock + spent

    def _save(self) -> None:
        start = time.perf_counter()
        state.write(
            self.run,
            self.model,
            self.optimizers,
            self.tokenizer,
            self._receipt("train", {}),
            {
                "step": self.step,
                "sampler": {"seed": self.config.seed, "step": self.step},
                "seconds": round(self.seconds + start - self.clock, 3),
                "sums": self.sums,
                "data": self._data_fingerprint(),
                "health": self.last_health,
                "scores": self.last_scores,
            },
            {f"window/{name}": value for name, value in self.window.state().items()} | {"idle": self.dead.idle},
            self.config.keep_checkpoints,
        )
        spent = time.perf_counter() - start
        self.logged_at, self.clock = self.logged_at + spent, self.clock + spent

    def _restore(self) -> None:
        state.clean(self.run)
        folder = state.newest(self.run)
        if folder is None:
            if damaged := state.finished(self.run):
                folder = damaged[0].parent
                raise CheckpointError(
                    f"none of the {len(damaged)} checkpoints is whole; remove {folder} to start again"
                )
            return
        saved, tensors = state.read(folder, self.model, self.optimizers)
        if saved["data"] != self._data_fingerprint():
            raise ConfigError(f"data.path {self.config.data.path} holds other text than the run was started with")
        self.step, self.seconds, self.sums = saved["step"], saved["seconds"], saved["sums"]
        self.last_health, self.last_scores = saved["health"], saved["scores"]
        self.dead.idle = tensors.pop("idle")
        self.window.load_state({name.removeprefix("window/"): value for name, value in tensors.items()})
        logger.info("resuming after step %d from %s", self.step, folder)

    def _data_fingerprint(self) -> str:
        """Returns a hash of the tokenizer and of every file of tokens."""
        content = self.dataset.manifest.model_dump_json(include={"tokenizer", "domains", "splits"})
        return hashlib.sha256(content.encode()).hexdigest()

    def _finish(self, signals: list[int]) -> dict[str, Any]:
        done = self.step == self.config.steps
        folder = state.folder_of(self.run, self.step)
        outputs = {f"checkpoints/{folder.name}": files.sha256(folder / "manifest.json")}
        receipt = self._receipt("train", outputs) | {"status": "done" if done else "interrupted", "step": self.step}
        if signals:
            receipt["signal"] = signals[0]
        files.write_json(self.run / receipts.FILE, receipt)
        return receipt

    def _receipt(self, action: str, outputs: dict[str, Any]) -> dict[str, Any]:
        return receipts.make(
            action,
            config=self.config.model_dump(mode="json"),
            model=self.config.model,
            trains=True,
            inputs={
                "data": {
                    "path": self.config.data.path,
                    "sha256": self._data_fingerprint(),
                    "tokenizer": self.dataset.tokenizer_fingerprint,
                }
            },
            outputs=outputs,
            health=self.last_health | {"validation": self.last_scores},
            seed=self.config.seed,
            device=str(self.hardware.device),
            seconds=round(self.seconds + time.perf_counter() - self.clock, 3),
        )

    def _stop_not_finite(self, name: str, value: float) -> None:
        good = state.newest(self.run, before=self.step)  # one of this step holds these very weights
        where = f"the last good checkpoint is {good}" if good else "there is no good checkpoint yet"
        raise TrainingError(
            f"{name} is {value} at step {self.step + 1}, before the weights were changed; {where}; "
            "lower optimizer.lr or grad_clip, or look at the data of that step"
        )

    def _record(self, record: dict[str, Any]) -> None:
        for sink in self.sinks:
            sink.record(record)

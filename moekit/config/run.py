"""What a training run is. One YAML file holds all of it; the resolved file is written beside the results."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from moekit.config.model import ModelConfig
from moekit.config.objective import NextTokenObjective, ObjectiveConfig, SentencesObjective
from moekit.config.strict import Strict
from moekit.config.variants import LoryConfig, MEOConfig


class DataConfig(Strict):
    """Which tokens a step sees."""

    path: str = Field(description="directory written by `moekit prepare`, or files of sentences; --data sets it too")
    sequence_length: int = Field(256, gt=1, description="tokens per sequence")
    batch_size: int = Field(16, gt=0, description="sequences per optimiser step, the global batch")
    micro_batch_size: int | None = Field(None, gt=0, description="sequences per forward pass; null: batch_size")
    packing: Literal["stream", "documents"] = Field(
        "stream", description="stream: windows run over document ends; documents: whole documents only, then padding"
    )
    order: Literal["source", "shuffled", "similar"] = Field(
        "source",
        description="documents in the stream that windows are cut from: domain by domain as they came; shuffled; "
        "similar: like beside like (`moekit prepare --similar`)",
    )
    cross_document_attention: bool = Field(True, description="tokens may attend to earlier documents of their sequence")

    @model_validator(mode="after")
    def _check(self) -> "DataConfig":
        if self.batch_size % (micro := self.micro_batch_size or self.batch_size):
            raise ValueError(f"micro_batch_size is {micro} but must divide batch_size, {self.batch_size}")
        return self


class AdamWConfig(Strict):
    """AdamW (arXiv 1711.05101) on every parameter; norms and biases are not decayed."""

    kind: Literal["adamw"] = Field("adamw", description="AdamW on every parameter")
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, times the learning rate")


class MuonConfig(AdamWConfig):
    """Muon on the expert matrices, each expert orthogonalised by itself; AdamW on everything else."""

    kind: Literal["muon"] = Field("muon", description="Muon on expert matrices, AdamW on the rest")  # type: ignore[assignment]
    muon_lr: float = Field(0.02, gt=0, description="peak learning rate of the expert matrices")
    momentum: float = Field(0.95, ge=0, lt=1, description="Nesterov momentum of Muon")
    ns_steps: int = Field(5, gt=0, description="Newton-Schulz iterations")


class StepSchedule(Strict):
    """The paper's schedule: linear warm-up, then x0.316 at 80% and again at 90% of the steps (section 4.1.3)."""

    kind: Literal["step"] = Field("step", description="the paper's step schedule")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    first: float = Field(0.8, gt=0, lt=1, description="fraction of the steps at which the rate first falls")
    second: float = Field(0.9, gt=0, le=1, description="fraction of the steps at which it falls again")
    factor: float = Field(0.316, gt=0, le=1, description="what the rate is multiplied by each time")

    @model_validator(mode="after")
    def _check(self) -> "StepSchedule":
        if self.second < self.first:
            raise ValueError(f"second is {self.second} but must not come before first, {self.first}")
        return self


class CosineSchedule(Strict):
    """Linear warm-up, then half a cosine down to `final_ratio` of the peak."""

    kind: Literal["cosine"] = Field("cosine", description="warm-up, then half a cosine")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    final_ratio: float = Field(0.1, ge=0, le=1, description="rate at the end, as a fraction of the peak")


class WSDSchedule(Strict):
    """Warm-up, stable, then a linear decay over the last part of the steps."""

    kind: Literal["wsd"] = Field("wsd", description="warm-up, stable, decay")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")
    decay_fraction: float = Field(0.2, gt=0, le=1, description="fraction of the steps that decays")
    final_ratio: float = Field(0.0, ge=0, le=1, description="rate at the end, as a fraction of the peak")


class ConstantSchedule(Strict):
    """Linear warm-up, then the peak rate to the end (the 145B run)."""

    kind: Literal["constant"] = Field("constant", description="warm-up, then constant")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up")


OptimizerConfig = Annotated[AdamWConfig | MuonConfig, Field(discriminator="kind")]
ScheduleConfig = Annotated[StepSchedule | CosineSchedule | WSDSchedule | ConstantSchedule, Field(discriminator="kind")]


class RunConfig(Strict):
    """One training run."""

    default_kinds: ClassVar[dict[str, str]] = {"objective": "next_token", "optimizer": "adamw", "schedule": "step"}

    model: ModelConfig = Field(description="the model")
    data: DataConfig = Field(description="the tokens")
    objective: ObjectiveConfig = Field(
        NextTokenObjective(), description="told apart by kind: next_token, masked or sentences"
    )
    init: str | None = Field(None, description="model or run whose weights to start from; --from sets it too")
    optimizer: OptimizerConfig = Field(AdamWConfig(), description="told apart by kind: adamw or muon")
    schedule: ScheduleConfig = Field(StepSchedule(), description="told apart by kind: step, cosine, wsd or constant")
    steps: int = Field(gt=0, description="optimiser steps")
    grad_clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient, or null")
    seed: int = Field(0, ge=0, lt=2**63, description="of the initial weights and of the data order")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the compute; weights stay float32; auto: bfloat16 where the hardware has it"
    )
    backend: Literal["auto", "reference", "torch", "grouped", "native", "triton"] = Field(
        "auto", description="what computes the experts' products; `moekit doctor` shows what this machine has"
    )
    recompute: bool = Field(False, description="recompute each block in the backward pass: less memory, more time")
    compile: bool = Field(
        False,
        description="torch.compile the blocks; needs a compiler; slower on a CPU with our kernels",
    )
    log_every: int = Field(10, gt=0, description="steps between lines of metrics.jsonl")
    eval_every: int | None = Field(None, gt=0, description="steps between validations; null: only at the end")
    eval_tokens: int = Field(
        32768, gt=0, description="validation tokens per domain, at most; of text, not of sentences"
    )
    save_every: int | None = Field(None, gt=0, description="steps between checkpoints; null: only at the end")
    keep_checkpoints: int = Field(2, gt=0, description="newest checkpoints that stay on disk")
    dead_after: int = Field(5, gt=0, description="log steps in a row without a token that make an expert dead")
    tensorboard: bool = Field(False, description="write TensorBoard events too; needs the track extra")

    @model_validator(mode="after")
    def _check(self) -> "RunConfig":
        length, longest = self.data.sequence_length, self.model.max_position_embeddings
        if length > longest:
            raise ValueError(f"data.sequence_length is {length} but model.max_position_embeddings is {longest}")
        self._check_objective()
        if (warmup := self.schedule.warmup_steps) > self.steps:
            raise ValueError(
                f"schedule.warmup_steps is {warmup} but must be at most steps, which is {self.steps}; change one"
            )
        if (ffn := self.model.ffn).kind != "moe":
            no = "which has no experts" if ffn.kind == "dense" else "whose experts are merged"
            if isinstance(self.optimizer, MuonConfig):
                raise ValueError(f"optimizer.kind is muon but model.ffn.kind is {ffn.kind}, {no}; use adamw")
            if self.backend != "auto":
                raise ValueError(f"backend is {self.backend} but model.ffn.kind is {ffn.kind}, {no}; use auto")
        if isinstance(ffn, LoryConfig) and ffn.n_routed_experts > 1 and length <= ffn.segment_size:
            raise ValueError(
                f"data.sequence_length is {length} but model.ffn.segment_size is {ffn.segment_size}: only a segment "
                "with another before it is routed; use a longer sequence or a shorter segment"
            )
        return self

    def _check_objective(self) -> None:
        """Raises ValueError where the model cannot learn what it is to learn, or a setting would have no effect."""
        objective, model, kind = self.objective, self.model, self.objective.kind
        by_task = isinstance(model.ffn, MEOConfig) and model.ffn.level == "task"
        described = isinstance(objective, SentencesObjective) and objective.description is not None
        if isinstance(model.ffn, MEOConfig) and by_task and not (described or model.ffn.description_ids):
            raise ValueError(
                "model.ffn.level is task but no task is described: give objective.description with sentences, or the "
                "token ids of a description as model.ffn.description_ids"
            )
        if isinstance(objective, SentencesObjective):
            if model.num_labels is None:
                raise ValueError("objective.kind is sentences but model.num_labels is null; give the number of labels")
            if not self.data.cross_document_attention or self.data.packing != "stream" or self.data.order != "source":
                idle = "data.packing, data.order and data.cross_document_attention have no effect"
                raise ValueError(f"objective.kind is sentences, where {idle}; leave them out")
            if described and not by_task:
                raise ValueError("objective.description takes effect only with model.ffn.kind meo and level task")
        elif model.num_labels is not None:
            raise ValueError(f"objective.kind is {kind} but model.num_labels is {model.num_labels}; use sentences")
        elif (kind == "next_token") != model.causal:
            wanted = "masked" if kind == "next_token" else "next_token"
            found = f"objective.kind is {kind} but model.causal is {str(model.causal).lower()}"
            raise ValueError(f"{found}; use objective.kind {wanted}, or the other value of model.causal")

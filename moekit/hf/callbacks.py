"""What a `Trainer` says of the balance loss."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from moekit.errors import UnsupportedError
from moekit.hf.model import MoekitForCausalLM


class LogAuxLoss(TrainerCallback):
    """Adds `aux_loss` to what a `Trainer` logs beside `loss`: the mean over the forward passes since the last time.

    TRL's trainers log it by themselves. Raises UnsupportedError for a model that is none of ours.
    """

    def __init__(self) -> None:
        self._seen: list[Tensor] = []
        self._hooks: list[Any] = []

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **others: Any,
    ) -> None:
        ours = [] if model is None else [one for one in model.modules() if isinstance(one, MoekitForCausalLM)]
        if not ours:
            raise UnsupportedError(f"LogAuxLoss is for moekit's models; this one is a {type(model).__name__}")
        self._hooks.append(ours[0].register_forward_hook(self._keep))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **others: Any,
    ) -> None:
        if logs is None or "loss" not in logs or not self._seen:
            return
        mean = float(torch.stack(self._seen).mean())
        self._seen.clear()
        logs["aux_loss"] = mean  # for the callbacks that come after this one
        if state.log_history:
            state.log_history[-1]["aux_loss"] = mean

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        while self._hooks:
            self._hooks.pop().remove()
        self._seen.clear()

    def _keep(self, model: nn.Module, inputs: Any, out: Any) -> None:
        if model.training and getattr(out, "aux_loss", None) is not None:
            self._seen.append(out.aux_loss.detach())

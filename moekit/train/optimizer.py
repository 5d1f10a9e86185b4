"""AdamW for everything, or Muon for the experts' matrices and AdamW for the rest."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import AdamW, Optimizer

from moekit.config import AdamWConfig, MuonConfig
from moekit.nn.experts import Experts
from moekit.nn.model import Model


class ExpertMuon(Optimizer):
    """Muon (Jordan et al., 2024) on stacked expert matrices, each expert's gate, up and down orthogonalised by itself.

    Nesterov momentum, five Newton-Schulz steps, then lr * sqrt(max(1, rows / columns)) times the result: each matrix
    moves by the same spectral norm whatever its gradient. An expert without tokens coasts on its momentum. Groups have
    lr, momentum, ns_steps, weight_decay and split: the matrices that lie over each other in one tensor.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Moves the parameters by their gradients; a closure is not taken."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parts = (tensor.chunk(group["split"], dim=1) for tensor in (parameter, update))
                for part, matrices in zip(*parts, strict=True):
                    scale = max(1.0, part.shape[1] / part.shape[2]) ** 0.5
                    part.add_(orthogonalise(matrices, group["ns_steps"]), alpha=-group["lr"] * scale)


def orthogonalise(matrices: Float[Tensor, "experts rows columns"], steps: int) -> Float[Tensor, "experts rows columns"]:
    """Returns each matrix with its singular values moved near 1 (0.68 to 1.13) by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315  # steepest at 0 that still stays near 1: Jordan's coefficients
    x = matrices.bfloat16() if matrices.is_cuda else matrices.clone()
    transposed = x.shape[1] > x.shape[2]
    if transposed:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    y: Tensor = x.mT if transposed else x
    return y.to(matrices.dtype)


def build(model: Model, config: AdamWConfig) -> list[Optimizer]:
    """Returns the optimisers of a run. Weight decay is for matrices: norms are not decayed."""
    experts = [module for module in model.modules() if isinstance(config, MuonConfig) and isinstance(module, Experts)]
    taken = {parameter for module in experts for parameter in module.parameters()}
    rest = [parameter for parameter in model.parameters() if parameter not in taken]
    groups = [
        {"params": [p for p in rest if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizers: list[Optimizer] = [
        AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
    ]
    if isinstance(config, MuonConfig) and experts:
        stacks = [
            {"params": [m.down_proj for m in experts], "split": 1},
            {"params": [m.gate_up_proj for m in experts], "split": 2},
        ]
        settings = {"lr": config.muon_lr, **config.model_dump(include={"momentum", "ns_steps", "weight_decay"})}
        optimizers.append(ExpertMuon(stacks, settings))
    return optimizers


def set_factor(optimizers: list[Optimizer], factor: float) -> float:
    """Sets every rate to `factor` of its peak and returns the first, AdamW's."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * factor
    return float(optimizers[0].param_groups[0]["lr"])


def state_tensors(model: Model, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """Returns the optimisers' state as named tensors: "exp_avg/layers.0.mlp..."."""
    return {
        f"{key}/{name}": value
        for name, parameter in model.named_parameters()
        for optimizer in optimizers
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_state_tensors(model: Model, optimizers: list[Optimizer], tensors: dict[str, Tensor]) -> None:
    """Puts back what `state_tensors` gave."""
    parameters = dict(model.named_parameters())
    owners = {p: one for one in optimizers for group in one.param_groups for p in group["params"]}
    for label, value in tensors.items():
        key, name = label.split("/", 1)
        parameter = parameters[name]
        owners[parameter].state[parameter][key] = value.to(parameter.device)

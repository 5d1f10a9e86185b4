"""Muon moves each expert by itself and nothing else; AdamW gets all the rest; the state can be written down."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moekit.config import AdamWConfig, ModelConfig, MuonConfig
from moekit.nn.experts import Experts
from moekit.nn.model import Model
from moekit.train import optimizer

Configs = Callable[..., ModelConfig]


def stacked(device: torch.device, *spectrum: float, rows: int, columns: int) -> Tensor:
    """Returns three random matrices with singular values spread evenly over `spectrum`."""
    small = min(rows, columns)
    u = torch.linalg.qr(torch.randn(3, rows, small)).Q
    v = torch.linalg.qr(torch.randn(3, columns, small)).Q
    values = torch.linspace(*spectrum, small)
    return ((u * values) @ v.mT).to(device)


def model_with_gradients(config: ModelConfig, device: torch.device, seed: int = 1) -> Model:
    model = Model(config).to(device)
    torch.manual_seed(seed)
    give_gradients(model)
    return model


def give_gradients(model: Model) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape).to(parameter)


def step(optimizers: list[torch.optim.Optimizer]) -> None:
    for one in optimizers:
        one.step()


@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (8, 64), (64, 8), (33, 20), (1, 9), (9, 1), (1, 1), (48, 47)])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_orthogonalised_singular_values_are_near_one_for_every_shape(
    device: torch.device, rows: int, columns: int, scale: float
) -> None:
    matrices = stacked(device, 0.1 * scale, scale, rows=rows, columns=columns)
    out = optimizer.orthogonalise(matrices, 5)
    assert out.shape == matrices.shape
    assert out.dtype == matrices.dtype
    values = torch.linalg.svdvals(out)
    assert values.min() > 0.6  # measured: 0.68 to 1.13
    assert values.max() < 1.2


@pytest.mark.parametrize(("rows", "columns"), [(16, 64), (64, 16), (20, 33)])
def test_random_matrices_are_orthogonalised(device: torch.device, rows: int, columns: int) -> None:
    values = torch.linalg.svdvals(optimizer.orthogonalise(torch.randn(50, rows, columns, device=device), 5))
    assert values.min() > 0.6
    assert values.max() < 1.2


def test_orthogonalising_keeps_the_singular_vectors(device: torch.device) -> None:
    matrices = stacked(device, 0.5, 1.0, rows=12, columns=7)
    u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
    inside = u.mT @ optimizer.orthogonalise(matrices, 5) @ vh.mT
    off = inside - torch.diag_embed(torch.diagonal(inside, dim1=1, dim2=2))
    assert off.abs().max() < (0.05 if device.type == "cuda" else 1e-5)  # bfloat16 on CUDA


def test_a_zero_gradient_is_a_zero_update() -> None:
    assert torch.equal(optimizer.orthogonalise(torch.zeros(2, 4, 6), 5), torch.zeros(2, 4, 6))


def test_muon_is_the_formula_for_two_steps(tiny_config: Configs) -> None:
    config = MuonConfig(muon_lr=0.1, momentum=0.9, weight_decay=0.2)
    model = Model(tiny_config()).double()
    optimizers = optimizer.build(model, config)
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    up, down = experts.gate_up_proj, experts.down_proj
    parts = {id(up): (up, 2), id(down): (down, 1)}
    expected = {key: p.detach().clone() for key, (p, _) in parts.items()}
    momentum = {key: torch.zeros_like(p) for key, (p, _) in parts.items()}
    for _ in range(2):
        give_gradients(model)
        for key, (parameter, split) in parts.items():
            grad = parameter.grad
            momentum[key] = 0.9 * momentum[key] + 0.1 * grad
            nesterov = 0.1 * grad + 0.9 * momentum[key]
            expected[key] *= 1 - 0.1 * 0.2
            for e in range(len(grad)):
                for matrix, target in zip(nesterov[e].chunk(split), expected[key][e].chunk(split), strict=True):
                    rows, columns = matrix.shape
                    target -= 0.1 * max(1, rows / columns) ** 0.5 * optimizer.orthogonalise(matrix[None], 5)[0]
        step(optimizers)
    for key, (parameter, _) in parts.items():
        torch.testing.assert_close(parameter.detach(), expected[key], rtol=0, atol=1e-12)


def test_one_experts_gradient_moves_no_other_expert(tiny_config: Configs, device: torch.device) -> None:
    models = [model_with_gradients(tiny_config(), device) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    for experts in (m for m in models[1].modules() if isinstance(m, Experts)):
        experts.gate_up_proj.grad[3] *= torch.randn_like(experts.gate_up_proj.grad[3])
        experts.down_proj.grad[3] *= torch.randn_like(experts.down_proj.grad[3])
    for model in models:
        step(optimizer.build(model, MuonConfig(weight_decay=0.0)))
    a, b = ([m for m in model.modules() if isinstance(m, Experts)] for model in models)
    for one, other in zip(a, b, strict=True):
        for x, y in ((one.gate_up_proj, other.gate_up_proj), (one.down_proj, other.down_proj)):
            changed = [e for e in range(len(x)) if not torch.equal(x[e], y[e])]
            assert changed == [3]


def test_gate_and_up_are_orthogonalised_apart(tiny_config: Configs, device: torch.device) -> None:
    model = model_with_gradients(tiny_config(), device)
    experts = next(m for m in model.modules() if isinstance(m, Experts))
    ff = experts.gate_up_proj.shape[1] // 2
    experts.gate_up_proj.grad[:, :ff] *= 1e-3  # joined, the small half would hardly move
    before = experts.gate_up_proj.detach().clone()
    step(optimizer.build(model, MuonConfig(muon_lr=1.0, weight_decay=0.0)))
    moved = (before - experts.gate_up_proj.detach()).float()
    for half in moved.split(ff, dim=1):
        values = torch.linalg.svdvals(half)
        assert values.min() > 0.6
        assert values.max() < 1.2


def test_everything_else_moves_exactly_as_with_adamw(tiny_config: Configs, device: torch.device) -> None:
    muon, adamw = (model_with_gradients(tiny_config(), device) for _ in range(2))
    adamw.load_state_dict(muon.state_dict())
    optimizers = [
        (muon, optimizer.build(muon, MuonConfig())),
        (adamw, optimizer.build(adamw, AdamWConfig())),
    ]
    for _ in range(2):
        for model, built in optimizers:
            torch.manual_seed(4)
            give_gradients(model)
            step(built)
    for (name, a), b in zip(muon.named_parameters(), adamw.parameters(), strict=True):
        assert torch.equal(a, b) == (".experts." not in name), name


def test_norms_are_not_decayed_and_matrices_are(tiny_config: Configs) -> None:
    model = Model(tiny_config())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizers = optimizer.build(model, AdamWConfig(lr=0.1, weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    step(optimizers)
    for name, parameter in model.named_parameters():
        expected = before[name] if "norm" in name else before[name] * (1 - 0.1 * 0.5)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-6, atol=0)


def test_every_parameter_is_in_exactly_one_group(tiny_config: Configs) -> None:
    for tied in (False, True):
        for config in (MuonConfig(), AdamWConfig()):
            model = Model(tiny_config(tie_word_embeddings=tied))
            groups = [group for one in optimizer.build(model, config) for group in one.param_groups]
            ids = [id(p) for group in groups for p in group["params"]]
            assert sorted(ids) == sorted(id(p) for p in model.parameters())


def test_a_dense_model_has_no_muon(tiny_config: Configs) -> None:
    assert len(optimizer.build(Model(tiny_config(ffn={"kind": "dense"})), MuonConfig())) == 1


def test_set_factor_scales_every_rate_from_its_own_peak(tiny_config: Configs) -> None:
    optimizers = optimizer.build(Model(tiny_config()), MuonConfig(lr=0.2, muon_lr=0.4))
    for _ in range(3):  # does not add up
        assert optimizer.set_factor(optimizers, 0.5) == pytest.approx(0.1)
    assert [[g["lr"] for g in one.param_groups] for one in optimizers] == [[0.1, 0.1], [0.2, 0.2]]


def test_an_expert_without_tokens_coasts_on_its_momentum(tiny_config: Configs, device: torch.device) -> None:
    model = model_with_gradients(tiny_config(), device)
    optimizers = optimizer.build(model, MuonConfig(weight_decay=0.0))
    down = next(m for m in model.modules() if isinstance(m, Experts)).down_proj
    never, once = 0, 1
    down.grad[never] = 0
    before = down.detach().clone()
    step(optimizers)
    middle = down.detach().clone()
    down.grad.zero_()
    step(optimizers)
    assert torch.equal(down[never], before[never])
    assert torch.isfinite(down).all()
    a, b = (middle - before)[once].flatten(), (down.detach() - middle)[once].flatten()
    assert torch.cosine_similarity(a, b, dim=0) > 0.99


def test_experts_that_take_no_part_at_all_stay(tiny_config: Configs) -> None:
    model = model_with_gradients(tiny_config(), torch.device("cpu"))
    down = next(m for m in model.modules() if isinstance(m, Experts)).down_proj
    before = down.detach().clone()
    down.grad = None
    step(optimizer.build(model, MuonConfig()))
    assert torch.equal(down, before)


@pytest.mark.parametrize("config", [AdamWConfig(), MuonConfig()])
def test_the_state_survives_being_written_down_to_the_bit(
    tiny_config: Configs, device: torch.device, config: AdamWConfig
) -> None:
    model = model_with_gradients(tiny_config(tie_word_embeddings=True), device)
    optimizers = optimizer.build(model, config)
    step(optimizers)
    tensors = {name: value.clone() for name, value in optimizer.state_tensors(model, optimizers).items()}
    names = {name for name, _ in model.named_parameters()}
    assert {name.split("/", 1)[1] for name in tensors} == names
    other = Model(model.config).to(device)
    other.load_state_dict(model.state_dict())
    others = optimizer.build(other, config)
    optimizer.load_state_tensors(other, others, {name: value.cpu() for name, value in tensors.items()})
    again = optimizer.state_tensors(other, others)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], value) for name, value in tensors.items())
    for built, one in ((optimizers, model), (others, other)):
        torch.manual_seed(5)
        give_gradients(one)
        step(built)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_refuses_a_closure_that_it_would_not_call() -> None:
    muon = optimizer.ExpertMuon([torch.nn.Parameter(torch.ones(1, 2, 2))], {"lr": 0.1})
    with pytest.raises(TypeError, match="step"):
        muon.step(lambda: 0.0)

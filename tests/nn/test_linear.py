"""Several linear maps of one input: one product, unless somebody looks at one of them."""

import pytest
import torch
from torch import Tensor, nn

from moekit.nn.linear import Linear, together


def maps(bias: bool = False) -> list[Linear]:
    made = [Linear(12, out, bias) for out in (8, 5)]
    for m in made:
        nn.init.normal_(m.weight)
    return made


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_map_is_its_own(bias: bool, dtype: torch.dtype) -> None:
    made, x = maps(bias), torch.randn(2, 7, 12).to(dtype)
    made = [m.to(dtype) for m in made]
    for y, m in zip(together(x, *made), made, strict=True):
        assert y.dtype == dtype
        assert torch.equal(y, m(x))


@pytest.mark.parametrize("how", ["hook", "pre-hook", "global hook", "forward", "class"])
def test_who_looks_at_one_of_them_is_asked(how: str) -> None:
    made: list[nn.Module] = [*maps()]
    seen: list[nn.Module] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...], *rest: Tensor) -> None:
        seen.append(module)

    class Adapted(Linear):
        def forward(self, input: Tensor) -> Tensor:
            seen.append(self)
            return super().forward(input)

    handle = None
    if how == "hook":
        made[1].register_forward_hook(note)
    elif how == "pre-hook":
        made[1].register_forward_pre_hook(note)
    elif how == "global hook":
        handle = nn.modules.module.register_module_forward_hook(note)
    elif how == "forward":
        before = made[1].forward
        made[1].forward = lambda x: (seen.append(made[1]), before(x))[1]  # type: ignore[func-returns-value]
    else:
        made[1] = Adapted(12, 5)
    together(torch.randn(7, 12), *made)
    if handle is not None:
        handle.remove()
    assert made[1] in seen

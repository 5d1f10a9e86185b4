"""Weights in codes: the error of each group is bounded, and what can be exact is."""

from typing import get_args

import pytest
import torch

from moekit.ops.quantize import GROUP, Codes, dequantize, quantize

KINDS = get_args(Codes)
BOUND = {"int8": 0.5, "int4": 1.04}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(5, 32), (4, 70), (3, 2, 1), (2, 3, 64), (1, 31), (0, 40)])
@pytest.mark.parametrize("size", [1e-30, 0.02, 1e30])
def test_no_weight_is_off_by_more_than_its_groups_bound(
    device: torch.device, kind: Codes, shape: tuple[int, ...], size: float
) -> None:
    weight = torch.randn(shape, device=device) * size
    coded = quantize(weight, kind)
    back = dequantize(coded)
    assert coded.shape == back.shape == weight.shape
    scales = coded.scales.float().abs().repeat_interleave(GROUP, -1)[..., : shape[-1]]
    assert ((back - weight).abs() <= BOUND[kind] * scales).all()


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.0054), ("int4", 0.0861)])
def test_gaussian_weights_lose_what_was_measured(device: torch.device, kind: Codes, error: float) -> None:
    weight = torch.randn(512, 512, device=device)
    found = (dequantize(quantize(weight, kind)) - weight).square().mean().sqrt()
    assert float(found) == pytest.approx(error, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_stay_zero_and_padding_is_zero(device: torch.device, kind: Codes) -> None:
    weight = torch.zeros(2, 40, device=device)
    weight[0, 33] = -127 / 128  # both scales, 1/128 and 127/1024, are bfloat16
    coded = quantize(weight, kind)
    assert torch.equal(dequantize(coded), weight)
    assert (dequantize(coded._replace(width=64))[:, 40:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [1.0, -0.37, 3e-5])
def test_a_group_of_equal_values_is_off_by_no_more_than_its_scales_rounding(
    device: torch.device, kind: Codes, value: float
) -> None:
    weight = torch.full((3, 32), value, device=device)
    torch.testing.assert_close(dequantize(quantize(weight, kind)), weight, rtol=2**-8, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_multiples_of_a_scale_come_back_exactly(device: torch.device, kind: Codes) -> None:
    codes = torch.arange(-8, 8, device=device).repeat(2, 2) if kind == "int4" else torch.arange(96, 128, device=device)
    assert torch.equal(dequantize(quantize(codes * 0.25, kind)), codes * 0.25)


def test_int4_lies_two_to_a_byte_the_second_half_of_a_group_high(device: torch.device) -> None:
    weight = torch.full((1, 32), 0.0, device=device)
    weight[0, 0], weight[0, 16], weight[0, 31] = -8.0, 7.0, 1.0
    coded = quantize(weight, "int4")
    assert coded.codes[0].tolist() == [0xF0, *[0x88] * 14, 0x98]
    assert coded.scales.tolist() == [[1.0]]

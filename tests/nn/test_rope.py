"""Rotary embedding: pairings against the reference, YaRN's frequencies and magnitudes against known numbers."""

import math

import pytest
import torch
from torch import Tensor

from moekit.config import Llama3RopeConfig, RopeConfig, YarnConfig
from moekit.nn.rope import Rotation, inverse_frequencies, magnitude, rotate, rotation, softmax_scale
from moekit.ops import reference

V2 = RopeConfig(yarn=YarnConfig(factor=40.0, original_max_position_embeddings=4096, mscale=0.707, mscale_all_dim=0.707))


def exact(rope: RopeConfig, dim: int, positions: Tensor) -> Rotation:
    """Returns the rotation in float64, without any attention magnitude."""
    angles = positions.double().unsqueeze(-1) * torch.tensor(inverse_frequencies(rope, dim), dtype=torch.float64).to(
        positions.device
    )
    return Rotation(angles.cos(), angles.sin())


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotate_equals_the_reference_in_both_pairings(device: torch.device, interleaved: bool) -> None:
    positions = torch.tensor([[0, 1, 5], [7, 100, 3]], device=device)
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64, device=device)
    y = rotate(x, exact(RopeConfig(), 6, positions), interleaved)
    frequencies = inverse_frequencies(RopeConfig(), 6)
    for b in range(2):
        for t in range(3):
            for h in range(4):
                expected = reference.rotate(x[b, t, h], int(positions[b, t]), frequencies, interleaved)
                torch.testing.assert_close(y[b, t, h], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("width", [2, 6, 64, 70])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-7), (torch.bfloat16, 2e-2)], ids=str)
def test_rotate_in_working_dtypes_stays_within_rounding_of_float64_with_its_gradient(
    device: torch.device, interleaved: bool, width: int, dtype: torch.dtype, bound: float
) -> None:
    turn = rotation(V2, width, torch.tensor([[0, 1, 5], [7, 100, 3]], device=device))
    whole = torch.randn(2, 4, 3, width + 3, device=device).to(dtype).requires_grad_()
    double = whole.detach().double().requires_grad_()
    probe, results = torch.randn(2, 3, 4, width, device=device).to(dtype), []
    for leaf, angles in ((whole, turn), (double, Rotation(turn.cos.double(), turn.sin.double()))):
        y = rotate(leaf[..., 2 : 2 + width].transpose(1, 2), angles, interleaved)
        results.append((y, *torch.autograd.grad(y, leaf, probe.to(y.dtype))))
    assert results[0][0].dtype == dtype
    for ours, expected in zip(*results, strict=True):
        # measured worst over five seeds: 8e-8; 3e-3 by our kernels, 7e-3 by torch, which rounds at each step
        assert (ours.double() - expected).abs().max() < bound * expected.abs().max()


def test_the_two_pairings_differ_by_a_permutation_of_the_head(device: torch.device) -> None:
    turn = exact(RopeConfig(), 6, torch.tensor([[3, 9]], device=device))
    x = torch.randn(1, 2, 2, 6, dtype=torch.float64, device=device)
    order = torch.tensor([0, 2, 4, 1, 3, 5], device=device)
    torch.testing.assert_close(rotate(x, turn, True)[..., order], rotate(x[..., order], turn, False))
    assert not torch.allclose(rotate(x, turn, True), rotate(x, turn, False))


@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_only_and_lengths_are_kept(device: torch.device, interleaved: bool) -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, device=device)

    def score(i: int, j: int) -> Tensor:
        at = [exact(RopeConfig(), 8, torch.tensor([[p]], device=device)) for p in (i, j)]
        return (rotate(q, at[0], interleaved) * rotate(k, at[1], interleaved)).sum()

    torch.testing.assert_close(score(9, 4), score(25, 20), rtol=0, atol=1e-12)
    assert (score(9, 4) - score(9, 5)).abs() > 1e-3
    torch.testing.assert_close(score(0, 0), (q * k).sum(), rtol=0, atol=1e-12)


def test_rotation_is_float32_and_follows_each_sequences_positions(device: torch.device) -> None:
    positions = torch.tensor([[0, 1, 2], [40, 41, 42]], device=device)
    turn, expected = rotation(RopeConfig(), 6, positions), exact(RopeConfig(), 6, positions)
    assert turn.cos.dtype == torch.float32
    torch.testing.assert_close(turn.cos.double(), expected.cos, rtol=0, atol=3e-6)  # 42 radians in float32
    torch.testing.assert_close(turn.sin.double(), expected.sin, rtol=0, atol=3e-6)


def test_frequencies_without_yarn_are_powers_of_theta() -> None:
    assert inverse_frequencies(RopeConfig(theta=100.0), 4) == [1.0, pytest.approx(0.1)]


def test_yarn_keeps_fast_frequencies_divides_slow_ones_and_never_rises() -> None:
    plain, yarn = inverse_frequencies(RopeConfig(), 64), inverse_frequencies(V2, 64)
    # 4096 / (2 pi 32) turns at dimension 10.5, 4096 / (2 pi) at 22.5
    assert yarn[:11] == plain[:11]
    assert yarn[23:] == pytest.approx([f / 40 for f in plain[23:]], rel=1e-14)
    assert all(f / 40 < y < f for f, y in zip(plain[11:23], yarn[11:23], strict=True))
    assert yarn == sorted(yarn, reverse=True)
    assert yarn[12] == pytest.approx(plain[12] * (11 + 2 / 40) / 13)  # two of the thirteen steps from 10 to 23


def test_yarn_magnitudes_of_deepseek_v2_and_v3() -> None:
    assert magnitude(40.0, 0.707) == pytest.approx(1.2608, abs=5e-5)
    assert magnitude(40.0, 1.0) == pytest.approx(1.3689, abs=5e-5)
    assert softmax_scale(V2, 192) * math.sqrt(192) == pytest.approx(1.5896, abs=5e-5)
    assert softmax_scale(RopeConfig(), 192) == pytest.approx(192**-0.5)


def test_cos_and_sin_are_multiplied_by_the_ratio_of_magnitudes(device: torch.device) -> None:
    start = torch.zeros(1, 1, dtype=torch.int64, device=device)
    assert (rotation(V2, 8, start).cos == 1).all()
    alone = RopeConfig(yarn=YarnConfig(factor=40.0, original_max_position_embeddings=4096))
    torch.testing.assert_close(rotation(alone, 8, start).cos, torch.full((1, 1, 4), 1.36889, device=device))
    assert softmax_scale(alone, 16) == 0.25


def test_llama3_keeps_fast_frequencies_divides_slow_ones_and_goes_straight_between() -> None:
    rope = RopeConfig(theta=500000.0, llama3=Llama3RopeConfig(factor=8.0, original_max_position_embeddings=8192))
    plain, scaled = inverse_frequencies(RopeConfig(theta=500000.0), 128), inverse_frequencies(rope, 128)
    turns = [8192 * f / (2 * math.pi) for f in plain]
    fast, slow = sum(t >= 4 for t in turns), sum(t > 1 for t in turns)
    assert (fast, slow) == (29, 35)
    assert scaled[:fast] == plain[:fast]
    assert scaled[slow:] == pytest.approx([f / 8 for f in plain[slow:]], rel=1e-14)
    kept = (turns[30] - 1) / 3
    assert scaled[30] == pytest.approx(plain[30] * (kept + (1 - kept) / 8), rel=1e-14)
    assert softmax_scale(rope, 16) == 0.25


def test_frequencies_are_float32_whatever_the_default() -> None:
    rope, positions = RopeConfig(theta=12345.0), torch.arange(4096).unsqueeze(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        low = rotation(rope, 10, positions)
    finally:
        torch.set_default_dtype(torch.float32)
    exact = torch.tensor([4095 * 12345.0 ** (-2 * i / 10) for i in range(5)], dtype=torch.float64)
    torch.testing.assert_close(low.cos[0, -1].double(), exact.cos(), rtol=0, atol=2e-3)
